"""Which units of documents a store holds packed, for a plan that may not read them."""

from dataclasses import dataclass

from stillhouse.errors import ArtifactError
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_names

_NOT_ARTIFACTS = {"parts", "receipts"}


@dataclass(frozen=True, slots=True)
class PackedUnit:
    """What was left out of a unit (a digest), and how many tokens it gave."""

    dropped: str
    num_tokens: int


def packed_units(
    store: Store, tokenizer: TokenizerRef, sequence_length: int, part_tokens: int
) -> dict[str, PackedUnit]:
    """By the fingerprint of a unit's scan: how it was packed with this tokenizer and lengths.

    What a unit drops depends on the other units; where it was packed several times, any counts.
    """
    part_rows = max(1, part_tokens // sequence_length)
    found: dict[str, PackedUnit] = {}
    for name in sorted(set(list_names(store.path("tokens"))) - _NOT_ARTIFACTS):
        try:
            manifest = store.get_manifest("tokens", name)
        except ArtifactError:  # being written, or of another version
            continue
        if manifest.settings["sequence_length"] != sequence_length:
            continue
        made_with = manifest.settings["tokenizer"]
        if (made_with["digest"], made_with["eos_token"]) != (tokenizer.digest, tokenizer.eos_token):
            continue
        parts = list(manifest.parts)
        for unit in manifest.inputs["units"]:
            mine, parts = parts[: unit["parts"]], parts[unit["parts"] :]
            rows = [part.num_rows for part in mine]
            whole = all(n >= part_rows for n in rows[:-1])  # a part ends with a document
            if whole and max(rows, default=0) < 2 * part_rows:
                tokens = sum(part.num_tokens for part in mine)
                found[unit["scan"]] = PackedUnit(unit["dropped"], tokens)
    return found
