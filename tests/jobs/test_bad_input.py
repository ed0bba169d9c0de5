"""What bad input gets: one or two lines, an exit code, and nothing half-written."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from small import MODEL, document, rows, small_spec, write

from stillhouse import open_artifact
from stillhouse.storage.layout import folder_about

TEXT = {"id": "x", "text": "the ship sails " * 30, "source": "sea"}


@pytest.fixture
def little(tmp_path):
    """A folder with a pool of eight documents and a target of six."""
    write(tmp_path / "pool" / "a.parquet", rows(1, 8, ["sea", "law"]))
    write(tmp_path / "target" / "b.parquet", rows(2, 6, ["sea"]))
    return tmp_path


@pytest.fixture
def refused(little, capsys):
    """Runs a spec that must be refused: (exit code, the message without its prefix)."""
    from stillhouse.jobs.cli import app

    def call(*sets, spec=None, **changes):
        path = little / "spec.yaml"
        path.write_text(spec or yaml.safe_dump(small_spec(little, **changes)))
        arguments = [word for value in sets for word in ("--set", value)]
        with pytest.raises(SystemExit) as stopped:
            app(["run", str(path), "--json", *arguments])
        out, err = capsys.readouterr()
        message = json.loads(out)["error"]
        errors = [line for line in err.splitlines() if not _is_progress(line)]
        assert "\n".join(errors) == f"error: {message}"
        assert len(errors) <= 2 and "Traceback" not in err
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


def _is_progress(line):
    """Steps that went well before, and what Ray says by itself."""
    return line.startswith(
        (
            *("given models:", "scan:", "tokenizer:", "duplicates:", "split target:", "tokens:"),
            *("[20", "20", "("),
        )
    )


SPECS = {
    "unknown key": ({"selection": {"tua": 8}}, "unknown key `selection.tua` (did you mean `tau`?)"),
    "unknown section": ({"selecton": {"tau": 8}}, "(did you mean `selection`?)"),
    "wrong type": ({"sequence_length": "long"}, "`sequence_length`: 'long': "),
    "tau below one": ({"selection": {"tau": 0.5}}, "`selection.tau`: 0.5: "),
    "two sizes": ({"selection": {"tau": 2, "fraction": 0.5}}, "give exactly one of"),
    "no size": ({"selection": {}}, "give exactly one of"),
    "no device": ({"compute": {"device": "banana"}}, "`compute.device`: 'banana': "),
    "not a job": ({"job": "selct"}, "did you mean `select`?"),
    "NaN": ({"selection": {"min_score": float("nan")}}, "`selection.min_score`: nan: "),
    "shares of documents": (
        {"selection": {"tau": 2, "grain": "documents", "max_share": 0.5}},
        "use `grain: sequences`",
    ),
    "shares above one": (
        {"selection": {"tau": 2, "min_share": {"a": 0.6, "b": 0.5}}},
        "add up to more than 1",
    ),
    "dsir of documents": (
        {"selection": {"tau": 2, "grain": "documents"}, "train": {"controls": ["dsir"]}},
        "`dsir` ranks sequences",
    ),
    "no such rule": (
        {"selection": {"tau": 2, "rule": "colour"}},
        "`selection.rule: colour`: no such rule; there are color, own, random,",
    ),
    "no such control": (
        {"train": {"controls": ["random", "rando"]}},
        "`train.controls: rando`: no such rule",
    ),
    "one rule twice": (
        {"train": {"controls": ["color"]}},
        "`train.controls: color`: the selection or another control has this rule",
    ),
    "a rule of a scorer": ({"selection": {"tau": 2, "rule": "own"}}, "rule `own` reads `own`"),
}


@pytest.mark.parametrize("name", SPECS)
def test_bad_specs(refused, name):
    changes, expected = SPECS[name]
    code, message = refused(**changes)
    assert code == 2
    assert expected in message
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
    assert code == 2
    assert expected in message
    assert not refused.store.exists()


def test_a_key_that_stands_twice(refused):
    code, message = refused(spec="job: select\nselection:\n  tau: 2\n  tau: 3\n")
    assert code == 2
    assert message.endswith("line 4: not YAML: the key `tau` stands twice in one section")


@pytest.mark.parametrize("spec", ["- a list", "job: [", "", "\x00"])
def test_files_that_are_no_spec(refused, spec):
    code, message = refused(spec=spec or "# nothing")
    assert code == 2
    assert "spec.yaml" in message


def test_no_spec_at_all(capsys, tmp_path):
    from stillhouse.jobs.cli import app

    with pytest.raises(SystemExit) as stopped:
        app(["run", str(tmp_path / "none.yaml")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("no such file\n")


@pytest.mark.parametrize("section", ["pool", "target"])
def test_no_files(refused, little, section):
    code, message = refused(f"{section}.path={little}/nothing/*.parquet")
    assert code == 3
    assert f"no files match '{little}/nothing/*.parquet'" in message
    assert not refused.store.exists()


@pytest.mark.parametrize(
    ("section", "path"),
    [("prior", "./none"), ("conditional", "/none"), ("tokenizer", "./none")],
)
def test_models_that_are_not_there(refused, models, section, path):
    """Refused before Ray starts, and before anything is written."""
    words = {"tokenizer": {"path": str(models / "tokenizer")}}
    code, message = refused(**words | {section: {"path": path}})
    assert code == 2
    assert f"{path!r}: no such" in message
    assert not refused.store.exists()


@pytest.mark.parametrize("section", ["prior", "train"])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"hidden_size": 100, "num_heads": 3}, "`model.hidden_size` 100 does not divide into 3 he"),
        ({"max_position": 16}, "`model.max_position` 16 is below `sequence_length`"),
    ],
)
def test_models_that_cannot_be_built(refused, section, model, expected):
    """The target's too, which is built last."""
    code, message = refused(**{section: {"model": model}})
    assert code == 2
    assert expected in message
    assert not refused.store.exists()


def test_no_selection_to_take_the_threshold_from(refused):
    code, message = refused(selection={"threshold_from": "./none"})
    assert code == 3
    assert "no artifact at" in message
    assert not refused.store.exists()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A tokenizer of about 300 ids, and models that do and do not go with it."""
    from stillhouse.models.causal_lm import build_model, save_model
    from stillhouse.spec import ModelSettings
    from stillhouse.text.tokenizer import make_tokenizer, save_pretrained, train_tokenizer

    folder = tmp_path_factory.mktemp("models")
    rng = random.Random(0)
    content = train_tokenizer([document(rng, "sea") for _ in range(20)], vocab_size=300)
    words = make_tokenizer(content, None)
    save_pretrained(words, str(folder / "tokenizer"), model_max_length=1000)
    for name, vocab, context in (
        ("good", words.vocab_size, 64),
        ("wider", words.vocab_size + 64, 64),
        ("longer", words.vocab_size, 128),
        ("narrow", words.vocab_size - 64, 64),
        ("short", words.vocab_size, 16),
    ):
        settings = ModelSettings(**MODEL)
        model = build_model(settings, vocab_size=vocab, sequence_length=context, seed=0, eos_id=0)
        (folder / name).mkdir()
        save_model(model, folder / name)
    return folder


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
    assert code == 2
    assert expected in message
    assert not (refused.store / "models").exists()


def test_a_folder_without_weights(refused, models, tmp_path):
    shutil.copytree(models / "good", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    words = {"path": str(models / "tokenizer")}
    code, message = refused(tokenizer=words, prior={"path": str(tmp_path / "empty")})
    assert code == 2
    assert "holds no safetensors weights" in message


def test_a_folder_that_is_no_tokenizer(refused, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    code, message = refused(tokenizer={"path": str(tmp_path / "words")})
    assert code == 2
    assert "is not a tokenizer.json" in message


# From here on the data have to be read: on Ray.


@pytest.mark.usefixtures("ray_cluster")
class TestData:
    """Files that are there, and what is in them."""

    def test_a_missing_column(self, refused):
        code, message = refused("pool.columns.text=txet")
        assert code == 3
        assert "no column `txet` (`columns.text`); did you mean `text`" in message
        assert message.endswith("It has id, text, source")

    @pytest.mark.parametrize("key", ["id", "source"])
    def test_a_key_that_no_json_row_has(self, refused, little, key):
        lines = [json.dumps(TEXT | {"text": f"{i} {TEXT['text']}"}) for i in range(5)]
        (little / "lines.jsonl").write_text("\n".join(lines))
        pool = {"path": str(little / "lines.jsonl"), "columns": {key: "domain"}}
        code, message = refused(pool=pool)
        assert code == 3
        assert f"no row of '{little}/lines.jsonl' has what the spec names: " in message
        assert message.endswith(f"no key `domain` (`columns.{key}`); keys: id, text, source")

    def test_labels_that_are_objects(self, refused, little):
        lines = [json.dumps(TEXT | {"text": f"{i}", "source": {"name": "x"}}) for i in range(5)]
        (little / "lines.jsonl").write_text("\n".join(lines))
        code, message = refused(pool={"path": str(little / "lines.jsonl")})
        assert code == 3
        assert "5 of 5 rows of" in message
        assert "`source` is no plain value but dict: name another one (`columns.source`)" in message

    def test_two_columns_of_one_name(self, refused, little):
        table = pq.read_table(little / "pool" / "a.parquet")
        twins = table.append_column("text", table["text"])
        pq.write_table(twins, little / "pool" / "b.parquet")
        code, message = refused()
        assert code == 3
        assert f"{little}/pool/b.parquet: cannot be read: 2 columns are called `text`" in message

    def test_an_empty_pool(self, refused, little):
        table = pq.read_table(little / "pool" / "a.parquet").slice(0, 0)
        pq.write_table(table, little / "pool" / "a.parquet")
        code, message = refused()
        assert (code, message) == (3, f"'{little}/pool/*.parquet' holds no usable document")

    def test_files_of_no_bytes(self, refused, little):
        (little / "target" / "b.parquet").write_bytes(b"")
        code, message = refused()
        assert (code, message) == (3, f"all files of '{little}/target/*.parquet' are empty")
        assert not refused.store.exists()

    def test_documents_shorter_than_a_sequence(self, refused, models):
        code, message = refused(
            "sequence_length=50000", tokenizer={"path": str(models / "tokenizer")}
        )
        assert code == 3
        assert "`pool` (" in message and "less than one sequence of 50000" in message

    def test_a_heldout_part_without_rows(self, refused, little):
        nothing = pq.read_table(little / "target" / "b.parquet").slice(0, 0)
        pq.write_table(nothing, little / "held.parquet")
        heldout = {"path": str(little / "held.parquet")}
        code, message = refused(target={"path": str(little / "target"), "heldout": heldout})
        assert (code, message) == (3, f"'{little}/held.parquet' holds no usable document")

    def test_a_target_of_one_document(self, refused, little, models):
        write(little / "target" / "b.parquet", [TEXT])
        code, message = refused(tokenizer={"path": str(models / "tokenizer")})
        assert code == 3
        assert "`target.heldout` (" in message and "has 0 documents" in message

    def test_a_selection_larger_than_the_pool(self, refused, models):
        """Noticed when the pool is tokenised, before a model is trained on it."""
        code, message = refused(
            tokenizer={"path": str(models / "tokenizer")}, selection={"num_tokens": 10**9}
        )
        assert code == 2
        assert "the selection is larger than the pool: 31,250,000 sequences asked" in message

    def test_broken_rows_are_named_up_to_a_limit(self, refused, little):
        lines = [json.dumps(TEXT).encode()] * 3
        lines += [b'{"text": null}', b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "a']
        (little / "lines.jsonl").write_bytes(b"\n".join(lines))
        pool = {"path": str(little / "lines.jsonl"), "max_bad_rows": 3}
        code, message = refused(pool=pool)
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
    """What is allowed is counted, and the job goes on without it."""
    from small import Quiet, parse

    from stillhouse.jobs.run import run_job

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
    assert result["status"] == "done"
    assert result["dead_letters"] == 3
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
