"""The models of a selection: prior, conditional, and the targets that it is judged by."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.models.shape import ModelShape, planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import ModelRef
from stillhouse.pipelines.pins import pinned
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.pipelines.training import train_models
from stillhouse.selection.sampling import sample_rows
from stillhouse.spec import ModelSettings, Optimisation, SelectSpec
from stillhouse.storage.artifact import Manifest, PartRef
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.parquet import read_table
from stillhouse.training.recipe import Start, choose
from stillhouse.training.task import (
    TRAINED_ON,
    DataPart,
    ModelTask,
    SameArchitecture,
    model_name,
)


def trained_rows(folder: str, parts: Iterable[str]) -> dict[str, NDArray[np.int64]]:
    """Rows of some parts (given by sha256) that a model was trained on, as far as it tells."""
    if TRAINED_ON not in list_names(folder):
        return {}
    table = read_table(join(folder, TRAINED_ON))
    names = table["part"].combine_chunks()
    index, rows = names.indices.to_numpy(), table["row"].to_numpy()
    here = set(parts)
    return {
        sha: np.sort(rows[index == i])
        for i, sha in enumerate(names.dictionary.to_pylist())
        if sha in here
    }


class Models:
    """Makes the models of one job. Every one is found again by what it was made from.

    `given` are those that the spec names by path, by key.
    """

    def __init__(
        self,
        ctx: Context,
        spec: SelectSpec,
        tokenizer: TokenizerRef,
        given: Mapping[str, ModelRef],
    ) -> None:
        self._ctx = ctx
        self._spec = spec
        self._tokenizer = tokenizer
        self._given = given
        self.trained: dict[str, Manifest] = {}
        """Models that the job made itself, by role."""

    def prior(self, pool: Manifest, check: Callable[[int], None]) -> ModelRef:
        """The prior: given by path, or trained on random sequences of the pool and pinned.

        Args:
            pool: its token parts.
            check: told how many of the pool's rows it will be trained on, before it is.
        """
        settings = self._spec.prior
        if "prior" in self._given:
            return self._given["prior"]
        length = self._spec.sequence_length
        num_rows = min(max(1, settings.num_tokens // length), pool.num_rows)
        chosen = sample_rows(pool.parts, num_rows, settings.seed)
        data = [(pool.parts[i], rows) for i, rows in chosen]
        model = settings.model or ModelSettings()
        step, width = "train prior", model.hidden_size
        learning = self._learning(settings, width, num_rows * length)
        task = self._task("prior", "prior", model, data, num_rows * length, learning, settings.seed)
        asked = choose(  # a pin outlives new shards, which may change how many tokens there are
            settings, width=width, num_tokens=settings.num_tokens, sequence_length=length
        )
        key = ["prior", asked.model_dump(exclude={"pin"}), self._tokenizer.digest]
        key += [length, self._spec.pool.paths]

        def make() -> Manifest:
            check(num_rows)
            return self._prior(step, task, model)

        made = pinned(self._ctx, step, key, settings.pin, task.fingerprint, make)
        work = self._ctx.work[step]
        work.tokens = made.totals["num_tokens"]
        work.flops = 3 * self._flops(model) * work.tokens
        return self._made(made, self._shape(model))

    def _prior(self, step: str, task: ModelTask, model: ModelSettings) -> Manifest:
        return train_models(self._ctx, step, [task], self._flops(model))[0]

    def conditional(self, prior: ModelRef, target: Manifest) -> ModelRef:
        """The conditional: the prior fine-tuned on the target, or given by path."""
        if "conditional" in self._given:
            return self._given["conditional"]
        start: Start = "trained" if prior.trained_here else "given"
        return self._tuned("conditional", prior, prior.folder, prior.fingerprint, start, target)

    def down(self, prior: ModelRef, target: Manifest) -> ModelRef:
        """RHO-down's model: of the prior's architecture and sizes, trained on the target alone."""
        if prior.trained_here:
            model = self._spec.prior.model or ModelSettings()
            return self._tuned("down", prior, model, None, "fresh", target)
        like = SameArchitecture(prior.folder)
        return self._tuned("down", prior, like, ["like", prior.fingerprint], "fresh", target)

    def _tuned(
        self,
        role: str,
        prior: ModelRef,
        init: str | ModelSettings | SameArchitecture,
        identity: object,
        start: Start,
        target: Manifest,
    ) -> ModelRef:
        settings, shape = self._spec.conditional, prior.shape
        num_tokens = settings.num_tokens or round(settings.epochs * target.num_tokens)
        data = [(part, None) for part in target.parts]
        learning = self._learning(settings, shape.hidden_size, num_tokens, start)
        task = self._task(role, role, init, data, num_tokens, learning, settings.seed, identity)
        flops = float(shape.flops_per_token(self._spec.sequence_length))
        return self._made(train_models(self._ctx, f"train {role}", [task], flops)[0], shape)

    def targets(
        self, selections: dict[str, Manifest], heldout: Manifest
    ) -> dict[str, list[Manifest]]:
        """A target model for each selection and seed, on equal tokens; manifests by name."""
        train = self._spec.train
        assert train is not None
        tokens = train.num_tokens or selections[self._spec.rule].num_tokens
        learning = self._learning(train, train.model.hidden_size, tokens)
        tasks = [
            self._task(
                "target",
                f"{name}, seed {seed}",
                train.model,
                [(part, None) for part in selection.parts],
                tokens,
                learning,
                seed,
                heldout=heldout.parts,
                eval_points=train.eval_points,
            )
            for seed in train.all_seeds
            for name, selection in selections.items()
        ]
        flops = self._flops(train.model)
        made = train_models(self._ctx, "train targets", tasks, flops)
        width = len(selections)
        return {name: made[i::width] for i, name in enumerate(selections)}

    def prior_rows(self, prior: ModelRef, pool: Manifest) -> dict[str, NDArray[np.int64]]:
        """Rows of the pool that the prior was trained on, by the sha256 of their part."""
        if not prior.trained_here:
            return {}
        return trained_rows(prior.folder, [part.sha256 for part in pool.parts])

    def _made(self, manifest: Manifest, shape: ModelShape) -> ModelRef:
        folder = self._ctx.store.path("models", manifest.fingerprint)
        tokens = manifest.totals["num_tokens"]
        self.trained[manifest.totals["role"]] = manifest
        return ModelRef(manifest.fingerprint, folder, shape, tokens, trained_here=True)

    def _shape(self, model: ModelSettings) -> ModelShape:
        words = self._tokenizer
        num_positions = self._spec.sequence_length + words.num_extra
        return planned_shape(model, words.vocab_size, num_positions)

    def _learning(
        self, settings: Optimisation, width: int, num_tokens: float, start: Start = "fresh"
    ) -> Optimisation:
        """The settings with numbers where they say `auto`."""
        return choose(
            settings,
            width=width,
            num_tokens=num_tokens,
            sequence_length=self._spec.sequence_length,
            start=start,
        )

    def _flops(self, model: ModelSettings) -> float:
        return float(self._shape(model).flops_per_token(self._spec.sequence_length))

    def _task(
        self,
        role: str,
        label: str,
        init: str | ModelSettings | SameArchitecture,
        data: Sequence[tuple[PartRef, NDArray[np.int64] | None]],
        num_tokens: int,
        settings: Optimisation,
        seed: int,
        identity: object = None,
        heldout: Sequence[PartRef] = (),
        eval_points: int = 0,
    ) -> ModelTask:
        start = init.model_dump() if isinstance(init, ModelSettings) else identity
        seen = [[p.sha256, None if rows is None else sha256(rows.tobytes())] for p, rows in data]
        measured = [[part.sha256 for part in heldout], eval_points]
        words = self._tokenizer
        compute = self._spec.compute
        return ModelTask(
            fingerprint=model_name(
                role,
                [start, words.digest, measured, *words.extra_identity()],
                fingerprint(seen),
                settings,
                seed,
                num_tokens,
            ),
            label=label,
            role=role,
            init=init,
            data=tuple(DataPart(part.path, part.sha256, rows) for part, rows in data),
            num_tokens=num_tokens,
            settings=settings,
            seed=seed,
            heldout=tuple(part.path for part in heldout),
            eval_points=eval_points,
            sequence_length=self._spec.sequence_length,
            vocab_size=self._tokenizer.vocab_size,
            eos_token=self._tokenizer.eos_token,
            bos_id=words.bos_id,
            tokenizer=self._tokenizer.path,
            inputs={"start": start, "data": fingerprint(seen)},
            device=compute.device,
            gpus=compute.gpus_of(compute.trainer),
        )
