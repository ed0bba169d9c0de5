"""The tokenizer: trained on a random part of the pool, or given; kept in the store either way."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.pipelines.context import Context, Unfinished, pinned, run_tasks
from stillhouse.pipelines.scan import Scan
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.spec import TokenizerSettings, TokenizerTraining
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.folders import put_folder
from stillhouse.text.documents import Document
from stillhouse.text.duplicates import document_hash
from stillhouse.text.tasks import ScanTask, read_unit
from stillhouse.text.tokenizer import (
    BosSetting,
    Tokenizer,
    in_sample,
    load_tokenizer,
    make_tokenizer,
    save_pretrained,
    train_tokenizer,
)

TOKENIZER_VERSION = 1
_MAX_LENGTH = 1_000_000


def given_tokenizer(
    ctx: Context, path: str, eos_token: str | None, bos: BosSetting
) -> TokenizerRef:
    """A tokenizer by path, in the store.

    Raises:
        ModelError: no tokenizer there, or no BOS where one is asked for.
    """
    loaded = load_tokenizer(path, eos_token)
    bos_id = loaded.bos_id(bos)
    added = [loaded.bos_token] if loaded.adds_bos else []
    chat = [] if loaded.chat_template is None else [["chat", loaded.chat_template]]
    masking = [["masking", loaded.masking]] if loaded.masking else []
    name = fingerprint(["tokenizer", loaded.digest, loaded.eos_token, *added, *chat, *masking])
    found = ctx.store.find_manifest("models", name)
    if found is None and ctx.dry:
        raise Unfinished("tokenizer")
    ref = _ref(ctx, found or _put(ctx.store, name, loaded, {"path": path}), bos_id)
    return replace(ref, mask_id=loaded.mask_id)


def scanned_tokenizer(
    ctx: Context, settings: TokenizerSettings, paths: Sequence[str], scans: Sequence[Scan]
) -> TokenizerRef:
    """`task_tokenizer`, trained on a random sample of documents that were scanned."""
    names = [task.fingerprint for scan in scans for task in scan.tasks]
    num_bytes = 0 if settings.train is None else settings.train.num_bytes
    work = partial(_train, *_sample(scans, num_bytes))
    return task_tokenizer(ctx, settings, names, paths, work)


def task_tokenizer(
    ctx: Context,
    settings: TokenizerSettings,
    data: object,
    paths: Sequence[str],
    train: Callable[[TokenizerTraining], bytes],
) -> TokenizerRef:
    """The tokenizer of a job: by path, or trained on a worker.

    Args:
        data: JSON values that identify what it is trained on.
        paths: of the data, which identify its pin.
        train: makes `tokenizer.json`; small and picklable.
    """
    if settings.train is None:
        assert settings.path is not None
        return given_tokenizer(ctx, settings.path, settings.eos_token, settings.bos)
    training = settings.train
    wanted = fingerprint(["tokenizer", TOKENIZER_VERSION, training.model_dump(), data])
    key = ["tokenizer", settings.model_dump(exclude={"pin", "bos", "from_"}), paths]

    def make() -> Manifest:
        with ctx.step("tokenizer", total=1, reused=0, unit="bytes") as advance:
            content = next(run_tasks(ctx, train, [training]))
            advance(1, training.num_bytes)
        made = make_tokenizer(content, None, place="the trained tokenizer")
        return _put(ctx.store, wanted, made, training.model_dump())

    return _ref(ctx, pinned(ctx, "tokenizer", key, settings.pin, wanted, make))


def _ref(ctx: Context, manifest: Manifest, bos_id: int | None = None) -> TokenizerRef:
    return TokenizerRef(
        path=ctx.store.path("models", manifest.fingerprint),
        eos_token=manifest.totals["eos_token"],
        digest=manifest.totals["digest"],
        vocab_size=manifest.totals["vocab_size"],
        bos_id=bos_id,
        chat=manifest.totals.get("chat", ""),
    )


def _put(store: Store, name: str, made: Tokenizer, settings: dict[str, object]) -> Manifest:
    return put_folder(
        store,
        name,
        lambda folder: save_pretrained(made, str(folder), model_max_length=_MAX_LENGTH),
        inputs={},
        settings=settings,
        totals={
            "role": "tokenizer",
            "eos_token": made.eos_token,
            "vocab_size": made.vocab_size,
            "digest": made.digest,
            **({"chat": sha256(made.chat_template.encode())} if made.chat_template else {}),
        },
    )


def _sample(scans: Sequence[Scan], num_bytes: int) -> tuple[list[ScanTask], float]:
    """A few units in keyed order, and the share of their documents to train on."""
    pairs = (pair for scan in scans for pair in zip(scan.tasks, scan.receipts, strict=False))
    tasks: list[ScanTask] = []
    chars = 0
    for task, receipt in sorted(pairs, key=lambda pair: pair[0].fingerprint):
        if chars > 4 * num_bytes:
            break
        tasks.append(task)
        chars += receipt.counts.get("chars", 0)
    return tasks, min(1.0, num_bytes / max(chars, 1))


def _train(tasks: list[ScanTask], share: float, settings: TokenizerTraining) -> bytes:
    def texts() -> Iterator[str]:
        for task in tasks:
            for item in read_unit(task):
                if isinstance(item, Document) and in_sample(document_hash(item.text), share):
                    yield item.text

    return train_tokenizer(texts(), vocab_size=settings.vocab_size)
