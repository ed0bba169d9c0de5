"""Scores: one artifact a scorer, its parts beside the token parts, made by a pool of Scorers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from numpy.typing import NDArray

from stillhouse.actors.scorer import Kind, OwnPlace, ScorerSettings
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.pipelines.models import ModelRef
from stillhouse.pipelines.pins import pinned
from stillhouse.pipelines.steps import Step, perform, run_tasks
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.selection.own import OwnCode
from stillhouse.selection.scorers import ScoreTask
from stillhouse.selection.statistics import (
    DsirTask,
    NgramsTask,
    OwnFitTask,
    StatisticsTask,
    put_statistics,
)
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tasks import PackTask

UNITS = {
    "causal_lm": ("nats per token", "lower"),
    "dsir": ("log importance weight", "higher"),
    "contamination": ("holds a contaminated document", "lower"),
    "own": ("the scorer's own", "higher"),
}
_DSIR_TOKENS = 2_000_000


@dataclass(frozen=True, slots=True)
class Scores:
    """A scores artifact; its parts stand in the order of the token parts.

    `heldout`: paths of the scores of the held-out target's parts, where the scorer saw them.
    """

    manifest: Manifest
    heldout: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """Path of each scores part."""
        return [part.path for part in self.manifest.parts]

    @property
    def num_nan(self) -> int:
        """Rows whose value is NaN."""
        return int(self.manifest.totals["nan"])


class PoolScores:
    """Runs scorers over every part of the pool that they have not scored yet.

    What ranks the selection also scores the held-out target, for the report to compare.
    """

    def __init__(
        self,
        ctx: Context,
        spec: SelectSpec,
        tokenizer: TokenizerRef,
        pool: Manifest,
        heldout: Manifest,
    ) -> None:
        self._ctx = ctx
        self._spec = spec
        self._tokenizer = tokenizer
        self._pool = pool
        self._heldout = heldout

    def losses(self, name: str, model: ModelRef) -> Scores:
        """Mean NLL of every sequence under a language model, on `compute.scorers` actors."""
        settings = self._spec.scoring.model_dump(include={"dtype", "attention"})
        extra = self._tokenizer.extra_identity()
        scorer = fingerprint(["causal_lm", model.fingerprint, settings, *extra])
        flops = float(model.shape.flops_per_token(self._spec.sequence_length))
        return self._score(f"score {name}", "causal_lm", scorer, model.folder, flops)

    def dsir(self, target: Sequence[PackTask]) -> Scores:
        """Log importance weights of hashed n-grams, target against pool."""
        num_rows = max(1, _DSIR_TOKENS // self._spec.sequence_length)
        task = DsirTask(tuple(target), *self._words, tuple(self._pool.parts), num_rows)
        return self._by_statistics("score dsir", "dsir", task)

    def own(self, code: OwnCode, target: Sequence[PackTask]) -> Scores:
        """What a user's scorer says, fitted on the target and a random part of the pool.

        Raises:
            ScorerError: whatever its code raised.
        """
        asked, spec = self._spec.scorer, self._spec
        assert asked is not None
        num_rows = max(1, asked.num_tokens // spec.sequence_length)
        pip, pool = tuple(sorted(asked.pip)), tuple(self._pool.parts)
        task = OwnFitTask(tuple(target), *self._words, code, asked.settings, pip, pool, num_rows)
        without_pool = replace(task, pool=())  # a pin outlives new shards
        key = [without_pool.fingerprint, spec.pool.paths]
        make = partial(self._fitted, "fit scorer", "own", task)
        made = pinned(self._ctx, "fit scorer", key, asked.pin, task.fingerprint, make)
        scorer = fingerprint([made.fingerprint, spec.selection.grain])
        folder = self._ctx.store.path("models", made.fingerprint)
        own = OwnPlace(code, asked.settings, spec.selection.grain)
        return self._score("score", "own", scorer, folder, own=own)

    def contamination(self, heldout: Sequence[PackTask]) -> Scores | None:
        """Which sequences hold a document that shares 13-grams with held-out text; None if off."""
        if not self._spec.selection.exclude_contaminated:
            return None
        task = NgramsTask(tuple(heldout), *self._words)
        return self._by_statistics("contamination", "contamination", task)

    @property
    def _words(self) -> tuple[str, str]:
        return self._tokenizer.path, self._tokenizer.eos_token

    def _by_statistics(
        self, step: str, kind: Literal["dsir", "contamination"], task: StatisticsTask
    ) -> Scores:
        store, name = self._ctx.store, task.fingerprint
        if store.find_manifest("models", name) is None:
            if self._ctx.dry:
                raise Unfinished(step)
            values = next(run_tasks(self._ctx, partial(_compute, store), [task]))
            put_statistics(store, name, kind, values)
        return self._score(step, kind, name, store.path("models", name))

    def _fitted(self, step: str, kind: Kind, task: StatisticsTask) -> Manifest:
        store = self._ctx.store
        with self._ctx.step(step, total=1, reused=0) as advance:
            values = next(run_tasks(self._ctx, partial(_compute, store), [task]))
            advance(1, 0)
        return put_statistics(store, task.fingerprint, kind, values)

    def _score(
        self,
        title: str,
        kind: Kind,
        scorer: str,
        folder: str,
        flops_per_token: float = 0,
        own: OwnPlace | None = None,
    ) -> Scores:
        compute = self._spec.compute
        ranks = kind in {"causal_lm", "own"}
        settings = ScorerSettings(
            kind=kind,
            path=folder,
            tokenizer=self._tokenizer.path,
            eos_token=self._tokenizer.eos_token,
            bos_id=self._tokenizer.bos_id,
            scoring=self._spec.scoring,
            device=compute.device,
            gpus=compute.gpus_of(compute.scorer) if ranks else 0,
            threads=compute.threads_per_worker,
            own=own,
        )
        tasks = [ScoreTask(scorer, part) for part in self._pool.parts]
        heldout = [ScoreTask(scorer, part) for part in self._heldout.parts] if ranks else []
        on = compute.scorer if ranks else None  # statistics go anywhere
        step = Step(title, [*tasks, *heldout], settings, compute.scorers, on)
        receipts = perform(self._ctx, step)
        receipts, on_heldout = receipts[: len(tasks)], receipts[len(tasks) :]
        work = self._ctx.work[title]
        work.tokens = self._pool.num_tokens + (self._heldout.num_tokens if ranks else 0)
        work.flops = flops_per_token * work.tokens
        unit, better = UNITS[kind]
        manifest = Manifest(
            kind="scores",
            fingerprint=fingerprint(["scores", [task.fingerprint for task in tasks]]),
            parts=tuple(receipt.parts[0] for receipt in receipts),
            inputs={
                "tokens": self._pool.fingerprint,
                "scorer": scorer,
                "model": folder.removeprefix(self._ctx.store.uri + "/"),
            },
            settings={"scorer": kind, "unit": unit, "better": better}
            | self._spec.scoring.model_dump(include={"dtype", "attention"}),
            totals={"nan": sum(receipt.counts["nan"] for receipt in receipts)},
            made_by=receipts[0].info,
        )
        paths = tuple(receipt.parts[0].path for receipt in on_heldout)
        return Scores(self._ctx.store.put_manifest(manifest), paths)


def _compute(store: Store, task: StatisticsTask) -> dict[str, NDArray[Any]]:
    """What a task computes; a function that a worker can be sent."""
    return task.compute(store)
