"""Runs of a mix job and their relatives: runs of the same spec but for the arms."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.origins import Arms, Origin, Rule, choose_origin, unfinished_runs
from stillhouse.mixing.spec import MixSpec
from stillhouse.mixing.task import MIX_VERSION
from stillhouse.pipelines.mix_data import GivenModels, MixInputs
from stillhouse.spec import TokenizerSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_names
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.task import CHECKPOINTS


@dataclass(frozen=True, slots=True)
class Family:
    """What a run is named by beside its arms, and the relatives that have not finished."""

    lineage: str
    unfinished: tuple[Origin, ...]

    def origin(self, store: Store, name: str, arms: Arms, rule: Rule, label: str) -> Origin | None:
        """As `choose_origin`; None where the run `name` itself has begun or finished."""
        begun = any(origin.name == name for origin in self.unfinished)
        if begun or store.find_manifest("models", name) is not None:
            return None
        return choose_origin(self.unfinished, arms, rule, label)


def families_of(
    store: Store, spec: MixSpec, inputs: MixInputs, given: GivenModels
) -> dict[tuple[str, int], Family]:
    """By label and seed."""
    names = list_names(store.path(CHECKPOINTS))
    common = _common(spec, inputs, given)
    found: dict[tuple[str, int], Family] = {}
    for key in product((spec.policy.name, *spec.controls), spec.seeds):
        lineage = fingerprint(["mix", MIX_VERSION, key, common])
        found[key] = Family(lineage, tuple(unfinished_runs(store, names, lineage)))
    return found


def with_origins_tokenizer(
    store: Store, spec: MixSpec, families: dict[tuple[str, int], Family]
) -> MixSpec:
    """With `arms: extend` and a tokenizer to train: the spec with the one that runs began with."""
    origins = [origin for family in families.values() for origin in family.unfinished]
    if spec.arms != "extend" or spec.tokenizer.path is not None or not origins:
        return spec
    path = store.path("models", origins[0].tokenizer)
    return spec.model_copy(update={"tokenizer": TokenizerSettings(path=path)})


def _common(spec: MixSpec, inputs: MixInputs, given: GivenModels) -> dict[str, Any]:
    """What all runs of the job have in common, whatever their arms are."""
    words, target = spec.tokenizer, inputs.target
    return {
        "policy": spec.policy.model_dump(mode="json", exclude={"log", "path"}),
        "train": spec.train.model_dump(mode="json"),
        "model": spec.model.model_dump(mode="json", exclude={"path"}),
        "given": [given.init, given.reference],
        "target": [target.digests, spec.target.where, spec.target.num_shots],
        "lengths": [spec.max_input_tokens, spec.max_target_tokens],
        "tokenizer": words.model_dump(mode="json", exclude={"pin"})
        if words.path is None
        else load_tokenizer(words.path, words.eos_token).digest,
    }
