"""Seeds of a generation, and the held-out text that nothing may share: read once, on a worker."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError
from stillhouse.generation.asking import Item
from stillhouse.generation.screening import languages_of
from stillhouse.settings import allowed_rows
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.documents import Document, read_documents
from stillhouse.text.duplicates import document_hash
from stillhouse.text.values import label

_USER, _ASSISTANT = "user", "assistant"


@dataclass(frozen=True, slots=True)
class SeedFiles:
    """The files of a source of documents, by content."""

    source: Place[DataSource]
    settings: dict[str, Any]
    digests: tuple[str, ...]
    uris: Place[tuple[str, ...]]


@dataclass(frozen=True)
class SeedsTask(Task):
    """Read seeds and the held-out text.

    Three parts: seeds as JSON; the hashes of the held-out text's word 13-grams, and those of its
    whole instructions. `info` has the `languages` of the seeds, if these decide what is kept.

    Attributes:
        files: of the seeds.
        heldout: sources that nothing may share 13-grams with.
        languages: whether they are told.
    """

    KIND = "drafts"

    files: SeedFiles
    heldout: tuple[SeedFiles, ...]
    languages: bool

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """Raises InputError for too many bad rows, or no seed."""
        from stillhouse.selection.contamination import NgramIndex

        seeds, counts = _read("seeds", self.files)
        if not seeds:
            raise InputError("`seeds`: no row has an instruction")
        heldout = [
            row
            for number, files in enumerate(self.heldout)
            for row in _read(f"decontaminate.{number}", files)[0]
        ]
        hashes = NgramIndex.from_texts(text for row in heldout for text in _texts(row)).hashes
        whole = sorted({document_hash(row["instruction"]) for row in heldout})
        info: dict[str, Any] = {}
        if self.languages:
            info["languages"] = sorted(languages_of([t for seed in seeds for t in _texts(seed)]))
        tables = [
            pa.table({"item": [json.dumps(one, ensure_ascii=False) for one in seeds]}),
            pa.table({"hash": pa.array(hashes)}),
            pa.table({"text": pa.array(whole, pa.binary(16))}),
        ]
        return Output(tables, counts, info)


def _read(key: str, files: SeedFiles) -> tuple[list[Item], dict[str, int]]:
    """Rows with an instruction, and counts of `seeds` and `bad_rows`.

    Raises:
        InputError: more bad rows than allowed.
    """
    found, reasons = list[Item](), list[str]()
    for one in _documents(files):
        row = one if isinstance(one, str) else _seed(one)
        if isinstance(row, str):
            reasons.append(row)
        else:
            found.append(row)
    total = len(found) + len(reasons)
    if len(reasons) > allowed_rows(files.source.max_bad_rows, total):
        raise InputError(
            f"`{key}`: {len(reasons):,} of {total:,} rows cannot be used (`max_bad_rows`): "
            f"{reasons[0]}"
        )
    return found, {"seeds": len(found), "bad_rows": len(reasons)}


def _texts(row: Item) -> list[str]:
    """Instruction and response, and both together."""
    parts = [row["instruction"], *([row["response"]] if "response" in row else [])]
    return parts if len(parts) == 1 else [*parts, " ".join(parts)]


def _documents(files: SeedFiles) -> Iterator[Document | str]:
    """Documents, and the reasons of rows that are none."""
    for number, uri in enumerate(files.uris):
        name = uri.rpartition("/")[2]
        for one in read_documents(uri, file=number, name=name, settings=files.source):
            yield one if isinstance(one, Document) else f"{uri}, row {one.row}: {one.reason}"


def _seed(document: Document) -> Item | str:
    """An instruction, and its response where the row has one; or why it is none."""
    seed: Item = {"id": document.id}
    if document.messages is not None:
        turns = {label(turn["role"]): turn["content"] for turn in reversed(document.messages)}
        pair = turns.get(_USER, ""), turns.get(_ASSISTANT, "")
    else:
        cut = document.prompt_chars or len(document.text)
        pair = document.text[:cut], document.text[cut:]
    if not pair[0].strip():
        return f"{document.id}: no instruction"
    seed["instruction"] = pair[0].strip()
    return seed | ({"response": pair[1].strip()} if pair[1].strip() else {})
