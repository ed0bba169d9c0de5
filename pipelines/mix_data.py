"""What a mix job reads: sources of arms and a target, listed, identified by content, encoded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

from stillhouse.errors import InputError, SpecError, StillhouseError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.preparation import Example, SourceTask, read_examples
from stillhouse.mixing.spec import ArmSource, MixSpec
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.given import find_input
from stillhouse.pipelines.tokenizer import task_tokenizer
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.reading.readers import Selection, open_selection
from stillhouse.spec import TokenizerTraining
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, absolute_uri, list_names
from stillhouse.text.records import list_documents, used_keys
from stillhouse.text.tasks import TokenizerHost
from stillhouse.text.tokenizer import train_tokenizer

_SAMPLE_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Source:
    """A source of arms, or the target.

    Attributes:
        settings: its section of the spec.
        files: of a source by path.
        selection: the selection instead.
        broken: why it cannot be used.
        uris, digests: of the files that hold its rows, in order; known once they are digested.
        tokenizer_folder: of the tokenizer of a selection's sequences; known then too.
    """

    settings: ArmSource
    files: tuple[FileInfo, ...] = ()
    selection: Selection | None = None
    broken: str | None = None
    uris: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    tokenizer_folder: str | None = None

    @property
    def name(self) -> str:
        """The arm's name in the spec, or that of its first file or folder."""
        first = self.settings.selection or self.settings.paths[0]
        stem = PurePosixPath(first.rstrip("/")).name.split(".")[0].strip("*")
        return self.settings.name or stem or first


@dataclass(frozen=True, slots=True)
class MixInputs:
    """Everything that a mix job reads, broken sources of arms included."""

    target: Source
    sources: tuple[Source, ...]

    @property
    def usable(self) -> list[Source]:
        """The target, and the sources that are not broken."""
        return [self.target, *(source for source in self.sources if source.broken is None)]

    @property
    def broken(self) -> dict[str, str]:
        """The reasons, by source."""
        return {s.name: s.broken for s in self.sources if s.broken is not None}


@dataclass(slots=True)
class ArmsMade:
    """The prepared arms and the target's part.

    Attributes:
        target: path of its part in the store.
        counts: rows by outcome, by arm.
        skipped: arms that were left out, and why.
    """

    tokenizer: TokenizerRef
    target: str
    arms: list[ArmPart] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def list_sources(spec: MixSpec) -> MixInputs:
    """The files of the target and of all sources of arms.

    Raises:
        InputError: nothing matches; for an arm only without `skip_bad_arms`.
    """
    sources: list[Source] = []
    for settings in spec.sources:
        try:
            sources.append(_list_source(spec, settings))
        except StillhouseError as error:
            source = Source(settings, broken=str(error))
            if not spec.skip_bad_arms:
                raise InputError(
                    f"arm `{source.name}`: {error}; or set `skip_bad_arms: true`"
                ) from error
            sources.append(source)
    shared = spec.target.model_dump(include={"path", "where", "format"})
    target = ArmSource(name="target", **shared)
    return MixInputs(_list_source(spec, target), tuple(sources))


def _list_source(spec: MixSpec, settings: ArmSource) -> Source:
    if settings.selection is None:
        return Source(settings, tuple(list_documents(settings.paths, settings.reader)))
    folder = find_input(Store(absolute_uri(spec.store)), settings.selection)
    return Source(settings, selection=open_selection(folder))


def open_sources(store: Store, inputs: MixInputs, *, remember: bool) -> MixInputs:
    """Digest all files; unchanged ones are not read.

    Raises:
        SpecError: the target is among the arms, by its files and rows.
    """
    files = list({f.uri: f for source in inputs.usable for f in source.files}.values())
    digests = digest_files(store, files, remember=remember)
    by_uri = {f.uri: d.sha256 for f, d in zip(files, digests, strict=True)}

    def opened(source: Source) -> Source:
        if source.selection is None:
            uris = tuple(file.uri for file in source.files)
            return replace(source, uris=uris, digests=tuple(by_uri[uri] for uri in uris))
        parts = source.selection.parts
        return replace(
            source,
            uris=tuple(part.uri for part in parts),
            digests=tuple(part.sha256 for part in parts),
            tokenizer_folder=_tokenizer_folder(source.selection),
        )

    target = opened(inputs.target)
    sources = tuple(s if s.broken else opened(s) for s in inputs.sources)
    for source in sources:
        _refuse_target(target, source)
    return MixInputs(target, sources)


def _refuse_target(target: Source, source: Source) -> None:
    mine, theirs = source.settings, target.settings.where
    named = (mine.by in theirs and theirs[mine.by] not in mine.exclude) if mine.by else True
    disjoint = any(mine.where.get(key, value) != value for key, value in theirs.items())
    if {*source.digests} & {*target.digests} and named and not disjoint:
        what = f"value {theirs[mine.by]!r} of `by: {mine.by}`" if mine.by else "its rows"
        raise SpecError(
            f"the target is among the arms: `{source.name}`, {what}: leave it out with `where` or "
            "`exclude`"
        )


def _tokenizer_digest(selection: Selection) -> str:
    return selection.manifest.settings["tokenizer"]["digest"]


def _tokenizer_folder(selection: Selection) -> str:
    """The folder of the tokenizer that a selection's sequences were made with.

    Raises:
        InputError: it is no longer in its store.
    """
    store = Store(selection.store)
    for name in list_names(store.path("models")):
        manifest = store.find_manifest("models", name)
        if manifest and manifest.totals.get("digest") == _tokenizer_digest(selection):
            return store.path("models", name)
    raise InputError(f"{selection.uri}: the tokenizer of its sequences is not in its store")


def prepare_arms(ctx: Context, spec: MixSpec, inputs: MixInputs) -> ArmsMade:
    """The tokenizer, a part of each arm, and the target's part.

    Raises:
        InputError: an arm that is empty or cannot be read, without `skip_bad_arms`.
        SpecError: fewer than two arms, two of one name, or the target among them.
    """
    tokenizer = _tokenizer(ctx, spec, inputs)
    target, *sources = [_source_task(spec, source, tokenizer) for source in inputs.usable]
    tasks = [replace(target, is_target=True, max_examples=None), *sources]
    host = TokenizerHost(tokenizer.path, tokenizer.eos_token)
    first, *receipts = perform(ctx, Step("arms", tasks, host))
    made = ArmsMade(tokenizer, _target_part(first), skipped=inputs.broken)
    for source, receipt in zip(inputs.usable[1:], receipts, strict=True):
        _add_arms(made, spec, source, receipt)
    _check_arms([part.name for part in made.arms], spec)
    return made


def _source_task(spec: MixSpec, source: Source, tokenizer: TokenizerRef) -> SourceTask:
    selection = source.selection
    return SourceTask(
        name=source.name,
        digests=_row_digests(source),
        where=source.settings.where,
        by=source.settings.by,
        selection=_tokenizer_digest(selection) if selection else None,
        tokenizer=tokenizer.digest,
        max_input=spec.max_input_tokens,
        max_target=spec.max_target_tokens,
        split_text=spec.model.kind == "encoder_decoder",
        max_examples=spec.max_examples,
        reader=source.settings.reader,
        uris=source.uris,
        selection_folder=source.tokenizer_folder,
    )


def _row_digests(source: Source) -> tuple[str, ...]:
    """The digests of the files, with what their folders' names say of their rows."""
    by = source.settings.by
    names = [*source.settings.where, *([by] if by else [])]
    pairs = [(d, used_keys(uri, names)) for d, uri in zip(source.digests, source.uris, strict=True)]
    return tuple(fingerprint([digest, keys]) if keys else digest for digest, keys in pairs)


def _target_part(receipt: Receipt) -> str:
    if receipt.info["broken"]:
        raise InputError(f"`target`: {receipt.info['broken']}")
    if not receipt.parts:
        raise InputError(
            "`target` has no usable row: check `target.where`, and that rows have `input` and "
            f"`target`; seen: {receipt.info['arms'][0]['counts']}"
        )
    return receipt.parts[0].path


def _add_arms(made: ArmsMade, spec: MixSpec, source: Source, receipt: Receipt) -> None:
    """Add a source's arms; with `by`, counts under "" are of rows without an arm."""

    def skip(name: str, why: str) -> None:
        if not spec.skip_bad_arms:
            raise InputError(f"arm `{name}`: {why}; repair it, or set `skip_bad_arms: true`")
        made.skipped[name] = why

    if receipt.info["broken"]:
        skip(source.name, receipt.info["broken"])
        return
    parts, by, arms = iter(receipt.parts), source.settings.by, receipt.info["arms"]
    without = [arm["counts"] for arm in arms if by and not arm["name"]]
    if by and len(arms) == len(without):
        skip(source.name, f"no usable row ({without or 'no rows'})")
    made.counts |= {f"{source.name} without `{by}`": counts for counts in without}
    for arm in arms:
        if by and not arm["name"]:
            continue
        part = next(parts) if arm["rows"] else None
        if arm["name"] in source.settings.exclude:
            continue
        if part is None:
            skip(arm["name"], f"no usable row ({arm['counts'] or 'no rows'})")
            continue
        made.arms.append(ArmPart(arm["name"], part.path, part.num_rows, part.sha256))
        made.counts[arm["name"]] = arm["counts"]


def _check_arms(arms: Sequence[str], spec: MixSpec) -> None:
    if len(arms) < 2:
        raise SpecError(f"`auxiliary` has {len(arms)} arm(s) {list(arms)}: mixing needs two")
    twice = sorted(name for name, count in Counter(arms).items() if count > 1)
    if twice:
        raise SpecError(f"`auxiliary` has several arms of one name: {twice}; rename them")
    target = sorted({*spec.target.where.values()} & {*arms})
    if target:
        raise SpecError(
            f"the target is among the arms: {target} is a value of `target.where` and the name of "
            "an arm: leave it out with `exclude`, or give the arm another `name`"
        )


def _tokenizer(ctx: Context, spec: MixSpec, inputs: MixInputs) -> TokenizerRef:
    sources = [source for source in inputs.usable if source.selection is None]
    what: list[object] = [
        [_row_digests(source), source.settings.where, *source.settings.reader_digest]
        for source in sources
    ]
    paths = [str(source.settings.path) for source in sources]
    return task_tokenizer(ctx, spec.tokenizer, what, paths, partial(_train_tokenizer, sources))


def _train_tokenizer(sources: Sequence[Source], settings: TokenizerTraining) -> bytes:
    """A tokenizer of the first rows of all sources, an equal share of text from each."""
    share = settings.num_bytes // len(sources)
    texts = (text for source in sources for text in _texts(source, share))
    return train_tokenizer(texts, vocab_size=settings.vocab_size)


def _texts(source: Source, num_bytes: int) -> Iterator[str]:
    taken = 0
    for uri in source.uris:
        try:
            settings = source.settings
            examples = read_examples(uri, where=settings.where, reader=settings.reader)
            for item in islice(examples, _SAMPLE_ROWS):
                if isinstance(item, Example):
                    text = f"{item.input}\n{item.target}".strip()
                    taken += len(text)
                    yield text
                if taken > num_bytes:
                    return
        except (StillhouseError, FileNotFoundError):
            return  # reported when the arm is prepared


def row_fates(made: ArmsMade) -> dict[str, int]:
    """Rows by outcome, over all arms."""
    total: Counter[str] = Counter()
    for counts in made.counts.values():
        total.update(counts)
    return dict(sorted(total.items()))
