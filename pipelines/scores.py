"""Scores: one artifact for each scorer, whose parts correspond to the token parts of the pool."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from stillhouse.custom_code import CustomCode
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Step, perform, pinned, run_tasks
from stillhouse.pipelines.models import ModelRef
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.selection.contamination import BenchmarksTask, ContaminationScorer, NgramsTask
from stillhouse.selection.dsir import DsirScorer, DsirTask
from stillhouse.selection.own import OwnFitTask, OwnTokenScorer
from stillhouse.selection.scorers import (
    Arrays,
    FitTask,
    LanguageModelHost,
    ScoreTask,
    TextScorer,
    TextScorerHost,
    put_arrays,
)
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tasks import PackTask

_UNITS = {
    "causal_lm": ("nats per token", "lower"),
    "dsir": ("log importance weight", "higher"),
    "contamination": ("holds a contaminated document", "lower"),
    "own": ("the scorer's own", "higher"),
}
_DSIR_TOKENS = 2_000_000


@dataclass(frozen=True, slots=True)
class Scores:
    """A scores artifact; its parts are in the order of the token parts.

    `heldout`: paths of the scores of the held-out target's parts, where the scorer ran on them.
    """

    manifest: Manifest
    heldout: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        return [part.path for part in self.manifest.parts]


class PoolScores:
    """Runs scorers over every part of the pool that they have not scored yet.

    Those that may rank the selection also score the held-out target, which the report compares.
    """

    def __init__(
        self,
        ctx: Context,
        spec: SelectSpec,
        tokenizer: TokenizerRef,
        pool: Manifest,
        heldout: Manifest,
    ) -> None:
        self._ctx, self._spec, self._tokenizer = ctx, spec, tokenizer
        self._pool, self._heldout = pool, heldout

    def losses(self, name: str, model: ModelRef) -> Scores:
        """Mean NLL of every sequence under a language model, on `compute.scorers` actors."""
        compute, scoring = self._spec.compute, self._spec.scoring
        settings = scoring.model_dump(include={"dtype", "attention"})
        bos_id = self._tokenizer.bos_id
        bos = [] if bos_id is None else [["bos", bos_id]]
        answers = ["answers"] if self._spec.pool.columns.has_answers else []
        scorer = fingerprint(["causal_lm", model.fingerprint, settings, *bos, *answers])
        host = LanguageModelHost(
            folder=model.folder,
            scoring=scoring,
            device=compute.device,
            gpus=compute.gpus_of(compute.scorer),
            threads=compute.threads_per_worker,
            bos_id=bos_id,
        )
        flops = float(model.shape.flops_per_token(self._spec.sequence_length))
        return self._score(f"score {name}", "causal_lm", scorer, host, flops)

    def dsir(self, target: Sequence[PackTask]) -> Scores:
        """Log importance weights of hashed n-grams, target against pool."""
        num_rows = max(1, _DSIR_TOKENS // self._spec.sequence_length)
        task = DsirTask(tuple(target), *self._fitting, tuple(self._pool.parts), num_rows)
        self._fitted("dsir", task)
        host = self._host(DsirScorer, task.fingerprint)
        return self._score("score dsir", "dsir", task.fingerprint, host)

    def own(self, code: CustomCode, target: Sequence[PackTask]) -> Scores:
        """Values of a user's scorer, fitted on the target and a random part of the pool.

        Raises:
            CustomCodeError: whatever its code raised.
        """
        settings, spec = self._spec.scorer, self._spec
        assert settings is not None
        num_rows = max(1, settings.num_tokens // spec.sequence_length)
        pip, pool = tuple(sorted(settings.pip)), tuple(self._pool.parts)
        task = OwnFitTask(
            tuple(target), *self._fitting, code, settings.settings, pip, pool, num_rows
        )
        without_pool = replace(task, pool=())  # a pin outlives new shards

        def make() -> Manifest:
            with self._ctx.step("fit scorer", total=1, reused=0) as advance:
                made = self._fitted("own", task)
                advance(1, 0)
            return made

        key = [without_pool.fingerprint, spec.pool.paths]
        name = pinned(
            self._ctx, "fit scorer", key, settings.pin, task.fingerprint, make
        ).fingerprint
        grain = spec.selection.grain
        host = self._host(OwnTokenScorer, name, code, settings.settings, grain)
        return self._score("score", "own", fingerprint([name, grain]), host)

    def contamination(self, heldout: Sequence[PackTask]) -> Scores | None:
        """Which sequences hold a document that shares 13-grams with held-out text; None if off."""
        if not self._spec.selection.exclude_contaminated:
            return None
        return self._sharing("contamination", NgramsTask(tuple(heldout), *self._fitting))

    def decontamination(self, benchmarks: Sequence[PackTask]) -> Scores | None:
        """The same for files of benchmarks, all in one pass over the pool; None without any."""
        if not benchmarks:
            return None
        return self._sharing("decontamination", BenchmarksTask(tuple(benchmarks), *self._fitting))

    def _sharing(self, title: str, task: NgramsTask) -> Scores:
        self._fitted("contamination", task)
        host = self._host(ContaminationScorer, task.fingerprint)
        return self._score(title, "contamination", task.fingerprint, host)

    @property
    def _fitting(self) -> tuple[str, str]:
        return self._tokenizer.path, self._tokenizer.eos_token

    def _host(self, scorer: type[TextScorer], model: str, *arguments: object) -> TextScorerHost:
        return TextScorerHost(
            scorer, self._ctx.store.path("models", model), *self._fitting, arguments
        )

    def _fitted(self, role: str, task: FitTask) -> Manifest:
        """The arrays of a scorer of text, fitted on a worker unless they are in the store."""
        store = self._ctx.store
        made = store.find_manifest("models", task.fingerprint)
        if made is None:
            arrays = next(run_tasks(self._ctx, partial(_fit, store), [task]))
            made = put_arrays(store, task.fingerprint, role, arrays)
        return made

    def _score(
        self,
        title: str,
        kind: str,
        scorer: str,
        host: LanguageModelHost | TextScorerHost,
        flops_per_token: float = 0,
    ) -> Scores:
        store, compute, pool = self._ctx.store, self._spec.compute, self._pool
        ranks = kind in {"causal_lm", "own"}
        tasks = [ScoreTask(scorer, part) for part in pool.parts]
        heldout = [ScoreTask(scorer, part) for part in self._heldout.parts] if ranks else []
        on = compute.scorer if ranks else None  # the others need no accelerator
        step = Step(title, [*tasks, *heldout], host, compute.scorers, on)
        receipts = perform(self._ctx, step)
        receipts, on_heldout = receipts[: len(tasks)], receipts[len(tasks) :]
        work = self._ctx.work[title]
        work.tokens = pool.num_tokens + (self._heldout.num_tokens if ranks else 0)
        work.flops = flops_per_token * work.tokens
        unit, better = _UNITS[kind]
        bos_id = host.bos_id if isinstance(host, LanguageModelHost) else None
        manifest = Manifest(
            kind="scores",
            fingerprint=fingerprint(["scores", [task.fingerprint for task in tasks]]),
            parts=tuple(receipt.parts[0] for receipt in receipts),
            inputs={
                "tokens": pool.fingerprint,
                "scorer": scorer,
                "model": host.folder.removeprefix(store.uri + "/"),
            },
            settings={"scorer": kind, "unit": unit, "better": better}
            | self._spec.scoring.model_dump(include={"dtype", "attention"})
            | ({} if bos_id is None else {"bos_id": bos_id}),
            totals={"nan": sum(receipt.counts["nan"] for receipt in receipts)},
            made_by=receipts[0].info,
        )
        paths = tuple(receipt.parts[0].path for receipt in on_heldout)
        return Scores(store.put_manifest(manifest), paths)


def _fit(store: Store, task: FitTask) -> Arrays:
    return task.fit(store)
