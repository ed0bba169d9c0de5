"""The models of a selection: prior, conditional, and the targets that evaluate it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.models.shape import ModelShape, planned_shape
from stillhouse.pipelines.context import Context, pinned, run_tasks
from stillhouse.pipelines.given import ModelRef, weights_digest
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.pipelines.training import make_task, train_models
from stillhouse.pipelines.workers import Gang
from stillhouse.selection.sampling import sample_rows
from stillhouse.spec import ModelSettings, Optimisation, SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.schedule import Share
from stillhouse.training.seen import Ranges, add_rows, file_digests, rows_with, trained_rows
from stillhouse.training.spec import TrainingSettings
from stillhouse.training.task import Start, StartModel, TokenSet, TrainTask, choose, token_set


class Models:
    """Trains the models of one job, or finds them in the store.

    As a context it keeps one group of workers for the trainings inside.

    Args:
        given: the models that the spec names, by key.

    Attributes:
        trained: models that the job trained itself, by role.
    """

    def __init__(
        self,
        ctx: Context,
        spec: SelectSpec,
        tokenizer: TokenizerRef,
        given: Mapping[str, ModelRef],
    ) -> None:
        self._ctx, self._spec, self._tokenizer, self._given = ctx, spec, tokenizer, given
        self._gang = Gang(ctx)
        self.trained: dict[str, Manifest] = {}

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._gang.__exit__(kind)

    def prior(self, pool: Manifest, check: Callable[[int], None]) -> ModelRef:
        """The prior: given, or trained on random sequences of the pool and pinned.

        Args:
            pool: its token parts.
            check: called before a training with the number of the pool's rows that it takes.
        """
        if "prior" in self._given:
            return self._given["prior"]
        settings = self._spec.prior
        length = self._spec.sequence_length
        data = _sample(self._ctx.store, pool, settings.num_tokens // length, settings.seed)
        model = settings.model or ModelSettings()
        shape, step = self._shape(model), "train prior"
        task = self._task(settings, shape, [data], data.num_tokens, role="prior", init=model)
        asked = choose(  # not from the data: a pin outlives new shards, which may change their size
            settings,
            width=model.hidden_size,
            num_tokens=settings.num_tokens,
            sequence_length=length,
        )
        key = ["prior", asked.model_dump(exclude={"pin", "from_"}), self._tokenizer.digest]
        key += [length, self._spec.pool.paths]

        def make() -> Manifest:
            check(data.num_rows)
            return train_models(self._ctx, self._gang, step, [task], shape)[0]

        made = pinned(self._ctx, step, key, settings.pin, task.fingerprint, make)
        work = self._ctx.work[step]
        work.tokens = made.totals["num_tokens"]
        work.flops = 3.0 * shape.flops_per_token(length) * work.tokens
        return self._made(made, shape)

    def conditional(self, prior: ModelRef, targets: Mapping[str, Manifest]) -> ModelRef:
        """The conditional: the prior fine-tuned on the targets (tokens by key), or given."""
        if "conditional" in self._given:
            return self._given["conditional"]
        start: Start = "trained" if prior.trained_here else "given"
        init = StartModel(prior.folder, prior.fingerprint)
        return self._tuned("conditional", prior, targets, init, start)

    def down(self, prior: ModelRef, targets: Mapping[str, Manifest]) -> ModelRef:
        """RHO-down's model: of the prior's architecture and sizes, trained on the targets only."""
        init = StartModel(prior.folder, prior.fingerprint, fresh=True)
        if prior.trained_here:
            init = self._spec.prior.model or ModelSettings()
        return self._tuned("down", prior, targets, init, "fresh")

    def _tuned(
        self,
        role: str,
        prior: ModelRef,
        targets: Mapping[str, Manifest],
        init: ModelSettings | StartModel,
        start: Start,
    ) -> ModelRef:
        settings, shape = self._spec.conditional, prior.shape
        tokens = sum(one.num_tokens for one in targets.values())
        num_tokens = settings.num_tokens or round(settings.epochs * tokens)
        weights = [one.weight for one in self._spec.targets.values()] or [1.0]
        data = [
            token_set(self._ctx.store, one, key, Share(weight))
            for (key, one), weight in zip(targets.items(), weights, strict=True)
        ]
        task = self._task(settings, shape, data, num_tokens, role=role, init=init, start=start)
        [made] = train_models(self._ctx, self._gang, f"train {role}", [task], shape)
        return self._made(made, shape)

    def targets(
        self, selections: dict[str, Manifest], heldout: Manifest
    ) -> dict[str, list[Manifest]]:
        """A target model for each selection and seed, on equal tokens; manifests by name."""
        train = self._spec.train
        assert train is not None
        store, shape = self._ctx.store, self._shape(train.model)
        tokens = train.num_tokens or selections[self._spec.rule].num_tokens
        held = token_set(store, heldout, "heldout")
        answers = self._spec.pool.columns.has_answers
        tasks = [
            self._task(
                train.model_copy(update={"seed": seed}),
                shape,
                [replace(token_set(store, selection, name), masked=answers)],
                tokens,
                role="target",
                label=f"{name}, seed {seed}",
                init=train.model,
                heldout=held,
                eval_points=train.eval_points,
            )
            for seed in train.all_seeds
            for name, selection in selections.items()
        ]
        with Gang(self._ctx) as gang:
            made = train_models(self._ctx, gang, "train targets", tasks, shape)
        width = len(selections)
        return {name: made[i::width] for i, name in enumerate(selections)}

    def prior_rows(self, prior: ModelRef, pool: Manifest) -> dict[str, NDArray[np.int64]]:
        """Rows of the pool that the prior has seen, by the sha256 of their part.

        The exact rows if it was trained on this pool's sequences; else, as far as its folder tells,
        all that hold a document it has seen.
        """
        found, seen = trained_rows(prior.folder, {part.sha256 for part in pool.parts})
        files = file_digests(pool) if seen else []
        todo = [i for i, names in enumerate(files) if not seen.keys().isdisjoint(names)]
        items = [(self._ctx.store.path(pool.parts[i].path), files[i]) for i in todo]
        hits = run_tasks(self._ctx, partial(_rows_with, seen), items)
        for i, rows in zip(todo, hits, strict=True):
            add_rows(found, pool.parts[i].sha256, rows)
        return found

    def _made(self, manifest: Manifest, shape: ModelShape) -> ModelRef:
        folder = self._ctx.store.path("models", manifest.fingerprint)
        tokens = manifest.totals["num_tokens"]
        self.trained[manifest.totals["role"]] = manifest
        return ModelRef(weights_digest(manifest.files), folder, shape, tokens, trained_here=True)

    def _shape(self, model: ModelSettings) -> ModelShape:
        num_positions = self._spec.sequence_length + self._tokenizer.num_extra
        return planned_shape(model, self._tokenizer.vocab_size, num_positions)

    def _task(
        self,
        settings: Optimisation,
        shape: ModelShape,
        data: Sequence[TokenSet],
        num_tokens: int,
        *,
        role: str,
        label: str | None = None,
        eval_points: int = 1,
        **options: Any,
    ) -> TrainTask:
        """A training whose checkpoints are removed at its end; `options` as of `make_task`."""
        content = settings.model_dump(include=set(Optimisation.model_fields))
        training = TrainingSettings(**content, eval_points=eval_points, keep_last=0)
        options |= {"role": role, "label": label or role}
        where = self._spec.compute, self._tokenizer
        return make_task(*where, shape, data, training, num_tokens, **options)


def _rows_with(seen: Ranges, item: tuple[str, list[str]]) -> NDArray[np.int64]:
    return rows_with(*item, seen)


def _sample(store: Store, pool: Manifest, num_rows: int, seed: int) -> TokenSet:
    """Random sequences of a pool, from at most a few hundred of its parts (`sample_rows`)."""
    whole = token_set(store, pool, "pool")
    chosen = sample_rows(pool.parts, max(1, num_rows), seed)
    return replace(
        whole,
        uris=tuple(whole.uris[i] for i, _ in chosen),
        rows=tuple(len(rows) for _, rows in chosen),
        digests=tuple(whole.digests[i] for i, _ in chosen),
        chosen=tuple(rows for _, rows in chosen),
    )
