"""What a mix job reads: sources of arms and a target, listed, known by content, encoded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

from stillhouse.errors import InputError, SpecError, StillhouseError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.examples import Example, read_examples
from stillhouse.mixing.preparation import Lengths, SourceTask, prepare_source
from stillhouse.mixing.schedule import check_arms
from stillhouse.mixing.spec import ArmSource, MixSpec
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.flow import run_tasks
from stillhouse.pipelines.inputs import list_documents
from stillhouse.pipelines.tokenizer import task_tokenizer
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.reading.readers import Selection, open_selection
from stillhouse.spec import TokenizerTraining
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, list_names
from stillhouse.text.tokenizer import load_tokenizer, train_tokenizer

ARMS_VERSION = 2
_SAMPLE_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class ListedSource:
    """A source of arms with its files; `broken` says why it cannot be used."""

    source: ArmSource
    files: tuple[FileInfo, ...] = ()
    selection: str | None = None
    broken: str | None = None

    @property
    def name(self) -> str:
        """Of the arm; of the source where `by` makes several."""
        return self.source.name or _name(self.source)


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source known by content: URIs of its files and a fingerprint of what they hold.

    Of a selection also the folder and the digest of the tokenizer of its sequences.
    """

    listed: ListedSource
    uris: tuple[str, ...]
    digests: tuple[str, ...]
    selection_tokenizer: str | None = None
    tokenizer_digest: str | None = None


@dataclass(frozen=True, slots=True)
class MixInputs:
    """Everything that a mix job reads."""

    target: OpenedSource
    sources: tuple[OpenedSource, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GivenModels:
    """Content of models that the spec names by path: where runs begin, DoReMi's reference.

    `folders`: where in the store they lie, by key in the spec.
    """

    init: str | None = None
    reference: str | None = None
    folders: Mapping[str, str] = field(default_factory=dict)


def given_paths(spec: MixSpec) -> dict[str, str]:
    """The models that a spec gives by path, by their keys."""
    paths = {"model": spec.model.path, "policy": spec.reference}
    return {key: path for key, path in paths.items() if path is not None}


@dataclass(slots=True)
class ArmsMade:
    """The prepared arms, the target's part, and what became of rows.

    `counts`: by arm, rows by what became of them. `skipped`: arms that were left out, and why.
    """

    tokenizer: TokenizerRef
    target: str
    arms: list[ArmPart] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def list_sources(spec: MixSpec) -> tuple[ListedSource, list[ListedSource]]:
    """The target's files, and those of all sources of arms.

    Raises:
        InputError: nothing matches; for an arm only without `skip_bad_arms`.
    """
    target = ArmSource(name="target", path=spec.target.path, where=spec.target.where)
    sources: list[ListedSource] = []
    for source in spec.sources:
        try:
            sources.append(_listed(spec, source))
        except StillhouseError as error:
            if not spec.skip_bad_arms:
                raise InputError(
                    f"arm `{_name(source)}`: {error}; or set `skip_bad_arms: true`"
                ) from error
            sources.append(ListedSource(source, broken=str(error)))
    return _listed(spec, target), sources


def _listed(spec: MixSpec, source: ArmSource) -> ListedSource:
    if source.selection is not None:
        given = source.selection
        uri = given if "/" in given or "#" in given else f"{spec.store}/selections/{given}"
        return ListedSource(source, selection=open_selection(uri).uri)
    assert source.path is not None
    paths = [source.path] if isinstance(source.path, str) else source.path
    return ListedSource(source, tuple(list_documents(paths)))


def _name(source: ArmSource) -> str:
    given = source.path if source.path is not None else source.selection
    first = given[0] if isinstance(given, list) else str(given)
    return source.name or PurePosixPath(first.rstrip("/")).name.split(".")[0].strip("*") or first


def open_sources(
    store: Store, target: ListedSource, sources: Sequence[ListedSource], *, remember: bool
) -> MixInputs:
    """Digest all files; unchanged ones are not read.

    Raises:
        SpecError: an arm's files and rows are the target's.
    """
    usable = [source for source in (target, *sources) if source.broken is None]
    files = list({f.uri: f for source in usable for f in source.files}.values())
    digests = digest_files(store, files, remember=remember)
    by_uri = {f.uri: d.sha256 for f, d in zip(files, digests, strict=True)}
    opened = [_opened(source, by_uri) for source in usable]
    for source in opened[1:]:
        _refuse_target(opened[0], source)
    broken = tuple(f"{s.name}: {s.broken}" for s in sources if s.broken is not None)
    return MixInputs(opened[0], tuple(opened[1:]), broken)


def _opened(listed: ListedSource, digests: dict[str, str]) -> OpenedSource:
    if listed.selection is None:
        uris = tuple(f.uri for f in listed.files)
        return OpenedSource(listed, uris, tuple(digests[uri] for uri in uris))
    selection = Selection(listed.selection)
    parts = selection.parts
    return OpenedSource(
        listed,
        tuple(part.uri for part in parts),
        tuple(part.sha256 for part in parts),
        *_tokenizer_of(selection),
    )


def _tokenizer_of(selection: Selection) -> tuple[str, str]:
    """Folder and digest of the tokenizer that a selection's sequences were made with.

    Raises:
        InputError: its store has it no more.
    """
    digest = selection.manifest.settings["tokenizer"]["digest"]
    store = Store(selection.store)
    for name in list_names(store.path("models")):
        manifest = store.find_manifest("models", name)
        if manifest is not None and manifest.totals.get("digest") == digest:
            return store.path("models", name), digest
    raise InputError(f"{selection.uri}: the tokenizer of its sequences is not in its store")


def _refuse_target(target: OpenedSource, source: OpenedSource) -> None:
    mine, theirs = source.listed.source, target.listed.source.where
    named = (mine.by in theirs and theirs[mine.by] not in mine.exclude) if mine.by else True
    apart = any(mine.where.get(key, value) != value for key, value in theirs.items())
    if {*source.digests} & {*target.digests} and named and not apart:
        what = f"value {theirs[mine.by]!r} of `by: {mine.by}`" if mine.by else "its rows"
        raise SpecError(
            f"the target is among the arms: `{source.listed.name}`, {what}: leave it out with "
            "`where` or `exclude`"
        )


def prepare_arms(ctx: Context, spec: MixSpec, inputs: MixInputs) -> ArmsMade:
    """Tokenizer, a part of each arm, and the target's part.

    Raises:
        InputError: an arm that is empty or cannot be read, without `skip_bad_arms`.
        SpecError: fewer than two arms, two of one name, or the target among them.
    """
    words = _tokenizer(ctx, spec, inputs)
    opened = [inputs.target, *inputs.sources]
    tasks = [_task(spec, source, words, is_target=i == 0) for i, source in enumerate(opened)]
    receipts = _prepare(ctx, words, tasks)
    made = ArmsMade(words, "")
    if spec.skip_bad_arms:
        made.skipped |= dict(line.split(": ", 1) for line in inputs.broken)
    _take_target(made, receipts[0])
    for source, receipt in zip(inputs.sources, receipts[1:], strict=True):
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


def _task(
    spec: MixSpec, source: OpenedSource, words: TokenizerRef, *, is_target: bool
) -> SourceTask:
    given = source.listed.source
    lengths = Lengths(spec.max_input_tokens, spec.max_target_tokens)
    split_text = spec.model.kind == "encoder_decoder"
    cap = None if is_target else spec.max_examples
    content = [
        source.digests,
        given.where,
        given.by,
        source.tokenizer_digest,
        source.listed.name,
    ]
    settings = [words.digest, lengths.input, lengths.target, split_text, cap, is_target]
    return SourceTask(
        fingerprint=fingerprint(["arms", ARMS_VERSION, content, settings]),
        name=source.listed.name,
        uris=source.uris,
        where=given.where,
        by=given.by,
        selection_tokenizer=source.selection_tokenizer,
        lengths=lengths,
        split_text=split_text,
        max_examples=cap,
        is_target=is_target,
    )


def _prepare(ctx: Context, words: TokenizerRef, tasks: Sequence[SourceTask]) -> list[Receipt]:
    done = ctx.store.finished("arms", [task.fingerprint for task in tasks])
    todo = list({t.fingerprint: t for t in tasks if t.fingerprint not in done}.values())
    reused = len(tasks) - len(todo)
    with ctx.step("arms", total=len(tasks), reused=reused, unit="tokens") as advance:
        for receipt in run_tasks(ctx, partial(_encode, ctx.store, words), todo):
            done[receipt.task] = receipt
            advance(1, sum(part.num_tokens for part in receipt.parts))
    return [done[task.fingerprint] for task in tasks]


def _encode(store: Store, words: TokenizerRef, task: SourceTask) -> Receipt:
    return prepare_source(store, load_tokenizer(words.path, words.eos_token), task)


def _take_target(made: ArmsMade, receipt: Receipt) -> None:
    if receipt.info["broken"]:
        raise InputError(f"`target`: {receipt.info['broken']}")
    if not receipt.parts:
        raise InputError(
            "`target` has no usable row: check `target.where`, and that rows have `input` and "
            f"`target`; seen: {receipt.info['arms'][0]['counts']}"
        )
    made.target = receipt.parts[0].path


def _take_arms(made: ArmsMade, spec: MixSpec, source: OpenedSource, receipt: Receipt) -> None:
    broken = receipt.info["broken"]
    if broken:
        _bad(made, spec, source.listed.name, broken)
        return
    parts, by = iter(receipt.parts), source.listed.source.by
    nowhere = [arm["counts"] for arm in receipt.info["arms"] if by and not arm["name"]]
    if by and len(receipt.info["arms"]) == len(nowhere):
        _bad(made, spec, source.listed.name, f"no usable row ({nowhere or 'no rows'})")
    made.counts |= {f"{source.listed.name} without `{by}`": counts for counts in nowhere}
    for arm in receipt.info["arms"]:
        if by and not arm["name"]:
            continue
        part = next(parts) if arm["rows"] else None
        if arm["name"] in source.listed.source.exclude:
            continue
        if part is None:
            _bad(made, spec, arm["name"], f"no usable row ({arm['counts'] or 'no rows'})")
            continue
        made.arms.append(ArmPart(arm["name"], part.path, part.num_rows))
        made.digests.append(part.sha256)
        made.counts[arm["name"]] = arm["counts"]


def _bad(made: ArmsMade, spec: MixSpec, name: str, why: str) -> None:
    if not spec.skip_bad_arms:
        raise InputError(f"arm `{name}`: {why}; repair it, or set `skip_bad_arms: true`")
    made.skipped[name] = why


def _tokenizer(ctx: Context, spec: MixSpec, inputs: MixInputs) -> TokenizerRef:
    sources = [s for s in (inputs.target, *inputs.sources) if s.selection_tokenizer is None]
    what: list[object] = [[s.digests, s.listed.source.where] for s in sources]
    paths = [str(s.listed.source.path) for s in sources]
    reading = [(s.uris, s.listed.source.where) for s in sources]
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
