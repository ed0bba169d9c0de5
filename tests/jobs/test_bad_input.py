"""What bad input gets: one or two lines, an exit code, and nothing half-written."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from small import MODEL, Quiet, document, parse, rows, small_spec, write

from stillhouse import open_artifact
from stillhouse.jobs.cli import app
from stillhouse.jobs.run import run_job
from stillhouse.models.causal_lm import build_model, save_model
from stillhouse.spec import ModelSettings
from stillhouse.storage.layout import folder_about
from stillhouse.text.tokenizer import make_tokenizer, save_pretrained, train_tokenizer

TEXT = {"id": "x", "text": "the ship sails " * 30, "source": "sea"}
NOT_OURS = ("given models:", "scan:", "tokenizer:", "hashes:", "duplicates:", "drops:")
NOT_OURS += ("split target:", "tokens:", "[20", "20", "(")
"""How lines of finished steps begin, and those that Ray prints by itself."""


@pytest.fixture
def little(tmp_path):
    """A folder with a pool of eight documents and a target of six."""
    write(tmp_path / "pool" / "a.parquet", rows(1, 8, ["sea", "law"]))
    write(tmp_path / "target" / "b.parquet", rows(2, 6, ["sea"]))
    return tmp_path


@pytest.fixture
def refused(little, capsys):
    """Runs a spec that must be refused: (exit code, the message without its prefix)."""

    def call(*sets, spec=None, **changes):
        path = little / "spec.yaml"
        path.write_text(spec or yaml.safe_dump(small_spec(little, **changes)))
        arguments = [word for value in sets for word in ("--set", value)]
        with pytest.raises(SystemExit) as stopped:
            app(["run", str(path), "--json", *arguments])
        out, err = capsys.readouterr()
        message = json.loads(out)["error"]
        ours = [line for line in err.splitlines() if not line.startswith(NOT_OURS)]
        assert "\n".join(ours) == f"error: {message}"
        assert len(ours) <= 2 and "Traceback" not in err
        _nothing_half_written(little / "store")
        return stopped.value.code, message

    call.store = little / "store"
    return call


def _nothing_half_written(store):
    """What earlier steps finished is whole; there is neither a selection nor a result."""
    for path in store.rglob("manifest.json"):
        artifact = open_artifact(folder_about(str(path.parent)))
        assert artifact.manifest.kind in {"models", "tokens", "dead_letters"}
        assert all(Path(part.uri).exists() for part in artifact.parts)
    assert [*store.rglob("*.tmp"), *store.rglob("result.json")] == []


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A tokenizer of about 300 ids, and models that do and do not go with it."""
    folder = tmp_path_factory.mktemp("models")
    rng = random.Random(0)
    content = train_tokenizer([document(rng, "sea") for _ in range(20)], vocab_size=300)
    tokenizer = make_tokenizer(content, None)
    save_pretrained(tokenizer, str(folder / "tokenizer"), model_max_length=1000)
    for name, more, context in (
        ("good", 0, 64),
        ("wider", 64, 64),
        ("longer", 0, 128),
        ("narrow", -64, 64),
        ("short", 0, 16),
    ):
        vocab, settings = tokenizer.vocab_size + more, ModelSettings(**MODEL)
        model = build_model(settings, vocab_size=vocab, sequence_length=context, seed=0, eos_id=0)
        (folder / name).mkdir()
        save_model(model, folder / name)
    return folder


DOCUMENTS = {"tau": 2, "grain": "documents"}
HEADS = {"model": {"hidden_size": 100, "num_heads": 3}}
POSITIONS = {"model": {"max_position": 16}}


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"selection": {"tua": 8}}, 2, "unknown key `selection.tua` (did you mean `tau`?)"),
        ({"selecton": {"tau": 8}}, 2, "(did you mean `selection`?)"),
        ({"sequence_length": "long"}, 2, "`sequence_length`: 'long': "),
        ({"selection": {"tau": 0.5}}, 2, "`selection.tau`: 0.5: "),
        ({"selection": {"tau": 2, "fraction": 0.5}}, 2, "give exactly one of"),
        ({"selection": {}}, 2, "give exactly one of"),
        ({"compute": {"device": "banana"}}, 2, "`compute.device`: 'banana': "),
        ({"job": "selct"}, 2, "did you mean `select`?"),
        ({"selection": {"min_score": float("nan")}}, 2, "`selection.min_score`: nan: "),
        ({"selection": DOCUMENTS | {"max_share": 0.5}}, 2, "use `grain: sequences`"),
        (
            {"selection": {"tau": 2, "min_share": {"a": 0.6, "b": 0.5}}},
            2,
            "add up to more than 1",
        ),
        ({"selection": DOCUMENTS, "train": {"controls": ["dsir"]}}, 2, "`dsir` ranks sequences"),
        ({"selection": {"tau": 2, "rule": "colour"}}, 2, "`selection.rule: colour`: no such rule"),
        ({"train": {"controls": ["random", "rando"]}}, 2, "`train.controls: rando`: no such rule"),
        ({"train": {"controls": ["color"]}}, 2, "the selection or another control has this rule"),
        ({"selection": {"tau": 2, "rule": "own"}}, 2, "rule `own` reads `own`"),
        ({"prior": HEADS}, 2, "`model.hidden_size` 100 does not divide into 3 heads"),
        ({"prior": POSITIONS}, 2, "`model.max_position` 16 is below `sequence_length`"),
        ({"train": HEADS}, 2, "`model.hidden_size` 100 does not divide into 3 heads"),
        ({"train": POSITIONS}, 2, "`model.max_position` 16 is below `sequence_length`"),
        ({"prior": {"path": "./none"}}, 2, "'./none': no such"),
        ({"conditional": {"path": "/none"}}, 2, "'/none': no such"),
        ({"tokenizer": {"path": "./none"}}, 2, "'./none': no such"),
        ({"selection": {"threshold_from": "./none"}}, 3, "no artifact at"),
        ({"pool": {"path": "/nothing/*.parquet"}}, 3, "no files match '/nothing/*.parquet'"),
        ({"target": {"path": "/nothing/*.parquet"}}, 3, "no files match '/nothing/*.parquet'"),
    ],
)
def test_what_is_refused_before_anything_is_written(refused, models, changes, code, expected):
    found = refused(**{"tokenizer": {"path": str(models / "tokenizer")}} | changes)
    assert (found[0], expected in found[1]) == (code, True), found[1]
    assert not refused.store.exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("selection", "write it as a.b=value"),
        ("selection..tau=3", "write it as a.b=value"),
        ("sequence_length.x=3", "`sequence_length` is not a section"),
        ("selection.tua=3", "unknown key `selection.tua` (did you mean `tau`?)"),
        ("prior.modle.hidden_size=3", "unknown key `prior.modle`"),
        ("selection.tau={", "is not a YAML value"),
    ],
)
def test_bad_overrides(refused, override, expected):
    code, message = refused(override)
    assert (code, expected in message) == (2, True)
    assert not refused.store.exists()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("job: select\nselection:\n  tau: 2\n  tau: 3\n", "line 4: not YAML: the key `tau` stands"),
        ("- a list", "spec.yaml"),
        ("job: [", "spec.yaml"),
        ("# nothing", "spec.yaml"),
        ("\x00", "spec.yaml"),
    ],
)
def test_files_that_are_no_spec(refused, spec, expected):
    code, message = refused(spec=spec)
    assert (code, expected in message) == (2, True)


def test_no_spec_at_all(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        app(["run", str(tmp_path / "none.yaml")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("no such file\n")


@pytest.mark.parametrize(
    ("prior", "conditional", "expected"),
    [
        ("narrow", "good", "embeddings, the tokenizer needs"),
        ("good", "narrow", "embeddings, the tokenizer needs"),
        ("short", "good", "reads at most 16 tokens, `sequence_length` is 32"),
        ("good", "wider", "the conditional has a vocabulary of"),
        ("good", "longer", "the conditional has a context of 128 tokens, the prior of 64"),
    ],
)
@pytest.mark.usefixtures("ray_cluster")
def test_models_that_do_not_fit(refused, models, prior, conditional, expected):
    code, message = refused(
        tokenizer={"path": str(models / "tokenizer")},
        prior={"path": str(models / prior)},
        conditional={"path": str(models / conditional)},
    )
    assert (code, expected in message) == (2, True)
    assert not (refused.store / "models").exists()


def test_folders_without_weights_or_tokenizer(refused, models, tmp_path):
    shutil.copytree(models / "good", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    tokenizer = {"path": str(models / "tokenizer")}
    code, message = refused(tokenizer=tokenizer, prior={"path": str(tmp_path / "empty")})
    assert (code, "holds no safetensors weights" in message) == (2, True)
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    code, message = refused(tokenizer={"path": str(tmp_path / "empty")})
    assert (code, "is not a tokenizer.json" in message) == (2, True)


# From here on the data have to be read: on Ray.


@pytest.mark.usefixtures("ray_cluster")
class TestData:
    """Files that exist, and their content."""

    def test_a_missing_column(self, refused):
        code, message = refused("pool.columns.text=txet")
        assert code == 3
        assert "no column `txet` (`columns.text`); did you mean `text`" in message
        assert message.endswith("It has id, text, source")

    @pytest.mark.parametrize(
        ("columns", "source", "expected"),
        [
            ({"id": "domain"}, "a", "no key `domain` (`columns.id`); keys: id, text, source"),
            ({"source": "domain"}, "a", "no key `domain` (`columns.source`); keys: id, text, so"),
            ({}, {"name": "x"}, "`source` is no plain value but dict: name another one (`columns"),
        ],
    )
    def test_keys_that_no_json_row_has(self, refused, little, columns, source, expected):
        lines = [json.dumps(TEXT | {"text": f"{i} ships", "source": source}) for i in range(5)]
        (little / "lines.jsonl").write_text("\n".join(lines))
        code, message = refused(pool={"path": str(little / "lines.jsonl"), "columns": columns})
        assert (code, expected in message, f"{little}/lines.jsonl" in message) == (3, True, True)

    def test_two_columns_of_one_name(self, refused, little):
        table = pq.read_table(little / "pool" / "a.parquet")
        twins = table.append_column("text", table["text"])
        pq.write_table(twins, little / "pool" / "b.parquet")
        code, message = refused()
        assert code == 3
        assert f"{little}/pool/b.parquet: cannot be read: 2 columns are called `text`" in message

    def test_files_without_rows_or_bytes(self, refused, little):
        empty = pq.read_table(little / "pool" / "a.parquet").slice(0, 0)
        pq.write_table(empty, little / "held.parquet")
        heldout = {"path": str(little / "held.parquet")}
        code, message = refused(target={"path": str(little / "target"), "heldout": heldout})
        assert (code, message) == (3, f"'{little}/held.parquet' holds no usable document")
        pq.write_table(empty, little / "pool" / "a.parquet")
        code, message = refused()
        assert (code, message) == (3, f"'{little}/pool/*.parquet' holds no usable document")
        (little / "target" / "b.parquet").write_bytes(b"")
        code, message = refused()
        assert (code, message) == (3, f"all files of '{little}/target/*.parquet' are empty")

    def test_too_little_data(self, refused, little, models):
        """The last is noticed when the pool is tokenised, before a model is trained on it."""
        tokenizer = {"path": str(models / "tokenizer")}
        code, message = refused("sequence_length=50000", tokenizer=tokenizer)
        assert (code, "`pool` (" in message) == (3, True)
        assert "less than one sequence of 50000" in message
        code, message = refused(tokenizer=tokenizer, selection={"num_tokens": 10**9})
        assert code == 2
        assert "the selection is larger than the pool: 31,250,000 sequences asked" in message
        write(little / "target" / "b.parquet", [TEXT])
        code, message = refused(tokenizer=tokenizer)
        assert (code, "`target.heldout` (" in message) == (3, True)
        assert "has 0 documents" in message

    def test_broken_rows_are_named_up_to_a_limit(self, refused, little):
        lines = [json.dumps(TEXT).encode()] * 3
        lines += [b'{"text": null}', b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "a']
        (little / "lines.jsonl").write_bytes(b"\n".join(lines))
        code, message = refused(pool={"path": str(little / "lines.jsonl"), "max_bad_rows": 3})
        assert code == 3
        place = f"{little}/lines.jsonl row"
        assert f"4 of 7 rows of '{little}/lines.jsonl' cannot be used" in message
        assert f"`max_bad_rows` allows 3. First ones: {place} 3: null text; {place} 4: " in message
        assert f"{place} 5: invalid UTF-8" in message

    def test_a_truncated_file(self, refused, little):
        whole = (little / "pool" / "a.parquet").read_bytes()
        (little / "pool" / "b.parquet").write_bytes(whole[: len(whole) // 2])
        code, message = refused()
        assert code == 3
        assert f"{little}/pool/b.parquet: cannot be read: " in message
        assert "`skip_bad_files: true`" in message


def test_bad_rows_and_files_are_set_aside(ray_cluster, little, models):
    """What is allowed is counted, and the job runs without it."""
    whole = (little / "pool" / "a.parquet").read_bytes()
    (little / "pool" / "b.parquet").write_bytes(whole[: len(whole) // 2])
    lines = [json.dumps(TEXT | {"id": "good"}), '{"text": null}', "{"]
    (little / "pool" / "c.jsonl").write_text("\n".join(lines))
    given = {
        "tokenizer": {"path": str(models / "tokenizer")},
        "prior": {"path": str(models / "good")},
        "conditional": {"path": str(models / "good")},
    }
    pool = {"path": str(little / "pool"), "max_bad_rows": 2, "skip_bad_files": True}
    result = run_job(parse(little, pool=pool, selection={"tau": 2}, **given), Quiet())
    assert (result["status"], result["dead_letters"]) == ("done", 3)
    letters = open_artifact(result["artifacts"]["dead_letters"])
    assert letters.manifest.totals == {
        "pool": {"broken JSON": 1, "null text": 1, "unreadable file": 1}
    }
    found = pq.read_table(letters.parts[0].uri).to_pylist()
    places = [
        (r["input"], Path(r["file"]).name, r["row"], r["reason"].split(":")[0]) for r in found
    ]
    assert places == [
        ("pool", "b.parquet", -1, "unreadable file"),
        ("pool", "c.jsonl", 1, "null text"),
        ("pool", "c.jsonl", 2, "broken JSON"),
    ]
    assert all(len(row["preview"]) <= 200 for row in found)
    assert set(result["selection"]["sources"]) == {"sea", "law"}
