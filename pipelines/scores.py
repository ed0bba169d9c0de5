"""Scores: one artifact a scorer, its parts beside the token parts, made by a pool of Scorers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from stillhouse.actors.scorer import Kind, OwnPlace, ScorerHost, ScorerSettings
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.pipelines.flow import run_tasks, stream_parts
from stillhouse.pipelines.models import ModelRef
from stillhouse.pipelines.pins import pinned
from stillhouse.pipelines.placement import actor_options
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.selection.own import OwnCode
from stillhouse.selection.scorers import score_task
from stillhouse.selection.statistics import (
    DsirTask,
    NgramsTask,
    OwnFitTask,
    compute_statistics,
    put_statistics,
)
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.text.tasks import PackTask

UNITS = {
    "causal_lm": ("nats per token", "lower"),
    "dsir": ("log importance weight", "higher"),
    "contamination": ("holds a contaminated document", "lower"),
    "own": ("the scorer's own", "higher"),
}
NGRAMS_VERSION = 2
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
        self._gpus = spec.compute.gpus_of(spec.compute.scorer)

    def losses(self, name: str, model: ModelRef) -> Scores:
        """Mean NLL of every sequence under a language model, on `compute.scorers` actors."""
        settings = self._spec.scoring.model_dump(include={"dtype", "attention"})
        extra = self._tokenizer.extra_identity()
        scorer = fingerprint(["causal_lm", model.fingerprint, settings, *extra])
        flops = model.shape.flops_per_token(self._spec.sequence_length)
        gpus = self._gpus
        return self._score(f"score {name}", "causal_lm", scorer, model.folder, gpus, flops)

    def dsir(self, target: Sequence[PackTask]) -> Scores:
        """Log importance weights of hashed n-grams, target against pool."""
        num_rows = max(1, _DSIR_TOKENS // self._spec.sequence_length)
        pool = list(self._pool.parts)
        key = ["dsir", [t.unit.fingerprint for t in target], [p.sha256 for p in pool], num_rows]
        task = DsirTask(self._ctx.store, *self._words, tuple(target), tuple(pool), num_rows)
        return self._by_statistics("score dsir", "dsir", fingerprint(key), task)

    def own(self, code: OwnCode, target: Sequence[PackTask]) -> Scores:
        """What a user's scorer says, fitted on the target and a random part of the pool.

        Raises:
            ScorerError: whatever its code raised.
        """
        asked, spec = self._spec.scorer, self._spec
        assert asked is not None
        num_rows = max(1, asked.num_tokens // spec.sequence_length)
        pool = tuple(self._pool.parts)
        key = ["own", code.digest, asked.settings, sorted(asked.pip), num_rows]
        key += [self._tokenizer.digest, [task.unit.fingerprint for task in target]]
        name = fingerprint([*key, [part.sha256 for part in pool]])
        task = OwnFitTask(
            code, asked.settings, self._ctx.store, *self._words, tuple(target), pool, num_rows
        )
        make = partial(self._fitted, "fit scorer", name, "own", task)
        made = pinned(self._ctx, "fit scorer", [*key, spec.pool.paths], asked.pin, name, make)
        scorer = fingerprint([made.fingerprint, spec.selection.grain])
        folder = self._ctx.store.path("models", made.fingerprint)
        own = OwnPlace(code, asked.settings, spec.selection.grain)
        return self._score("score", "own", scorer, folder, self._gpus, 0, own)

    def contamination(self, heldout: Sequence[PackTask]) -> Scores | None:
        """Which sequences hold a document that shares 13-grams with held-out text; None if off."""
        if not self._spec.selection.exclude_contaminated:
            return None
        key = ["contamination", NGRAMS_VERSION, [task.unit.fingerprint for task in heldout]]
        task = NgramsTask(*self._words, tuple(heldout))
        return self._by_statistics("contamination", "contamination", fingerprint(key), task)

    def _placed(self, kind: Kind) -> dict[str, Any] | None:
        """Models go where the spec wants its scorers; n-grams go anywhere."""
        if kind not in {"causal_lm", "own"}:
            return None
        return actor_options(self._spec.compute, self._spec.compute.scorer)

    @property
    def _words(self) -> tuple[str, str]:
        return self._tokenizer.path, self._tokenizer.eos_token

    def _by_statistics(
        self,
        step: str,
        kind: Literal["dsir", "contamination"],
        name: str,
        task: DsirTask | NgramsTask,
    ) -> Scores:
        store = self._ctx.store
        if store.find_manifest("models", name) is None:
            if self._ctx.dry:
                raise Unfinished(step)
            values = next(run_tasks(self._ctx, compute_statistics, [task]))
            put_statistics(store, name, kind, values)
        return self._score(step, kind, name, store.path("models", name), 0, 0)

    def _fitted(self, step: str, name: str, kind: Kind, task: OwnFitTask) -> Manifest:
        with self._ctx.step(step, total=1, reused=0) as advance:
            values = next(run_tasks(self._ctx, compute_statistics, [task]))
            advance(1, 0)
        return put_statistics(self._ctx.store, name, kind, values)

    def _score(
        self,
        step: str,
        kind: Kind,
        scorer: str,
        folder: str,
        gpus: float,
        flops_per_token: float,
        own: OwnPlace | None = None,
    ) -> Scores:
        compute = self._spec.compute
        settings = ScorerSettings(
            kind=kind,
            path=folder,
            tokenizer=self._tokenizer.path,
            eos_token=self._tokenizer.eos_token,
            bos_id=self._tokenizer.bos_id,
            scoring=self._spec.scoring,
            device=compute.device,
            gpus=gpus,
            threads=compute.threads_per_worker,
            own=own,
        )
        tasks = [score_task(scorer, part) for part in self._pool.parts]
        ranks = kind in {"causal_lm", "own"}
        heldout = [score_task(scorer, part) for part in self._heldout.parts] if ranks else []
        receipts = stream_parts(
            self._ctx,
            step,
            kind="scores",
            tasks=[*tasks, *heldout],
            make=partial(ScorerHost, self._ctx.store, settings),
            workers=compute.scorers,
            options=self._placed(kind),
        )
        receipts, on_heldout = receipts[: len(tasks)], receipts[len(tasks) :]
        work = self._ctx.work[step]
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
