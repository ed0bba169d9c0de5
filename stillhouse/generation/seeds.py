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

    Two parts: seeds as JSON, and the sorted hashes of the held-out text's word 13-grams. `info` has
    the `languages` of the seeds, if these decide what is kept.

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

        found, reasons = list[Item](), list[str]()
        for one in _documents(self.files):
            if isinstance(one, str):
                reasons.append(one)
            else:
                found.append(_seed(one))
        total = len(found) + len(reasons)
        limit = allowed_rows(self.files.source.max_bad_rows, total)
        if not found or len(reasons) > limit:
            why = f": {reasons[0]}" if reasons else ""
            raise InputError(
                f"`seeds`: {len(reasons):,} of {total:,} rows cannot be used (`max_bad_rows`){why}"
            )
        texts = (
            one.text
            for files in self.heldout
            for one in _documents(files)
            if isinstance(one, Document)
        )
        hashes = NgramIndex.from_texts(texts).hashes
        info: dict[str, Any] = {}
        if self.languages:
            answers = [seed.get("response", "") for seed in found]
            prompts = [seed["instruction"] for seed in found]
            info["languages"] = sorted(languages_of([*prompts, *answers]))
        seeds = pa.table({"item": [json.dumps(one, ensure_ascii=False) for one in found]})
        counts = {"seeds": len(found), "bad_rows": len(reasons)}
        return Output([seeds, pa.table({"hash": pa.array(hashes)})], counts, info)


def _documents(files: SeedFiles) -> Iterator[Document | str]:
    """Documents, and the reasons of rows that are none."""
    for number, uri in enumerate(files.uris):
        name = uri.rpartition("/")[2]
        for one in read_documents(uri, file=number, name=name, settings=files.source):
            yield one if isinstance(one, Document) else f"{uri}, row {one.row}: {one.reason}"


def _seed(document: Document) -> Item:
    """An instruction, and its response where the row has one."""
    seed: Item = {"id": document.id}
    if document.messages is not None:
        turns = {label(turn["role"]): turn["content"] for turn in reversed(document.messages)}
        pair = turns.get(_USER, ""), turns.get(_ASSISTANT, "")
    else:
        cut = document.prompt_chars or len(document.text)
        pair = document.text[:cut], document.text[cut:]
    seed["instruction"] = pair[0].strip()
    return seed | ({"response": pair[1].strip()} if pair[1].strip() else {})
