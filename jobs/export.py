"""`stillhouse export`: a selection in another tool's form, a shard at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

from stillhouse.errors import ArtifactError, SpecError, StorageError
from stillhouse.export.shards import (
    PROVENANCE,
    Exported,
    Format,
    Shard,
    ShardReceipt,
    cut_shards,
    finished_shards,
    write_shard,
)
from stillhouse.jobs.cluster import cluster
from stillhouse.pipelines.context import Listener
from stillhouse.pipelines.ordered_tasks import map_in_tasks
from stillhouse.reading.readers import Selection, open_selection
from stillhouse.reading.tokenizer_of import tokenizer_of
from stillhouse.spec import ComputeSettings
from stillhouse.storage.commit import create_or_adopt, replace
from stillhouse.storage.filesystem import (
    absolute_uri,
    join,
    known_options,
    list_names,
    read_bytes,
    use_options,
)
from stillhouse.storage.sealed import seal, unseal

RECORD = "export.json"
VERSION = 1
_LARGE_BYTES = 8 << 30
_THREADS = 2
_STEP = "export"
_Write = Callable[[Shard], ShardReceipt]


def export_selection(
    uri: str,
    to: str,
    form: Format,
    shown: Listener,
    shard_tokens: int | None = None,
    large_bytes: int = _LARGE_BYTES,
) -> dict[str, Any]:
    """Write a selection as files of a format; go on where an interrupted export stopped.

    A selection of `large_bytes` and more is written in Ray tasks (of RAY_ADDRESS, else on this
    machine), a smaller one in this process.

    Args:
        uri: of the selection, the run that made it, or `STORE#NAME`.
        to: the folder or URI of the export: new, empty, or the same export before.
        shard_tokens: how many tokens a shard has; None: as the format likes.

    Returns:
        The object that `export --json` prints.

    Raises:
        ArtifactError: no such selection, or it is empty. SpecError: the folder holds something
        else, or the format takes no documents. StorageError: workers write where this process
        cannot read.
    """
    selection, to = open_selection(uri), absolute_uri(to)
    source = _source(selection)
    if source.grain == "documents" and not form.takes_documents:
        raise SpecError(
            f"`--format {form.name}` is of packed tokens, and {uri} keeps whole documents "
            "(`selection.grain: documents`): give `--format text`, `mds` or `hub`"
        )
    if f"{to}/".startswith(f"{selection.store}/"):
        raise SpecError(f"`--to {to}` is in the store {selection.store}: give a folder of its own")
    shards = cut_shards(selection.parts, shard_tokens or form.shard_tokens)
    if not shards:
        raise ArtifactError(f"{uri} is empty: there is nothing to export")
    asked = {
        "version": VERSION,
        "selection": source.fingerprint,
        "format": form.name,
        "settings": getattr(form, "files", None),
        "samples": [shard.start for shard in shards],
    }
    done = _claim(to, asked)
    found = finished_shards(to)
    missing = [shard for shard in shards if shard.number not in found]
    if done is not None and not missing:
        return done | {"to": to, "reused": len(shards)}
    started = perf_counter()
    shown.begin(_STEP, len(shards), len(found), "tokens")
    write = partial(write_shard, source, form, to)
    large = sum(part.num_bytes for part in selection.parts) >= large_bytes
    made = _in_tasks(write, missing, [source.store, to]) if large else _here(write, missing)
    for receipt in made:
        found[receipt.number] = receipt
        shown.advance(_STEP, 1, receipt.num_tokens)
    if large and missing and len(finished_shards(to)) < len(shards):
        raise StorageError(
            f"workers on other machines wrote to {to}, which this one does not see: give `--to` a "
            "URI or a shared folder"
        )
    receipts = [found[shard.number] for shard in shards]
    for name, content in form.finish(source, to, receipts).items():
        replace(join(to, name), content)
    result = _result(source, form, receipts)
    replace(join(to, RECORD), seal(asked | {"complete": result}, indent=1))
    shown.end(_STEP, perf_counter() - started)
    return result | {"to": to, "reused": len(shards) - len(missing)}


def _source(selection: Selection) -> Exported:
    manifest, tokenizer = selection.manifest, tokenizer_of(selection)
    settings = manifest.settings
    budgets = ("tau", "fraction", "num_tokens", "min_score")
    about = {"selection": selection.uri, "rule": settings["rule"]}
    about |= {name: settings[name] for name in budgets if settings.get(name) is not None}
    about |= {"lowest score": selection.threshold, "fingerprint": manifest.fingerprint}
    return Exported(
        uri=selection.uri,
        store=selection.store,
        fingerprint=manifest.fingerprint,
        grain=settings["grain"],
        sequence_length=selection.tokens.settings["sequence_length"],
        vocab_size=tokenizer.vocab_size,
        eos_token=tokenizer.eos_token,
        tokenizer=tokenizer.folder,
        about=about,
    )


def _claim(to: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Write the record of an export that begins, or check that the one there is the same.

    Returns:
        What the record says of the export, if it was complete before.

    Raises:
        SpecError: the folder holds something else.
    """
    names = list_names(to)
    if names and RECORD not in names:
        raise SpecError(
            f"`--to {to}` holds other files ({', '.join(names[:3])}): give a new or empty folder"
        )
    record = join(to, RECORD)
    content = create_or_adopt(record, seal(asked, indent=1)) if not names else read_bytes(record)
    before = unseal(content, record)
    done = before.pop("complete", None)
    different = [name for name in asked if before.get(name) != asked[name]]
    if different:
        raise SpecError(
            f"`--to {to}` holds another export (its {different[0]} differs): give another folder, "
            "or remove it"
        )
    return done


def _here(write: _Write, shards: list[Shard]) -> Iterable[ShardReceipt]:
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(write, shards)


def _in_tasks(write: _Write, shards: list[Shard], uris: list[str]) -> Iterable[ShardReceipt]:
    """In workers that have the options of the file systems of `uris`."""
    options: dict[str, str] = {}
    for uri in uris:
        options |= use_options(uri, known_options(uri))
    with cluster(ComputeSettings(), options, 0):
        yield from map_in_tasks(write, shards)


def _result(source: Exported, form: Format, receipts: list[ShardReceipt]) -> dict[str, Any]:
    """What the record says of a complete export; nothing of where it lies or how it was made."""
    files = {
        name: {"bytes": receipt.bytes[name], "sha256": digest}
        for receipt in receipts
        for name, digest in receipt.digests.items()
    }
    size = sum(
        count
        for receipt in receipts
        for name, count in receipt.bytes.items()
        if not name.startswith(f"{PROVENANCE}/")
    )
    return {
        "format": form.name,
        "selection": source.uri,
        "grain": source.grain,
        "sequence_length": source.sequence_length if source.grain == "sequences" else None,
        "vocab_size": source.vocab_size,
        "eos_token": source.eos_token,
        "num_samples": sum(receipt.num_samples for receipt in receipts),
        "num_tokens": sum(receipt.num_tokens for receipt in receipts),
        "bytes": size,
        "shards": len(receipts),
        "files": files,
    }
