"""The tokenizer: trained on a random part of the pool, or loaded; kept in the store either way."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.pipelines.pins import pinned
from stillhouse.pipelines.scan import Scan
from stillhouse.pipelines.steps import run_tasks
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.spec import SelectSpec, TokenizerSettings, TokenizerTraining
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


def tokenizer(ctx: Context, spec: SelectSpec, pool: Scan) -> TokenizerRef:
    """Train or load the tokenizer, and put it in the store where every worker finds it.

    Raises:
        ModelError: a path that holds no tokenizer.
    """
    return scanned_tokenizer(ctx, spec.tokenizer, spec.pool.paths, [pool])


def scanned_tokenizer(
    ctx: Context, settings: TokenizerSettings, paths: Sequence[str], scans: Sequence[Scan]
) -> TokenizerRef:
    """The tokenizer of some settings: given, or trained on documents that were scanned.

    Args:
        paths: of the documents, by which a pin is known.
        scans: of them.
    """
    if settings.train is None:
        assert settings.path is not None
        return given_tokenizer(ctx, settings.path, settings.eos_token, settings.bos)
    training = settings.train
    tasks = [task.fingerprint for scan in scans for task in scan.tasks]
    wanted = fingerprint(["tokenizer", TOKENIZER_VERSION, training.model_dump(), tasks])
    key = ["tokenizer", settings.model_dump(exclude={"pin", "bos", "from_"}), paths]
    make = partial(_trained, ctx, wanted, training, scans)
    return _ref(ctx, pinned(ctx, "tokenizer", key, settings.pin, wanted, make))


def _ref(ctx: Context, manifest: Manifest, bos_id: int | None = None) -> TokenizerRef:
    return TokenizerRef(
        path=ctx.store.path("models", manifest.fingerprint),
        eos_token=manifest.totals["eos_token"],
        digest=manifest.totals["digest"],
        vocab_size=manifest.totals["vocab_size"],
        bos_id=bos_id,
    )


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
    name = fingerprint(["tokenizer", loaded.digest, loaded.eos_token, *added])
    found = ctx.store.find_manifest("models", name)
    if found is None and ctx.dry:
        raise Unfinished("tokenizer")
    return _ref(ctx, found or _put(ctx.store, name, loaded, {"path": path}), bos_id)


def _trained(
    ctx: Context, name: str, training: TokenizerTraining, scans: Sequence[Scan]
) -> Manifest:
    with ctx.step("tokenizer", total=1, reused=0, unit="bytes") as advance:
        tasks, share = _sample(scans, training.num_bytes)
        work = partial(_train, training.vocab_size, share)
        made = next(run_tasks(ctx, work, [tasks]))
        advance(1, min(training.num_bytes, sum(scan.counts["chars"] for scan in scans)))
    return _put(ctx.store, name, _trained_one(made), training.model_dump())


def _trained_one(content: bytes) -> Tokenizer:
    return make_tokenizer(content, None, place="the trained tokenizer")


def _sample(scans: Sequence[Scan], num_bytes: int) -> tuple[list[ScanTask], float]:
    """A few units in keyed order, and the share of their documents to train on."""
    pairs = (pair for scan in scans for pair in zip(scan.tasks, scan.receipts, strict=True))
    order = sorted(pairs, key=lambda pair: pair[0].fingerprint)
    tasks: list[ScanTask] = []
    chars = 0
    for task, receipt in order:
        if chars > 4 * num_bytes:
            break
        tasks.append(task)
        chars += receipt.counts.get("chars", 0)
    return tasks, min(1.0, num_bytes / max(chars, 1))


def _train(vocab_size: int, share: float, tasks: list[ScanTask]) -> bytes:
    return train_tokenizer(_texts(tasks, share), vocab_size=vocab_size)


def _texts(tasks: list[ScanTask], share: float) -> Iterator[str]:
    for task in tasks:
        for item in read_unit(task):
            if isinstance(item, Document) and in_sample(document_hash(item.text), share):
                yield item.text


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
        },
    )


def task_tokenizer(
    ctx: Context,
    settings: TokenizerSettings,
    what: list[object],
    paths: list[str],
    work: Callable[[TokenizerTraining], bytes],
) -> TokenizerRef:
    """The tokenizer of a mix job: by path, or trained by `work` in a Ray task.

    Args:
        what: JSON values that decide what it is trained on.
        paths: of the data, by which a pin is known.
        work: makes `tokenizer.json`; small and picklable.
    """
    if settings.train is None:
        assert settings.path is not None
        return given_tokenizer(ctx, settings.path, settings.eos_token, settings.bos)
    training = settings.train
    wanted = fingerprint(["tokenizer", TOKENIZER_VERSION, training.model_dump(), what])
    key = ["tokenizer", settings.model_dump(exclude={"pin", "bos", "from_"}), paths]

    def make() -> Manifest:
        with ctx.step("tokenizer", total=1, reused=0, unit="bytes") as advance:
            made = next(run_tasks(ctx, work, [training]))
            advance(1, training.num_bytes)
        return _put(ctx.store, wanted, _trained_one(made), training.model_dump())

    return _ref(ctx, pinned(ctx, "tokenizer", key, settings.pin, wanted, make))
