"""Build the demo's data from text that every Python environment already holds.

    python examples/build_corpus.py --out examples/data [--max-mb 25]

Reads the standard library and the installed packages as files (nothing is imported, nothing is
downloaded) and writes

* `pool/pool-00.parquet` ...: up to 15 kinds of text, one `source` each, shuffled over the shards;
* `target/docstrings.parquet`: docstrings of two thirds of the standard library's modules. The
  pool holds those of the other third, and the docstrings of third-party packages;
* `SOURCE.md`: what came from where.

The same environment gives the same bytes, and a second run with the same settings does nothing.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpus_sources import Budget, Collector, Document, keyed_hash

MIN_SOURCES = 8
MIN_SHARE = 0.002
MIN_TARGET_SHARE = 0.3
TARGET_BYTES = 2_000_000
NUM_SHARDS = 8
BUILDER_FILES = ("build_corpus.py", "corpus_sources.py", "corpus_text.py")
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])


class CorpusError(Exception):
    """This environment does not hold enough text."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The pool's sources, the target, and the number of files that could not be parsed."""

    pool: list[Budget]
    target: Budget
    num_unparsed: int


def write_corpus(out: Path, *, pool_bytes: int, target_bytes: int, num_shards: int) -> bool:
    """Write pool, target and SOURCE.md below `out`; False where they already stand there.

    Sizes are upper bounds, in bytes of UTF-8 text. Raises CorpusError where fewer than
    `MIN_SOURCES` sources or too little target text are found.
    """
    stamp = _stamp(pool_bytes, target_bytes, num_shards)
    shards = [out / "pool" / f"pool-{index:02d}.parquet" for index in range(num_shards)]
    target = out / "target" / "docstrings.parquet"
    stamp_file, source_file = out / "stamp.json", out / "SOURCE.md"
    complete = all(file.exists() for file in [*shards, target, source_file, stamp_file])
    if complete and stamp_file.read_text() == stamp:
        return False
    stdlib = Path(sysconfig.get_path("stdlib"))
    corpus = read_environment(stdlib, _package_roots(), pool_bytes, target_bytes)
    _clear(out)
    for shard, documents in zip(shards, deal(corpus.pool, num_shards), strict=True):
        _write_documents(shard, documents)
    _write_documents(target, deal([corpus.target], 1)[0])
    source_file.write_text(describe(corpus))
    stamp_file.write_text(stamp)  # last: an interrupted build has no stamp and is done again
    return True


def read_environment(
    stdlib: Path, packages: Sequence[Path], pool_bytes: int, target_bytes: int
) -> Corpus:
    """Collect the documents below a standard library and folders of packages.

    Raises CorpusError as `write_corpus` does; sources under `MIN_SHARE` of the pool are left out.
    """
    collector = Collector(pool_bytes, target_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        collector.collect(stdlib, packages)
    pool = [x for x in collector.pool.values() if x.num_bytes >= max(1, MIN_SHARE * pool_bytes)]
    if len(pool) < MIN_SOURCES:
        raise CorpusError(
            f"only {len(pool)} of {len(collector.pool)} sources have enough text in "
            f"{', '.join(map(str, packages))}; {MIN_SOURCES} are needed: "
            "install the project with its [dev] extra into this environment"
        )
    target = collector.target
    if target.num_bytes < MIN_TARGET_SHARE * target_bytes:
        raise CorpusError(
            f"only {target.num_bytes:,} bytes of docstrings for the target in {stdlib}: "
            "use a Python that has its library as source files"
        )
    return Corpus(pool, target, collector.num_unparsed)


def deal(budgets: Sequence[Budget], num_shards: int) -> list[list[Document]]:
    """All documents in the order of a keyed hash of their ids, dealt in turn to the shards."""
    documents = [document for budget in budgets for document in budget.documents]
    documents.sort(key=lambda document: (keyed_hash(document.id), document.id))
    return [documents[index::num_shards] for index in range(num_shards)]


def table(corpus: Corpus) -> list[tuple[str, int, int, float]]:
    """Rows of (source, documents, bytes, share of the pool's bytes), the largest source first."""
    total = sum(budget.num_bytes for budget in corpus.pool)
    rows = [(x.source, len(x.documents), x.num_bytes, x.num_bytes / total) for x in corpus.pool]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def describe(corpus: Corpus) -> str:
    """SOURCE.md: a table of the sources and where the text comes from."""
    rows = table(corpus)
    num_documents, num_bytes = sum(row[1] for row in rows), sum(row[2] for row in rows)
    target = corpus.target
    lines = [
        "# Where this text comes from",
        "",
        f"Read by `examples/build_corpus.py` from Python {sys.version.split()[0]}'s standard "
        "library and the packages installed beside it; each text is under its package's licence.",
        "",
        "| source | documents | bytes | share |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {count:,} | {size:,} | {share:.1%} |" for name, count, size, share in rows),
        f"| **pool** | {num_documents:,} | {num_bytes:,} | 100 % |",
        f"| **target**: {target.source} | {len(target.documents):,} | {target.num_bytes:,} | |",
        "",
        "The target holds the docstrings of two of three top-level modules of the standard "
        "library, chosen by a keyed hash of their names; the pool's `stdlib_docstrings` are "
        "those of the others.",
        "",
        f"Files that could not be parsed and were skipped: {corpus.num_unparsed}.",
    ]
    return "\n".join(lines) + "\n"


def _package_roots() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


def _stamp(pool_bytes: int, target_bytes: int, num_shards: int) -> str:
    """Everything that decides the output: settings, interpreter, packages, this builder."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in BUILDER_FILES)
    packages = sorted(path.name for root in _package_roots() for path in root.glob("*.dist-info"))
    content = {
        "pool_bytes": pool_bytes,
        "target_bytes": target_bytes,
        "num_shards": num_shards,
        "python": sys.version,
        "packages": packages,
        "builder_sha256": hashlib.sha256(code).hexdigest(),
    }
    return json.dumps(content, indent=1) + "\n"


def _clear(out: Path) -> None:
    (out / "stamp.json").unlink(missing_ok=True)
    for shard in (out / "pool").glob("pool-*.parquet"):
        shard.unlink()  # shards of an earlier build with more of them would be read too


def _write_documents(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(x, name) for x in documents] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def main() -> None:
    """Parse the command line, build, and print the table."""
    parser = argparse.ArgumentParser(description="Build the demo's data.")
    parser.add_argument("--out", type=Path, default=Path("examples/data"))
    parser.add_argument("--max-mb", type=float, default=25, help="size of the pool's text")
    options = parser.parse_args()
    sizes = {"pool_bytes": int(options.max_mb * 1e6), "target_bytes": TARGET_BYTES}
    try:
        written = write_corpus(options.out, **sizes, num_shards=NUM_SHARDS)
    except CorpusError as error:
        sys.exit(f"build_corpus: {error}")
    print((options.out / "SOURCE.md").read_text() if written else f"{options.out}: nothing to do")


if __name__ == "__main__":
    main()
