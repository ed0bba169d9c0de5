"""Models on tasks: the harness's numbers against losses computed here, choice by choice."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from small import MODEL
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from stillhouse.errors import InputError, SpecError
from stillhouse.evaluation.harness import HarnessHost, HarnessTask
from stillhouse.evaluation.harness_tasks import check_task
from stillhouse.evaluation.settings import TaskEvaluation
from stillhouse.evaluation.tasks import list_tasks, open_tasks
from stillhouse.models.causal_lm import save_model
from stillhouse.models.text_to_text import build_text_model
from stillhouse.spec import ModelSettings
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints, Snapshot
from stillhouse.training.task import checkpoints_of

WORDS = ("sea wave salt", "court law judge", "rice soup bread")
ROWS = [
    {"input": f"the {first}", "target": WORDS[i % 3], "choices": list(WORDS), "kind": f"k{i % 2}"}
    for i, first in enumerate(["wave", "salt", "court", "soup", "rice", "judge", "bread"])
]


@pytest.fixture(scope="module")
def model(untrained, tmp_path_factory):
    """A folder with a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(untrained["tokenizer"]["path"], folder)
    shutil.copytree(untrained["prior"]["path"], folder, dirs_exist_ok=True)
    return str(folder)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def source_of(task, store):
    [source] = open_tasks(
        store, list_tasks(TaskEvaluation.model_validate({"tasks": [task]})), remember=True
    )
    return source


def measured(task, tmp_path, model, **changes):
    store = Store(str(tmp_path / "store"))
    fields = {"step": None, "num_fewshot": None, "limit": None, "batch_size": 4, "bos_id": None}
    fields |= {"model": "m", "harness": "1", "folder": model} | changes
    made = HarnessTask(source=source_of(task, store), **fields)
    return made.run(store, HarnessHost("cpu", 0, 1).build(store), None)


def log_likelihood(model, before, text):
    """Sum of log-probabilities of the tokens of `text` behind `before`."""
    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    ids, first = tokenizer(before + text)["input_ids"], len(tokenizer(before)["input_ids"])
    with torch.no_grad():
        logs = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))


def accuracies(model, rows):
    """By the sum, and by the mean over characters."""
    found = [
        [log_likelihood(model, row["input"], f" {choice}") for choice in row["choices"]]
        for row in rows
    ]
    right = [row["choices"].index(row["target"]) for row in rows]
    sums = [max(range(3), key=values.__getitem__) for values in found]
    means = [max(range(3), key=lambda i: values[i] / len(WORDS[i])) for values in found]
    return [sum(a == b for a, b in zip(x, right, strict=True)) / len(rows) for x in (sums, means)]


def test_choices_are_ranked_by_their_likelihoods(tmp_path, model):
    made = measured(write(tmp_path / "rows.jsonl", ROWS), tmp_path, model)
    found, expected = made.info["results"]["rows"], accuracies(model, ROWS)
    assert [found["acc"], found["acc_norm"]] == pytest.approx(expected)
    p = expected[0]
    assert found["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(ROWS) - 1)))
    assert made.counts == {"rows": 7} and made.info["chance"] == pytest.approx(1 / 3)


def test_rows_of_one_kind_and_the_first_of_them(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", ROWS)
    task = {"path": path, "name": "even", "where": {"kind": "k0"}}
    made = measured(task, tmp_path, model, limit=3)
    kept = [row for row in ROWS if row["kind"] == "k0"][:3]
    assert made.info["results"]["even"]["acc"] == pytest.approx(accuracies(model, kept)[0])
    assert made.counts == {"rows": 3}


def test_rows_of_the_test_split_are_measured_behind_examples_of_others(tmp_path, model):
    rows = [row | {"split": "test" if i < 3 else "train"} for i, row in enumerate(ROWS[:4])]
    made = measured(write(tmp_path / "rows.jsonl", rows), tmp_path, model, num_fewshot=1)
    example = f"{rows[3]['input']} {rows[3]['target']}\n\n"
    behind = [row | {"input": example + row["input"]} for row in rows[:3]]
    assert made.counts == {"rows": 3}
    assert made.info["results"]["rows"]["acc"] == pytest.approx(accuracies(model, behind)[0])


def test_targets_without_choices_and_texts(tmp_path, model):
    rows = [{"input": row["input"], "target": row["target"]} for row in ROWS]
    made = measured(write(tmp_path / "free.jsonl", rows), tmp_path, model)
    logs = [log_likelihood(model, row["input"], f" {row['target']}") for row in rows]
    found = made.info["results"]["free"]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)
    assert made.info["chance"] is None
    texts = [{"text": f"{row['input']} {row['target']}"} for row in ROWS]
    made = measured(write(tmp_path / "texts.jsonl", texts), tmp_path, model)
    logs = [log_likelihood(model, "<|endoftext|>", row["text"]) for row in texts]
    num_bytes = sum(len(row["text"].encode()) for row in texts)
    bits = -sum(logs) / math.log(2) / num_bytes
    assert made.info["results"]["texts"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_an_encoder_decoder_reads_the_input_and_rates_the_choices(tmp_path, model):
    settings = ModelSettings.model_validate(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = build_text_model(
        settings,
        encoder_decoder=True,
        vocab_size=len(tokenizer),
        num_positions=64,
        seed=0,
        eos_id=0,
        pad_id=1,
    )
    folder = tmp_path / "t5"
    shutil.copytree(model, folder)
    save_model(made, folder)
    network, right = AutoModelForSeq2SeqLM.from_pretrained(folder), 0
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            texts = row["input"], f" {choice}"
            read, written = (torch.tensor([tokenizer(text)["input_ids"]]) for text in texts)
            with torch.no_grad():
                logs = network(input_ids=read, labels=written).logits[0].double().log_softmax(-1)
            sums.append(logs.gather(1, written[0, :, None]).sum().item())
        right += row["choices"][sums.index(max(sums))] == row["target"]
    found = measured(write(tmp_path / "rows.jsonl", ROWS), tmp_path, str(folder))
    assert found.info["results"]["rows"]["acc"] == pytest.approx(right / len(ROWS))


def test_a_checkpoint_has_its_own_weights(tmp_path, model):
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    network.save_pretrained(other)
    tensors = {f"model.{name}": p.detach() for name, p in network.named_parameters()}
    with Checkpoints(Store(str(tmp_path / "store")), checkpoints_of("m")) as checkpoints:
        checkpoints.save(Snapshot(tensors, {"step": 20}))
    path = write(tmp_path / "free.jsonl", [{"input": "the sea", "target": "wave"}])
    found = [
        measured(path, tmp_path, folder, step=step).info["results"]["free"]["perplexity"]
        for folder, step in ((model, 20), (str(other), None), (model, None))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] != pytest.approx(found[2])


def write_task_file(folder):
    """A task file that includes one of another folder, which names the data and a function."""
    (folder / "common").mkdir(parents=True)
    (folder / "own").mkdir()
    rows = [{"q": r["input"], "opts": r["choices"], "gold": i % 3} for i, r in enumerate(ROWS)]
    write(folder / "common" / "rows-0.jsonl", rows[:4])
    write(folder / "common" / "rows-1.jsonl", rows[4:])
    (folder / "common" / "more.py").write_text(
        "def process(dataset):\n    return dataset.map(lambda one: {'q': 'so ' + one['q']})\n"
    )
    (folder / "common" / "base.yaml").write_text(
        "task: base\ndataset_path: json\ndataset_kwargs: {data_files: {test: 'rows-*.jsonl'}}\n"
        "test_split: test\noutput_type: multiple_choice\nprocess_docs: !function more.process\n"
        "doc_to_text: q\ndoc_to_choice: opts\ndoc_to_target: gold\n"
    )
    (folder / "own" / "own.yaml").write_text(
        "include: ../common/base.yaml\ntask: own\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(folder / "own" / "own.yaml")


def test_a_task_file_with_what_it_includes_and_names(tmp_path, model, monkeypatch):
    path = write_task_file(tmp_path / "task")
    write(tmp_path / "rows-0.jsonl", [{"q": "x", "opts": ["a", "b"], "gold": 0}])
    monkeypatch.chdir(tmp_path)  # which holds a file of the same name
    made = measured(path, tmp_path, model)
    behind = [row | {"input": f"so {row['input']}"} for row in ROWS]
    assert made.counts == {"rows": 7}
    assert made.info["results"]["own"]["acc"] == pytest.approx(accuracies(model, behind)[0])


def test_what_a_task_file_names_identifies_it(tmp_path):
    store, path = Store(str(tmp_path / "store")), write_task_file(tmp_path / "task")
    before = source_of(path, store)
    names = [uri.rsplit("/", 1)[1] for uri in before.uris]
    assert names == ["more.py", "rows-0.jsonl", "rows-1.jsonl"]
    module = tmp_path / "task" / "common" / "more.py"
    module.write_text("def process(dataset):\n    return dataset\n")
    after = source_of(path, store)
    assert [a == b for a, b in zip(before.digests, after.digests, strict=True)] == [
        False,
        True,
        True,
    ]
    base = tmp_path / "task" / "common" / "base.yaml"
    base.write_text(base.read_text().replace("test_split: test", "test_split: test # "))
    assert source_of(path, store).content == after.content
    base.write_text(base.read_text().replace("doc_to_text: q", "doc_to_text: gold"))
    assert source_of(path, store).content != after.content


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": "a", "target": "b"}, ROWS[0]], "rows of several forms (choices, target)"),
        ([{"input": "a"}, {"other": 1}], "2 of 2 rows cannot be used"),
        ([*ROWS, {"input": "a"}], "1 of 8 rows cannot be used (`max_bad_rows`): 1: "),
        ([{"input": "a", "target": "b " * 200}], "the model reads 32"),
    ],
)
def test_rows_that_make_no_task(rows, message, tmp_path, model):
    with pytest.raises(InputError, match=re.escape(message)):
        measured(write(tmp_path / "rows.jsonl", rows), tmp_path, model)


def test_rows_that_do_not_fit_and_rows_that_are_unusable_are_counted(tmp_path, model):
    long = ROWS[0] | {"input": "wave " * 100}
    path = write(tmp_path / "rows.jsonl", [*ROWS, long, {"input": "a"}])
    made = measured({"path": path, "max_bad_rows": 1}, tmp_path, model)
    assert made.counts == {"rows": 8} and made.info["cut"] == 1
    assert sum(made.info["unusable"].values()) == 1


def test_a_guess_is_worth_what_the_measured_rows_say(tmp_path, model):
    rows = [{"input": "a", "target": "b", "choices": ["b", "c"]}, *ROWS]
    made = measured(write(tmp_path / "rows.jsonl", rows), tmp_path, model, limit=1)
    assert made.info["chance"] == 0.5


def test_what_is_told_before_a_training(tmp_path):
    store = Store(str(tmp_path / "store"))

    def told(task, shots=None):
        return check_task((source_of(task, store), shots))

    assert told("hellaswag") is None
    assert "did you mean hellaswag" in told("helaswag")
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert told(path) is None and told(path, 6) is None
    assert "needs more than 7 rows" in told(path, 7)
    assert "several forms" in told(write(tmp_path / "two.jsonl", [ROWS[0], {"text": "a"}]))
    own = write_task_file(tmp_path / "task")
    assert told(own) is None
    base = tmp_path / "task" / "common" / "base.yaml"
    base.write_text(base.read_text().replace("doc_to_text: q", "doc_to_text: '{{q.x.y}}'"))
    assert told(own).startswith("own: the harness ended with: ")


def test_two_tasks_are_checked_at_once(tmp_path):
    """As a worker does; in a fresh process, which has imported nothing yet."""
    paths = [write(tmp_path / f"rows-{i}.jsonl", ROWS) for i in range(4)]
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
from stillhouse.evaluation.harness_tasks import check_task
from stillhouse.evaluation.tasks import TaskSource
tasks = [(TaskSource(f"t{i}", "rows", uris=(path,)), None) for i, path in enumerate(sys.argv[1:])]
with ThreadPoolExecutor(4) as threads:
    print([*threads.map(check_task, tasks)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str([None] * 4), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("task: own\ndataset_kwargs: {data_files: gone.json}\n", InputError, "names 'gone.json'"),
        ("output_type: multiple_choice\n", SpecError, "has no `task: NAME`"),
        ("task: [\n", SpecError, "is no YAML"),
        ("[1]\n", SpecError, "is no YAML mapping"),
        ("task: own\ninclude: gone.yaml\n", InputError, "gone.yaml does not exist"),
        ("task: own\ninclude: own.yaml\n", SpecError, "includes itself"),
        ("task: own\ndataset_path: /data/set\n", SpecError, "is a folder of data"),
        ("task: own\ndataset_kwargs: {data_dir: x}\n", SpecError, "`data_dir: x` is a folder"),
    ],
)
def test_task_files_that_cannot_be_used(content, error, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(error, match=message):
        source_of(str(path), Store(str(tmp_path / "store")))


def test_settings_that_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SpecError, match="two are called 'rows'"):
        list_tasks(TaskEvaluation.model_validate({"tasks": [path, path]}))
    with pytest.raises(ValueError, match="is one `path` alone"):
        TaskEvaluation.model_validate({"tasks": [{"path": "own.yaml", "name": "x"}]})
    with pytest.raises(ValueError, match="give at least one file"):
        TaskEvaluation.model_validate({"tasks": [{"path": []}]})
    with pytest.raises(InputError):
        list_tasks(TaskEvaluation.model_validate({"tasks": [str(tmp_path / "gone.jsonl")]}))
