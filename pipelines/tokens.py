"""Scanned documents to packed sequences: drop what must not be packed, tokenise and pack."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stillhouse.errors import ArtifactError, InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.duplicates import Drops, find_duplicates, split_target
from stillhouse.pipelines.scan import Scan, ScannedJob
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.filesystem import list_names
from stillhouse.text.tasks import PackTask, TokenizerHost, UnitFile


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A tokens artifact, and the raw files of each part's unit."""

    manifest: Manifest
    files: list[tuple[UnitFile, ...]]

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.manifest.totals)


@dataclass(frozen=True, slots=True)
class TokenizerRef:
    """A tokenizer in the store.

    Attributes:
        bos_id: stands before every sequence that is scored or trained on; not in stored tokens.
        chat: digest of its chat template, if it has one.
        mask_id: of its mask token, if it has one.
    """

    path: str
    eos_token: str
    digest: str
    vocab_size: int
    bos_id: int | None = None
    chat: str = ""
    mask_id: int | None = None

    @property
    def num_extra(self) -> int:
        """Positions that a model needs in addition to those of a sequence."""
        return int(self.bos_id is not None)


@dataclass(frozen=True, slots=True)
class Packing:
    """A scanned source, what is dropped from it, and the tasks that pack the rest."""

    scanned: Scan
    drops: Drops
    tasks: list[PackTask]


@dataclass(frozen=True, slots=True)
class Packings:
    """What a select job packs; targets and held-out documents by the target's key."""

    pool: Packing
    targets: dict[str, Packing]
    heldouts: dict[str, Packing]

    @property
    def all(self) -> list[Packing]:
        return [self.pool, *self.targets.values(), *self.heldouts.values()]


def without_dropped(
    ctx: Context, spec: SelectSpec, scanned: ScannedJob, tokenizer: TokenizerRef
) -> Packings:
    """Pool, targets and held-out documents, each without what it drops.

    Later copies of a text are dropped (`deduplicate`); a target that has no held-out files of its
    own is split in two by groups of copies.
    """

    def packed(scan: Scan, drops: Drops) -> Packing:
        tasks = pack_tasks(ctx.store, scan, drops, tokenizer, spec.sequence_length)
        return Packing(scan, drops, tasks)

    def deduplicated(scan: Scan, what: str) -> Packing:
        wanted = spec.deduplicate
        return packed(scan, find_duplicates(ctx, what, scan.receipts) if wanted else Drops())

    targets: dict[str, Packing] = {}
    heldouts: dict[str, Packing] = {}
    if ctx.packed is None:
        pool = deduplicated(scanned.pool, "")
    else:
        whole = packed(scanned.pool, Drops())
        dropped = [ctx.packed[scan.fingerprint] for scan in scanned.pool.tasks]
        tasks = [replace(t, dropped=d) for t, d in zip(whole.tasks, dropped, strict=True)]
        pool = replace(whole, tasks=tasks)
    for key, target in scanned.targets.items():
        if key in scanned.heldouts:
            targets[key] = deduplicated(target, f" in {key}")
            heldouts[key] = deduplicated(scanned.heldouts[key], f" in {key}.heldout")
        else:
            share = spec.domains[key].heldout
            assert isinstance(share, float)
            train, held = split_target(ctx, target.receipts, share, spec.deduplicate)
            targets[key], heldouts[key] = packed(target, train), packed(target, held)
    return Packings(pool, targets, heldouts)


def pack_tasks(
    store: Store,
    scanned: Scan,
    drops: Drops,
    tokenizer: TokenizerRef,
    sequence_length: int,
) -> list[PackTask]:
    """A packing task for each unit, with what is left out of it."""
    words = tokenizer.digest
    if scanned.inputs.source.columns.messages is not None:
        words = fingerprint([words, "chat", tokenizer.chat])
    return [
        PackTask(
            unit=unit,
            dropped=digest,
            tokenizer=words,
            eos_token=tokenizer.eos_token,
            sequence_length=sequence_length,
            part_rows=max(1, scanned.inputs.part_tokens // sequence_length),
            number=number,
            drops=listed and listed.under(store.uri),
        )
        for number, unit in enumerate(scanned.tasks)
        for digest, listed in [drops.of(number)]
    ]


def tokenise(
    ctx: Context,
    sequence_length: int,
    packing: Sequence[Packing],
    tokenizer: TokenizerRef,
    names: Sequence[str],
) -> list[Tokenised]:
    """Tokenise and pack several sources in one step; `names` are their keys in the spec.

    Raises:
        InputError: a source whose documents are together shorter than one sequence.
    """
    host = TokenizerHost(tokenizer.path, tokenizer.eos_token)
    tasks = [task for group in packing for task in group.tasks]
    receipts = perform(ctx, Step("tokens", tasks, host, ctx.compute.packers))
    made: list[Tokenised] = []
    for what, group in zip(names, packing, strict=True):
        mine, receipts = receipts[: len(group.tasks)], receipts[len(group.tasks) :]
        made.append(_manifest(ctx.store, what, group, mine, tokenizer, sequence_length))
    ctx.work["tokens"].tokens = sum(one.manifest.num_tokens for one in made)
    return made


def tokenise_job(
    ctx: Context, sequence_length: int, packings: Packings, tokenizer: TokenizerRef
) -> tuple[Tokenised, dict[str, Tokenised], Tokenised]:
    """Tokenise and pack a select job's sources: the pool, the targets by key, and all held-out
    documents together.

    Raises:
        InputError: as `tokenise`.
    """
    keys = [*packings.targets]
    names = ["pool", *keys, *(f"{key}.heldout" for key in keys)]
    pool, *others = tokenise(ctx, sequence_length, packings.all, tokenizer, names)
    targets, heldouts = others[: len(keys)], others[len(keys) :]
    return pool, dict(zip(keys, targets, strict=True)), together(ctx.store, heldouts)


def together(store: Store, made: Sequence[Tokenised]) -> Tokenised:
    """Several tokens artifacts of one tokenizer as one, without copying anything."""
    if len(made) == 1:
        return made[0]
    manifests = [one.manifest for one in made]
    units = [unit for one in manifests for unit in one.inputs["units"]]
    counts = sum((one.counts for one in made), Counter[str]())
    drops = [drop for one in manifests for drop in one.inputs["drops"]]
    whole = Manifest(
        kind="tokens",
        fingerprint=fingerprint(["tokens", [unit["task"] for unit in units]]),
        parts=tuple(part for one in manifests for part in one.parts),
        inputs={"units": units, "drops": drops},
        settings=manifests[0].settings,
        totals=dict(sorted(counts.items())),
    )
    return Tokenised(store.put_manifest(whole), [files for one in made for files in one.files])


def _manifest(
    store: Store,
    what: str,
    packing: Packing,
    receipts: list[Receipt],
    tokenizer: TokenizerRef,
    sequence_length: int,
) -> Tokenised:
    scanned = packing.scanned
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.counts)
    if not counts["tokens"]:
        lost = "; ".join(f"{n:,} dropped: {why}" for why, n in dropped_documents(counts).items())
        raise InputError(
            f"`{what}` ({scanned.inputs.source.path!r}) has {counts['documents']:,} documents"
            f"{f' ({lost})' if lost else ''} of "
            f"{counts['remainder_tokens']:,} tokens in all, less than one sequence of "
            f"{sequence_length}: give more text, or lower `sequence_length`"
        )
    manifest = Manifest(
        kind="tokens",
        fingerprint=fingerprint(["tokens", [receipt.task for receipt in receipts]]),
        parts=tuple(part for receipt in receipts for part in receipt.parts),
        inputs={
            "units": [
                {
                    "task": receipt.task,
                    "scan": task.fingerprint,
                    "dropped": packed.dropped,
                    "parts": len(receipt.parts),
                    "labels": receipt.info.get("labels"),
                    "files": [
                        {"uri": f.uri, "sha256": f.digest, "rows": f.rows} for f in task.files
                    ],
                }
                for task, packed, receipt in zip(
                    scanned.tasks, packing.tasks, receipts, strict=True
                )
            ],
            "drops": list(packing.drops.tasks),
        },
        settings={
            "tokenizer": {
                "path": None,
                "eos_token": tokenizer.eos_token,
                "digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
            },
            "sequence_length": sequence_length,
            "reading": scanned.inputs.source.identity(),
        },
        totals=dict(sorted(counts.items())),
    )
    files = [
        task.files
        for task, receipt in zip(scanned.tasks, receipts, strict=True)
        for _ in receipt.parts
    ]
    return Tokenised(store.put_manifest(manifest), files)


def dropped_documents(counts: Mapping[str, int]) -> dict[str, int]:
    """How many documents packing dropped, by reason."""
    mark = "dropped: "
    return {k.removeprefix(mark): n for k, n in sorted(counts.items()) if k.startswith(mark)}


@dataclass(frozen=True, slots=True)
class PackedUnit:
    """What was left out of a unit (a digest), and how many tokens it has."""

    dropped: str
    num_tokens: int


def packed_units(
    store: Store, tokenizer: TokenizerRef, sequence_length: int, part_tokens: int
) -> dict[str, PackedUnit]:
    """The units in the store that were packed with a tokenizer, by the fingerprint of their scan.

    What a unit drops depends on the other units; if it was packed several times, any will do.
    """
    part_rows = max(1, part_tokens // sequence_length)
    found: dict[str, PackedUnit] = {}
    for name in sorted(set(list_names(store.path("tokens"))) - {"parts", "receipts"}):
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
