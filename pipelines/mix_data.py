"""What a mix job reads: sources of arms and a target, listed, known by content, encoded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

from stillhouse.errors import InputError, SpecError, StillhouseError
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.examples import Example, read_examples
from stillhouse.mixing.mixer import check_arms
from stillhouse.mixing.preparation import SourceTask
from stillhouse.mixing.spec import ArmSource, MixSpec
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.inputs import list_documents
from stillhouse.pipelines.named import find_input
from stillhouse.pipelines.steps import Step, perform
from stillhouse.pipelines.tokenizer import task_tokenizer
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.reading.readers import Selection, open_selection
from stillhouse.spec import TokenizerTraining
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, absolute_uri, list_names
from stillhouse.text.tasks import TokenizerHost
from stillhouse.text.tokenizer import train_tokenizer

_SAMPLE_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Source:
    """A source of arms, or the target; `broken` says why it cannot be used.

    Attributes:
        asked: as the spec has it.
        files: of a source by path; `selection`: URI of a selection instead.
        uris, digests: of what holds its rows, in order; once it is opened.
        selection_tokenizer: digest and folder of the tokenizer of a selection's sequences.
    """

    asked: ArmSource
    files: tuple[FileInfo, ...] = ()
    selection: str | None = None
    broken: str | None = None
    uris: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    selection_tokenizer: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """Of the arm; of the source where `by` makes several."""
        return source_name(self.asked)


@dataclass(frozen=True, slots=True)
class MixInputs:
    """Everything that a mix job reads; broken sources of arms too."""

    target: Source
    sources: tuple[Source, ...]

    @property
    def usable(self) -> list[Source]:
        """The target, and the sources that are not broken."""
        return [self.target, *(source for source in self.sources if source.broken is None)]

    @property
    def broken(self) -> dict[str, str]:
        """The others, and why."""
        return {s.name: s.broken for s in self.sources if s.broken is not None}


@dataclass(slots=True)
class ArmsMade:
    """The prepared arms, the target's part, and what became of rows.

    `counts`: by arm, rows by what became of them. `skipped`: arms that were left out, and why.
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
    target = ArmSource(name="target", path=spec.target.path, where=spec.target.where)
    sources: list[Source] = []
    for asked in spec.sources:
        try:
            sources.append(_listed(spec, asked))
        except StillhouseError as error:
            if not spec.skip_bad_arms:
                raise InputError(
                    f"arm `{source_name(asked)}`: {error}; or set `skip_bad_arms: true`"
                ) from error
            sources.append(Source(asked, broken=str(error)))
    return MixInputs(_listed(spec, target), tuple(sources))


def _listed(spec: MixSpec, asked: ArmSource) -> Source:
    if asked.selection is not None:
        found = find_input(Store(absolute_uri(spec.store)), asked.selection)
        return Source(asked, selection=open_selection(found).uri)
    return Source(asked, tuple(list_documents(asked.paths)))


def source_name(asked: ArmSource) -> str:
    """The name that the spec gives, or that of the first path."""
    first = asked.selection or asked.paths[0]
    return asked.name or PurePosixPath(first.rstrip("/")).name.split(".")[0].strip("*") or first


def open_sources(store: Store, inputs: MixInputs, *, remember: bool) -> MixInputs:
    """Digest all files; unchanged ones are not read.

    Raises:
        SpecError: an arm's files and rows are the target's.
    """
    files = list({f.uri: f for source in inputs.usable for f in source.files}.values())
    digests = digest_files(store, files, remember=remember)
    by_uri = {f.uri: d.sha256 for f, d in zip(files, digests, strict=True)}
    target = _opened(inputs.target, by_uri)
    sources = [s if s.broken is not None else _opened(s, by_uri) for s in inputs.sources]
    for source in sources:
        _refuse_target(target, source)
    return MixInputs(target, tuple(sources))


def _opened(source: Source, digests: dict[str, str]) -> Source:
    if source.selection is None:
        uris = tuple(f.uri for f in source.files)
        return replace(source, uris=uris, digests=tuple(digests[uri] for uri in uris))
    selection = Selection(source.selection)
    return replace(
        source,
        uris=tuple(part.uri for part in selection.parts),
        digests=tuple(part.sha256 for part in selection.parts),
        selection_tokenizer=_tokenizer_of(selection),
    )


def _tokenizer_of(selection: Selection) -> tuple[str, str]:
    """Digest and folder of the tokenizer that a selection's sequences were made with.

    Raises:
        InputError: its store has it no more.
    """
    digest = selection.manifest.settings["tokenizer"]["digest"]
    store = Store(selection.store)
    for name in list_names(store.path("models")):
        manifest = store.find_manifest("models", name)
        if manifest is not None and manifest.totals.get("digest") == digest:
            return digest, store.path("models", name)
    raise InputError(f"{selection.uri}: the tokenizer of its sequences is not in its store")


def _refuse_target(target: Source, source: Source) -> None:
    mine, theirs = source.asked, target.asked.where
    named = (mine.by in theirs and theirs[mine.by] not in mine.exclude) if mine.by else True
    disjoint = any(mine.where.get(key, value) != value for key, value in theirs.items())
    if {*source.digests} & {*target.digests} and named and not disjoint:
        what = f"value {theirs[mine.by]!r} of `by: {mine.by}`" if mine.by else "its rows"
        raise SpecError(
            f"the target is among the arms: `{source.name}`, {what}: leave it out with `where` or "
            "`exclude`"
        )


def prepare_arms(ctx: Context, spec: MixSpec, inputs: MixInputs) -> ArmsMade:
    """Tokenizer, a part of each arm, and the target's part.

    Raises:
        InputError: an arm that is empty or cannot be read, without `skip_bad_arms`.
        SpecError: fewer than two arms, two of one name, or the target among them.
    """
    tokenizer = _tokenizer(ctx, spec, inputs)
    tasks = [_task(spec, source, tokenizer, i == 0) for i, source in enumerate(inputs.usable)]
    host = TokenizerHost(tokenizer.path, tokenizer.eos_token)
    receipts = perform(ctx, Step("arms", tasks, host))
    made = ArmsMade(tokenizer, _target_part(receipts[0]), skipped=inputs.broken)
    for source, receipt in zip(inputs.usable[1:], receipts[1:], strict=True):
        _take_arms(made, spec, source, receipt)
    names = [part.name for part in made.arms]
    check_arms(names)
    among = sorted({*spec.target.where.values()} & {*names})
    if among:
        raise SpecError(
            f"the target is among the arms: {among} is a value of `target.where` and the name of "
            "an arm: leave it out with `exclude`, or give the arm another `name`"
        )
    return made


def _task(spec: MixSpec, source: Source, tokenizer: TokenizerRef, is_target: bool) -> SourceTask:
    digest, folder = source.selection_tokenizer or (None, None)
    return SourceTask(
        name=source.name,
        digests=source.digests,
        where=source.asked.where,
        by=source.asked.by,
        selection=digest,
        tokenizer=tokenizer.digest,
        max_input=spec.max_input_tokens,
        max_target=spec.max_target_tokens,
        split_text=spec.model.kind == "encoder_decoder",
        max_examples=None if is_target else spec.max_examples,
        is_target=is_target,
        uris=source.uris,
        selection_folder=folder,
    )


def _target_part(receipt: Receipt) -> str:
    if receipt.info["broken"]:
        raise InputError(f"`target`: {receipt.info['broken']}")
    if not receipt.parts:
        raise InputError(
            "`target` has no usable row: check `target.where`, and that rows have `input` and "
            f"`target`; seen: {receipt.info['arms'][0]['counts']}"
        )
    return receipt.parts[0].path


def _take_arms(made: ArmsMade, spec: MixSpec, source: Source, receipt: Receipt) -> None:
    """Add a source's arms; with `by`, counts under "" are of rows that say no arm."""

    def bad(name: str, why: str) -> None:
        if not spec.skip_bad_arms:
            raise InputError(f"arm `{name}`: {why}; repair it, or set `skip_bad_arms: true`")
        made.skipped[name] = why

    if receipt.info["broken"]:
        bad(source.name, receipt.info["broken"])
        return
    parts, by, found = iter(receipt.parts), source.asked.by, receipt.info["arms"]
    nowhere = [arm["counts"] for arm in found if by and not arm["name"]]
    if by and len(found) == len(nowhere):
        bad(source.name, f"no usable row ({nowhere or 'no rows'})")
    made.counts |= {f"{source.name} without `{by}`": counts for counts in nowhere}
    for arm in found:
        if by and not arm["name"]:
            continue
        part = next(parts) if arm["rows"] else None
        if arm["name"] in source.asked.exclude:
            continue
        if part is None:
            bad(arm["name"], f"no usable row ({arm['counts'] or 'no rows'})")
            continue
        made.arms.append(ArmPart(arm["name"], part.path, part.num_rows, part.sha256))
        made.counts[arm["name"]] = arm["counts"]


def _tokenizer(ctx: Context, spec: MixSpec, inputs: MixInputs) -> TokenizerRef:
    sources = [source for source in inputs.usable if source.selection_tokenizer is None]
    what: list[object] = [[source.digests, source.asked.where] for source in sources]
    paths = [str(source.asked.path) for source in sources]
    reading = [(source.uris, source.asked.where) for source in sources]
    return task_tokenizer(ctx, spec.tokenizer, what, paths, partial(_train, reading))


def _train(
    sources: Sequence[tuple[Sequence[str], dict[str, str]]], settings: TokenizerTraining
) -> bytes:
    """A tokenizer of the first rows of all sources, an equal share of text from each."""
    share = settings.num_bytes // len(sources)
    texts = (text for uris, where in sources for text in _texts(uris, where, share))
    return train_tokenizer(texts, vocab_size=settings.vocab_size)


def _texts(uris: Sequence[str], where: dict[str, str], num_bytes: int) -> Iterator[str]:
    taken = 0
    for uri in uris:
        try:
            for item in islice(read_examples(uri, where=where), _SAMPLE_ROWS):
                if isinstance(item, Example):
                    text = f"{item.input}\n{item.target}".strip()
                    taken += len(text)
                    yield text
                if taken > num_bytes:
                    return
        except (StillhouseError, FileNotFoundError):
            return  # the arm's own preparation says what is wrong with it


def row_fates(made: ArmsMade) -> dict[str, int]:
    """What became of the arms' rows, over all of them."""
    total: Counter[str] = Counter()
    for counts in made.counts.values():
        total.update(counts)
    return dict(sorted(total.items()))
