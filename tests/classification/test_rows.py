"""Classifiers of vectors and of texts: what is read of rows, the network of texts, refusals."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from image_parts import make_task, manifest, quiet
from small import make_models
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from stillhouse.classification.data import ClassifierData
from stillhouse.classification.samples import RowsTask
from stillhouse.classification.stored import load_teacher
from stillhouse.classification.task import StoredClassifier, resolved
from stillhouse.classification.worker import train_classifier
from stillhouse.distillation.prepared import ImageHostSettings, Preparation, prepare
from stillhouse.errors import InputError, SpecError
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.models.text_classifier import TextClassifier, load_body
from stillhouse.storage.artifact import Store

NAME = "2" * 64
HERE = Preparation(NAME, zca=False)
LENGTH = 12
WORDS = ("sun", "rain", "wind", "snow", "fog", "hail")


def few_shot(count=60):
    """Rows whose class is their first word, sun or rain; every third of another task."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        words = [WORDS[i % 2], *(WORDS[j] for j in rng.integers(2, 6, 1 + i % 30))]
        rows.append(
            {
                "task": "sky" if i % 3 else "sea",
                "input": " ".join(words),
                "target": "wet" if i % 2 else "dry",
                "choices": ["dry", "wet"],
            }
        )
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def read(store, data, tokenizer="", name=NAME):
    """The manifest of the rows of some settings, and its dead letters."""
    preparation = replace(HERE, images=name)
    task = RowsTask(
        preparation, ClassifierData.model_validate(data), tokenizer, tokenizer and "the digest"
    )
    task.run(store, ImageHostSettings(preparation).build(store))
    made = store.get_manifest("images", name)
    letters = store.path("images", name, "dead_letters.parquet")
    return made, pq.read_table(letters).to_pylist() if made.files else []


def rows_of(store, made):
    """Values and labels of all parts."""
    tables = [pq.read_table(store.path(part.path)) for part in made.parts]
    found = pa.concat_tables(tables)
    return found[found.column_names[0]].to_pylist(), found["label"].to_pylist()


def test_texts_become_the_last_tokens_of_the_models_own_tokenizer(tmp_path, store, models):
    path, folder = tmp_path / "tasks.jsonl", models["tokenizer"]["path"]
    rows = few_shot()
    odd = [{"task": "sky", "input": "sun", "target": "both", "choices": ["dry", "wet"]}]
    odd += [{"task": "sky", "input": "", "target": "dry", "choices": ["dry"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + odd))
    data = {"path": str(path), "text_column": "input", "label_column": "target", "length": LENGTH}
    data |= {"where": {"task": "sky"}, "max_bad_rows": 5}
    made, dead = read(store, data | {"choices_column": "choices"}, folder)
    backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
    wanted = set()
    for row in rows:
        if row["task"] == "sky":
            ids = backend.encode(row["input"], add_special_tokens=False).ids[-LENGTH:]
            label = row["choices"].index(row["target"])
            wanted.add((*ids, *[-1] * (LENGTH - len(ids)), label))
    values, labels = rows_of(store, made)
    assert {(*v, label) for v, label in zip(values, labels, strict=True)} == wanted
    assert len(values) == 40 and {len(v) for v in values} == {LENGTH}
    assert [(one["row"], one["reason"]) for one in dead] == [
        (60, "the label 'both' is none of the choices ['dry', 'wet']"),
        (61, "no token in the text"),
    ]
    with pytest.raises(InputError, match=r"class 'both' has 1 text, `data\.test` needs at least 2"):
        read(store, data, folder, "3" * 64)


def test_texts_of_csv_and_arrow_are_those_of_json(tmp_path, store, models):
    columns = ("task", "input", "target")
    table = pa.Table.from_pylist([{key: row[key] for key in columns} for row in few_shot()])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table.to_pylist()))
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    data = {"text_column": "input", "label_column": "target", "length": LENGTH}
    data |= {"where": {"task": "sky"}}
    found = []
    for i, name in enumerate(("a.jsonl", "a.csv", "a.arrow")):
        path = {"path": str(tmp_path / name)}
        made, dead = read(store, data | path, models["tokenizer"]["path"], str(i) * 64)
        assert not dead
        values, labels = rows_of(store, made)
        found.append(sorted((*v, label) for v, label in zip(values, labels, strict=True)))
    assert len(found[0]) == 40 and found[0] == found[1] == found[2]


def test_vectors_are_standardised_by_the_training_part(tmp_path, store):
    rng = np.random.default_rng(1)
    vectors = rng.normal(3, [1, 50, 0, 1e-3], (80, 4)).astype(np.float32)
    labels = np.arange(80) % 2
    table = {"vector": [*vectors.tolist(), [1, None, 2, 3], None], "label": [*labels, 0, 1]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    data = {"path": str(tmp_path / "rows.parquet"), "feature_column": "vector"}
    made, dead = read(store, data | {"max_bad_rows": 2})
    assert [one["row"] for one in dead] == [80, 81]
    assert "is no list of finite numbers" in dead[0]["reason"]
    prepared = prepare(store, HERE, torch.device("cpu"))
    values, kept = rows_of(store, made)
    train = np.array(values, np.float64)[: made.parts[0].num_rows]
    deviation = np.where(train.std(0) > 0, train.std(0), 1)
    np.testing.assert_allclose(
        prepared.train.numpy(), (train - train.mean(0)) / deviation, atol=2e-3
    )
    assert sorted(zip(map(tuple, values), kept, strict=True)) == sorted(
        zip(map(tuple, vectors.tolist()), labels.tolist(), strict=True)
    )


def test_a_text_is_classified_as_the_model_reads_it_alone(models):
    folder = models["prior"]["path"]
    network = TextClassifier(load_body(folder), 3, frozen=False).eval()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [[5, 9, 300, 7], [8], [4, 4, 4, 4, 4, 17]]
    tokens = torch.full((3, 8), -1)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        found = network(tokens)
        for logits, ids in zip(found, texts, strict=True):
            states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            layer = network.classifier
            torch.testing.assert_close(logits, layer.weight @ states[0, -1] + layer.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_language_model_learns_classes_and_teaches(tmp_path, store, models, frozen):
    path, folder = tmp_path / "tasks.jsonl", models["prior"]["path"]
    tokenizer = models["tokenizer"]["path"]
    path.write_text("".join(json.dumps(row) + "\n" for row in few_shot(90)))
    data = {"path": str(path), "text_column": "input", "label_column": "target", "length": 32}
    made, _ = read(store, data, tokenizer)
    network = {"name": "language_model", "path": "the digest of a body", "frozen": frozen}
    task = make_task(network=network, num_epochs=10, global_batch=8, learning_rate=3e-3)
    count = made.parts[0].num_rows
    settings, num_steps = resolved(task.settings.model_copy(update={"window": count}), count)
    task = replace(task, images=NAME, num_images=count, settings=settings, num_steps=num_steps)
    task = replace(task, body=folder, tokenizer=tokenizer)
    train_classifier(store, task, quiet)
    totals = manifest(store, task).totals
    assert totals["points"][-1]["loss"] < totals["points"][0]["loss"]
    assert (
        frozen or totals["test"]["accuracy"] > 0.8
    )  # a frozen body of random weights knows little
    prepared = prepare(store, HERE, torch.device("cpu"))
    stored = StoredClassifier("a digest", store.path("models", task.fingerprint))
    teacher = load_teacher(stored, prepared, "teacher")
    with torch.no_grad():
        right = teacher(prepared.test[0]).argmax(1) == prepared.test[1]
    assert right.double().mean().item() == totals["test"]["accuracy"]
    body = teacher.network.body.state_dict()
    same = [torch.equal(v, body[k]) for k, v in load_body(folder).state_dict().items()]
    assert all(same) if frozen else not any(same)
    with pytest.raises(InputError, match="tokens of another tokenizer"):
        load_teacher(stored, replace(prepared, tokenizer="another"), "teacher")


ROWS = {"path": "rows.parquet"}
VECTORS, TEXTS = ROWS | {"feature_column": "v"}, ROWS | {"text_column": "t"}
MODEL = {"name": "language_model", "path": "a model"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": VECTORS}, "convnet.*the data are vectors: linear or mlp or factory"),
        ({"data": TEXTS, "network": {"name": "mlp"}}, "the data are texts: language_model"),
        ({"network": MODEL}, "the data are images"),
        ({"network": {"name": "language_model"}}, "`path` or `from`, one of them"),
        ({"network": {"name": "linear", "width": 3}}, "`width` does nothing"),
        ({"data": ROWS | {"length": 9}}, "`length` does nothing for images"),
        ({"data": VECTORS | {"image_size": 9}}, "`image_size` does nothing for vectors"),
        ({"data": VECTORS | {"text_column": "t"}}, "either `feature_column` or `text_column`"),
        (
            {"data": TEXTS, "network": MODEL, "train": {"objective": {"name": "robust"}}},
            "robust` is of images",
        ),
        (
            {"data": VECTORS, "network": {"name": "mlp"}, "train": {"augmentation": ["flip"]}},
            "`train.augmentation` is of images",
        ),
    ],
)
def test_settings_that_do_not_fit_the_samples(changes, match):
    spec = {"job": "train", "task": "classify", "store": "s", "data": ROWS}
    with pytest.raises(SpecError, match=match):
        parse_spec(spec | changes, "spec.yaml")


def test_vectors_of_several_lengths_and_absent_columns(tmp_path, store):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"v": [[1.0], [1.0, 2.0], [3.0]], "label": [0, 1, 0]}), path)
    data = {"path": str(path), "feature_column": "v"}
    with pytest.raises(InputError, match=r"vectors of several lengths: 1 \(2\), 2 \(1\)"):
        read(store, data)
    with pytest.raises(InputError, match=r"no column 'w': set `data.feature_column` to one of v"):
        read(store, data | {"feature_column": "w"})


def test_texts_are_not_distilled():
    spec = {"job": "distill", "store": "s", "data": ROWS, "network": MODEL}
    with pytest.raises(SpecError, match="images are distilled, a language_model reads texts"):
        parse_spec(spec | {"method": {"name": "ast", "images_per_class": 1}}, "spec.yaml")
