"""A scorer that learned the order of a sample's losses orders other texts by theirs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import make_models, rows
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import CustomCodeError
from stillhouse.selection.own import find_code, fit

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
STYLES = ["sea", "code", "law", "food"]


def texts(seed, count, styles=STYLES):
    return [" ".join(row["text"].split()[:20]) for row in rows(seed, count, styles)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A prior that saw nothing, and a conditional that saw one style; both as paths."""
    made = make_models(tmp_path_factory.mktemp("ranked"))
    paths = {name: section["path"] for name, section in made.items()}
    tokenizer = AutoTokenizer.from_pretrained(paths["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(paths["prior"])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for text in texts(1, 60, ["sea"]):
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.save_pretrained(paths["conditional"])
    return paths


@pytest.fixture(scope="module")
def scorer(models):
    code = find_code("ranked_scorer:RankedScorer")
    settings = {**models, "num_steps": 100, "num_tokens": 32}
    state = fit(code, code.build(settings), [], texts(2, 200))
    fresh = code.build(settings)
    fresh.load(state)
    return fresh


def values(models, found):
    """Losses under the prior minus those under the conditional, from their logits."""
    tokenizer = AutoTokenizer.from_pretrained(models["tokenizer"])
    losses = []
    for name in ("prior", "conditional"):
        model = AutoModelForCausalLM.from_pretrained(models[name]).eval()
        with torch.no_grad():
            ids = [torch.tensor(tokenizer(text)["input_ids"][:32]) for text in found]
            losses.append([cross_entropy(model(i[None]).logits[0, :-1], i[1:]).item() for i in ids])
    return np.subtract(*losses)


def share_right(scores, true):
    """Of all pairs, those that scores order as the true values do; 0.5 by chance."""
    pairs = np.triu_indices(len(true), 1)
    gaps = [np.sign(x[pairs[0]] - x[pairs[1]]) for x in (scores, true)]
    return float((gaps[0] == gaps[1]).mean())


def test_it_orders_new_texts_by_their_losses(models, scorer):
    """All of them, and those of the other styles alone, which no label tells apart."""
    for styles, least in ((STYLES, 0.75), (STYLES[1:], 0.6)):
        found = texts(3, 120, styles)
        assert share_right(scorer.score(found), values(models, found)) > least


def test_a_text_scores_the_same_in_any_company(scorer):
    found = [*texts(4, 5), ""]
    alone = [scorer.score([text])[0] for text in found]
    np.testing.assert_array_equal(scorer.score(found), alone)


def test_a_sample_without_pairs_is_refused(models):
    code = find_code("ranked_scorer:RankedScorer")
    with pytest.raises(CustomCodeError, match="no two texts to compare"):
        fit(code, code.build(models), [], ["", texts(5, 1)[0]])
