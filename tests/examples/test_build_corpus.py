"""The builder of the demo's data, on this environment and on small files written here."""

import gzip
import json
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
build_corpus = import_module("build_corpus")
corpus_sources = import_module("corpus_sources")
corpus_text = import_module("corpus_text")
sys.path.remove(str(EXAMPLES))

TINY = {"pool_bytes": 600_000, "target_bytes": 100_000}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    assert build_corpus.write_corpus(out, **TINY, num_shards=2)
    return out


def rows(*files):
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def pool_rows(out):
    return rows(*sorted((out / "pool").glob("*.parquet")))


def contents(out):
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_pool_has_enough_sources_and_none_dominates(built):
    sizes = {}
    for row in pool_rows(built):
        sizes[row["source"]] = sizes.get(row["source"], 0) + len(row["text"].encode())
    assert len(sizes) >= 8
    assert max(sizes.values()) <= 0.25 * sum(sizes.values())


def test_documents_are_within_the_limits_and_ids_are_unique(built):
    documents = pool_rows(built) + rows(built / "target" / "docstrings.parquet")
    assert all(200 <= len(row["text"]) <= 20_000 for row in documents)
    assert len({row["id"] for row in documents}) == len(documents)


def test_no_module_is_in_pool_and_target(built):
    def modules(documents):
        return {row["id"].split("/")[1].split("#")[0].removesuffix(".py") for row in documents}

    target = rows(built / "target" / "docstrings.parquet")
    pool = [row for row in pool_rows(built) if row["source"] == "stdlib_docstrings"]
    assert sum(len(row["text"]) for row in target) >= 90_000
    assert pool
    assert not modules(pool) & modules(target)


def test_sources_are_shuffled_over_all_shards(built):
    first, second = sorted((built / "pool").glob("*.parquet"))
    documents = Counter(row["source"] for row in rows(first, second))
    common = {source for source, count in documents.items() if count >= 20}
    assert common
    assert common <= {row["source"] for row in rows(first)}
    assert common <= {row["source"] for row in rows(second)}
    assert abs(len(rows(first)) - len(rows(second))) <= 1


def test_second_run_does_nothing_and_a_new_build_gives_the_same_bytes(built):
    before = contents(built)
    assert not build_corpus.write_corpus(built, **TINY, num_shards=2)
    (built / "target" / "docstrings.parquet").unlink()
    assert build_corpus.write_corpus(built, **TINY, num_shards=2)
    assert contents(built) == before


def test_other_settings_build_again_and_leave_no_old_shard(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool-01.parquet").write_bytes(b"of an earlier build")
    small = {"pool_bytes": 60_000, "target_bytes": 10_000}
    assert build_corpus.write_corpus(tmp_path, **small, num_shards=1)
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["pool-00.parquet"]
    assert build_corpus.write_corpus(tmp_path, **{**small, "target_bytes": 9_000}, num_shards=1)


def test_poor_environment_is_refused(tmp_path):
    with pytest.raises(build_corpus.CorpusError, match=r"only 0 of 15 sources .* \[dev\] extra"):
        build_corpus.read_environment(tmp_path, [tmp_path], 1_000, 1_000)


def test_unreadable_files_are_counted_and_skipped(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "broken.py").write_text("def f(:\n")
    (package / "binary.py").write_bytes(b"\xff\xfe\0")
    (package / "good.py").write_text(f'"""{"Words. " * 40}"""\n')
    collector = corpus_sources.Collector(10_000, 10_000)
    collector.collect(tmp_path / "no_stdlib", [tmp_path])
    assert collector.num_unparsed == 3  # both files, and the language reference that is not there
    (document,) = collector.pool["package_docstrings"].documents
    assert document.id == "package_docstrings/package/good.py#0"


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("numpy/core.py", "python"),
        ("numpy/tests/test_core.py", "test_sources"),
        ("numpy/tests/data.json", None),
        ("numpy/core.pyi", "type_stubs"),
        ("a-1.0.dist-info/METADATA", "metadata"),
        ("a-1.0.dist-info/licenses/AUTHORS.txt", "licences"),
        ("pip/_vendor/rich/LICENSE", "licences"),
        ("botocore/data/sqs/2012-11-05/service-2.json.gz", "api_descriptions"),
        ("scipy/_lib/x.pxd", "cython"),
        ("torch/lib/libtorch.so", None),
    ],
)
def test_kind_of(file, kind):
    assert corpus_sources.kind_of(file) == kind


def test_python_side_of_a_c_module_goes_with_it():
    for file in ("_pydecimal.py", "_decimal.py"):
        assert corpus_sources.in_target(file) == corpus_sources.in_target("decimal.py")


def test_by_turns_takes_one_of_each_package_before_a_second():
    files = ["a/1.py", "a/2.py", "a/3.py", "b/1.py", "c.py"]
    drawn = corpus_sources.by_turns(files)
    assert {file[0] for file in drawn[:3]} == {"a", "b", "c"}
    assert sorted(drawn) == files
    assert corpus_sources.by_turns(reversed(files)) == drawn


SAMPLE = '''\
"""Module.

    Indented.
"""

# Two lines of prose that explain
# why the value below is large.
LIMIT = 3

# x = f(1) + g[2] * 3 - h(4)
# y = {k: v for k, v in z}

TEXT = """
# not a comment
# but a string
"""


@decorate
def f(x):
    """Say x."""
    if not x:
        raise ValueError(f"the value {x!r} is not allowed")
    log.info("done")
    return x  # fine
'''


@pytest.fixture
def any_length(monkeypatch):
    monkeypatch.setattr(corpus_text, "MIN_CHARS", 1)


@pytest.mark.usefixtures("any_length")
def test_python_texts():
    texts = corpus_text.python_texts(SAMPLE)
    assert texts.docstrings == ["Module.\n\nIndented.\n\nSay x."]
    assert texts.comments == ["Two lines of prose that explain\nwhy the value below is large."]
    assert texts.messages == ["the value {x} is not allowed"]
    assert texts.code == [
        "@decorate\ndef f(x):\n    if not x:\n"
        '        raise ValueError(f"the value {x!r} is not allowed")\n'
        '    log.info("done")\n    return x  # fine'
    ]
    assert corpus_text.docstrings(SAMPLE) == texts.docstrings


@pytest.mark.usefixtures("any_length")
def test_api_descriptions(tmp_path):
    shapes = {"B": {"documentation": "<p>A  <b>big</b> &amp; fast</p><p>queue.</p>"}, "C": [1]}
    file = tmp_path / "service-2.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"shapes": shapes}).encode()))
    text = corpus_sources.read_text(file)
    assert corpus_text.api_descriptions(text) == ["A big & fast\n\nqueue."]


@pytest.mark.usefixtures("any_length")
def test_long_description_in_body_or_header():
    assert corpus_text.long_description("Name: a\n\n# A\n\ntext\n") == ["# A\n\ntext"]
    old = "Name: a\nDescription: A\n        =\n        \n        text\n"
    assert corpus_text.long_description(old) == ["A\n=\n\ntext"]


def test_handwritten_leaves_minified_generated_and_numeric_text():
    line = "let total = first + second;\n"
    assert corpus_text.handwritten(line * 10) == [(line * 10).strip()]
    assert corpus_text.handwritten(line.strip() * 10) == []
    assert corpus_text.handwritten("/* @generated */\n" + line * 10) == []
    assert corpus_text.handwritten("1.5, 2.5, 3.5, x\n" * 20) == []


def test_clip_cuts_at_paragraphs_then_lines_and_drops_short_rests():
    paragraph = "w" * 9_000
    assert corpus_text.clip("\n\n".join([paragraph] * 3)) == [
        f"{paragraph}\n\n{paragraph}",
        paragraph,
    ]
    assert corpus_text.clip("\n".join(["w" * 15_000] * 2)) == ["w" * 15_000] * 2
    assert corpus_text.clip("w" * 20_100) == ["w" * 20_000]
    assert corpus_text.clip("w" * 199) == []


def test_group_joins_neighbours_up_to_a_document():
    assert corpus_text.group(["a" * 800, "b" * 800, "c" * 300]) == [
        "a" * 800 + "\n\n" + "b" * 800,
        "c" * 300,
    ]
