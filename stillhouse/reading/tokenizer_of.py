"""The tokenizer of a selection or tokens artifact, found in its store by content."""

from dataclasses import dataclass

from stillhouse.reading.readers import Artifact
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_names


@dataclass(frozen=True, slots=True)
class StoredTokenizer:
    """What some tokens were made with.

    Attributes:
        digest: SHA-256 of its `tokenizer.json`.
        eos_token: the token between documents.
        vocab_size: largest id plus one.
        folder: URI of its artifact; None if that is no longer in the store.
    """

    digest: str
    eos_token: str
    vocab_size: int
    folder: str | None


def tokenizer_of(artifact: Artifact) -> StoredTokenizer:
    """The tokenizer that the rows of an artifact, or the tokens that they are from, were made with.

    Raises:
        ArtifactError: the tokens of a selection are no longer there.
    """
    store, settings = Store(artifact.store), artifact.tokens.settings["tokenizer"]
    wanted = settings["digest"], settings["eos_token"]
    for name in list_names(store.path("models")):
        model = store.find_manifest("models", name)
        totals = {} if model is None else model.totals
        if totals.get("role") == "tokenizer" and (totals["digest"], totals["eos_token"]) == wanted:
            return StoredTokenizer(*wanted, settings["vocab_size"], store.path("models", name))
    return StoredTokenizer(*wanted, settings["vocab_size"], None)
