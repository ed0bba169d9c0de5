"""`job: train` with a masked language model: further training, twice, and what cannot be asked."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from masked_parts import CLS_ID, MASK_ID, put_bert_tokenizer, tiny_masked
from small import LEARNING, MODEL, STYLES, Quiet, make_models, make_world, small_spec
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)

from stillhouse.errors import ModelError, SpecError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.models.shape import ModelShape
from stillhouse.pipelines.given import Needs, check_given
from stillhouse.spec import SelectSpec
from stillhouse.text.pieces import token_ids
from stillhouse.training.hiding import Hiding
from stillhouse.training.spec import TrainSpec

LENGTH, STEPS = 32, 20
MASKED = {"name": "masked_tokens"}


def put_bert(folder, positions=LENGTH + 1, **options):
    """A model and its tokenizer, as a section of a spec."""
    words = [word for some in STYLES.values() for word in some]
    vocab_size = put_bert_tokenizer(folder, words, **options)
    tiny_masked(vocab_size=vocab_size, positions=positions).save_pretrained(folder)
    return {"path": str(folder)}


def spec(folder, **changes):
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "pool" / "*.parquet")},
        "heldout": {"path": str(folder / "target" / "*.parquet")},
        "sequence_length": LENGTH,
        "part_tokens": 4096,
    }
    return TrainSpec.model_validate(content | changes)


def learning(num_steps=STEPS, **changes):
    settings = {"num_tokens": LENGTH * 8 * num_steps, "dtype": "float32", "eval_points": 4}
    return {**settings, **LEARNING, "objective": MASKED} | changes


def train(folder, **changes):
    return run_job(spec(folder, **changes), Quiet())


def totals(result):
    return json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())["totals"]


def losses(result):
    return [point["loss"] for point in totals(result)["points"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a masked model, one whose tokenizer has no mask token, and causal models."""
    folder = make_world(tmp_path_factory.mktemp("masked"), shards=2, per_shard=60)
    bert = put_bert(folder / "bert")
    bare = put_bert(folder / "bare", masks=False)
    return folder, bert, bare, make_models(folder / "causal")


@pytest.fixture(scope="module")
def further(ray_cluster, place):
    folder, bert, *_ = place
    return train(folder, init=bert, train=learning())


def test_a_further_trained_model_is_one_of_transformers(further):
    """It has learned, and is measured as it says."""
    model = AutoModelForMaskedLM.from_pretrained(further["artifacts"]["model"]).eval()
    words = AutoTokenizer.from_pretrained(further["artifacts"]["model"])
    assert words("the ship")["input_ids"][0] == CLS_ID == words.cls_token_id
    assert words.mask_token_id == MASK_ID
    assert words.decode(words("the ship")["input_ids"]) == "[CLS] the ship [SEP]"
    examples = [words("the ship wind wave sail") for _ in range(4)]
    made = DataCollatorForLanguageModeling(words)(examples)
    assert model(**made).logits.shape == (4, 7, len(words))
    curve = totals(further)["curve"]
    assert curve[-1][1] < curve[0][1]
    held = heldout_tokens(further)
    given, chosen = Hiding(MASK_ID, len(words)).held_out(held)
    cls = torch.full((len(held), 1), CLS_ID)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([cls, given], 1)).logits[:, 1:]
    wanted = cross_entropy(logits[chosen > 0], held[chosen > 0])
    assert further["train"]["heldout_nll"] == pytest.approx(float(wanted), rel=1e-5)


def heldout_tokens(result):
    """Of the larger one of the run's two artifacts of tokens."""
    store = Path(result["run"]).parents[1]
    found = [json.loads(path.read_text()) for path in store.glob("tokens/*/manifest.json")]
    parts = max((one["parts"] for one in found), key=lambda p: sum(x["num_rows"] for x in p))
    tables = [token_ids(pq.read_table(store / part["path"])) for part in parts]
    return torch.from_numpy(np.concatenate(tables).astype(np.int64))


def test_no_report_speaks_of_the_likelihood_of_a_text(further):
    assert further["train"]["bits_per_byte"] is None
    sources = further["train"]["sources"]
    assert sources and all(one["bits_per_byte"] is None for one in sources.values())
    page = Path(further["run"], "report.html").read_text()
    assert "bits per byte" not in page and "predicted tokens" not in page
    assert "nats per hidden token" in page


def test_it_teaches_its_own_start(place, further):
    folder, bert, *_ = place
    objective = {"name": "self_distillation", "teachers": [{"from": further["run"]}]}
    near = train(folder, init=bert, train=learning(objective=objective))
    assert losses(near)[0] == pytest.approx(losses(further)[0], rel=1e-6)
    assert losses(near)[-1] != losses(further)[-1]
    start, far, close = (
        AutoModelForMaskedLM.from_pretrained(path).state_dict()
        for path in (bert["path"], further["artifacts"]["model"], near["artifacts"]["model"])
    )
    assert far.keys() == close.keys() == start.keys()
    width, mlp, layers, vocab = 32, 64, 2, len(start["bert.embeddings.word_embeddings.weight"])
    weights = layers * (4 * width**2 + 2 * width * mlp) + width**2 + round(0.15 * vocab * width)
    each = 2 * weights + 4 * LENGTH * layers * width
    tokens = LENGTH * 8 * STEPS
    assert further["cost"]["flops"]["train"] == pytest.approx(3 * each * tokens, rel=1e-4)
    # the student reads its sequences twice, the teacher once
    assert near["cost"]["flops"]["train"] == pytest.approx((6 + 1) * each * tokens, rel=1e-4)
    again = train(folder, init={"from": near["run"]}, train=learning(2))
    assert again["train"]["num_steps"] == 2


@pytest.mark.soak
def test_two_workers_learn_what_one_does(place, further):
    folder, bert, *_ = place
    made = []
    for workers in (1, 2):
        objective = {"name": "self_distillation"}
        objective |= {"teachers": [{"path": further["artifacts"]["model"]}]}
        options = {"train": learning(objective=objective), "compute": {"trainers": workers}}
        made.append(train(folder, init=bert, store=str(folder / f"{workers}"), **options))
    assert losses(made[1]) == pytest.approx(losses(made[0]), rel=1e-5)


def test_a_plan_prices_it(place, tmp_path):
    folder, bert, *_ = place
    planned = plan_job(spec(folder, init=bert, store=str(tmp_path), train=learning()))
    assert planned["steps"]["train"]["tokens"] == LENGTH * 8 * STEPS


def test_what_is_refused(place):
    """Before any work: without Ray, which is not started here."""
    folder, bert, bare, causal = place
    ours, theirs = {"init": bert}, {"init": causal["prior"], "tokenizer": causal["tokenizer"]}
    maskless = {"init": bare, "tokenizer": bare | {"eos_token": "[SEP]"}}
    distil = {"name": "distil", "teachers": [bert]}
    near = {"name": "self_distillation"}
    for changes, objective, error, wanted in (
        (ours, {}, SpecError, "objective: cross_entropy` trains causal .* one of masked_tokens"),
        (ours, distil, SpecError, "objective: distil` trains causal"),
        (theirs, MASKED, SpecError, "is a causal one: leave `objective` out"),
        (theirs, near | {"teachers": [bert]}, ModelError, "is a masked language model, the one"),
        (ours, near | {"teachers": [causal["prior"]]}, ModelError, "is a causal language model"),
        (ours | {"lora": {}}, MASKED, SpecError, "`lora` needs a causal"),
        (maskless, MASKED, ModelError, "has no mask token"),
    ):
        with pytest.raises(error, match=wanted):
            plan_job(spec(folder, **changes, train=learning(objective=objective)))
    with pytest.raises(ValueError, match="masked_tokens` needs `init`"):
        spec(folder, model=MODEL, train=learning())


def test_scoring_models_have_to_be_causal(place):
    folder, bert, *_ = place
    for key in ("prior", "conditional"):
        changes = {"tokenizer": bert, key: bert | LEARNING}
        with pytest.raises(ModelError, match=f"{key} .* is a masked language model"):
            check_given(SelectSpec.model_validate(small_spec(folder, **changes)))
    shape = ModelShape("bert", 32, 99, 64, 1, 1, masked=True)
    with pytest.raises(ModelError, match="network 'bert' is a masked language model"):
        Needs(vocab_size=99).check({"network": "bert"}, {"network": shape})
    online = {"prior": bert, "conditional": bert, "tau": 2}
    training = {"num_tokens": 4096, "select": "online"}
    with pytest.raises(ModelError, match=r"online\.prior .* is a masked language model"):
        plan_job(spec(folder, tokenizer=bert, model=MODEL, online=online, train=training))


def test_sequences_longer_than_the_model_reads_are_refused(ray_cluster, place, tmp_path):
    """CLS counts."""
    folder, *_ = place
    short = put_bert(tmp_path / "short", positions=LENGTH)
    with pytest.raises(ModelError, match="reads at most 32 tokens, `sequence_length` is 33"):
        train(folder, init=short, train=learning())
