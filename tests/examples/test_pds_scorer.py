"""PDS as a scorer of texts: what `select` gets is minus the gradient of the target's loss."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from unrolled import unrolled

from stillhouse.errors import DivergedError, InputError
from stillhouse.selection.own import find_code, fit

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pds_scorer = import_module("pds_scorer")
PdsRun, PdsScorer = pds_scorer.PdsRun, pds_scorer.PdsScorer
SMALL = {"hidden_size": 16, "num_layers": 1, "window": 16, "num_warmup": 30, "num_target": 8}
LOW, HIGH = "abcdefgh", "stuvwxyz"


def texts(letters, count, seed):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), 24)) for _ in range(count)]


TARGET, POOL = texts(LOW, 20, 0), texts(LOW, 20, 1) + texts(HIGH, 20, 2)


@pytest.fixture(scope="module")
def scorer():
    code = find_code("pds_scorer:PdsScorer")
    learned = code.build({**SMALL, "num_steps": 10, "every": 5})
    state = fit(code, learned, TARGET, POOL)
    fresh = code.build({**SMALL, "num_steps": 10, "every": 5})
    fresh.load(state)
    return fresh


def test_texts_like_the_target_score_higher(scorer):
    alike, other = scorer.score(texts(LOW, 16, 3)), scorer.score(texts(HIGH, 16, 4))
    assert alike.min() > other.max()
    assert alike.mean() > 0 > other.mean()


def test_a_text_scores_the_same_in_any_company(scorer):
    given = [*texts(LOW, 5, 5), "short", "", "y" * 200]
    alone = np.array([scorer.score([text])[0] for text in given])
    np.testing.assert_array_equal(scorer.score(given), alone)
    assert np.isnan(alone[6]) and np.isfinite(np.delete(alone, 6)).all()


def test_scores_are_autograds_where_every_step_counts():
    """A window with weight 0 beside each step's batch: its score is minus dJ/dweight."""
    settings = {**SMALL, "num_warmup": 0, "num_steps": 3, "every": 1, "num_windows": 1}
    scorer = PdsScorer(**settings)
    state = scorer.fit(TARGET, POOL)
    scorer.load(state)
    text = texts(HIGH, 1, 6)[0][:16]
    rng = np.random.default_rng(0)
    aims = scorer._drawn(TARGET, 8, rng, "target")
    batches = scorer._drawn(POOL, 96, rng, "pool").split(32)
    extra = torch.tensor(scorer._row(text.encode(), 0))[None]
    run = PdsRun(scorer._losses, [torch.cat([b, extra]) for b in batches], aims, 0.1)
    start = torch.tensor(state["states"][0])
    bit = torch.zeros(1, requires_grad=True)
    plain = PdsRun(scorer._losses, batches, aims, 0.1)
    weights = [torch.cat([w, bit]) for w in pds_scorer.uniform_weights(plain, start)]
    expected = unrolled(run.descent(weights, start), start, 3, run.objective, [bit]).leaves[0]
    assert scorer.score([text])[0] == pytest.approx(-float(expected), rel=1e-4)


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no text of the target"):
        PdsScorer(**SMALL).fit(["", "a"], POOL)


def test_the_step_that_counts_stands_for_the_others():
    settings = {**SMALL, "num_warmup": 0, "num_steps": 2}
    each, second = (PdsScorer(**settings, every=every) for every in (1, 2))
    state, (text,) = each.fit(TARGET, POOL), texts(HIGH, 1, 6)
    assert len(state["states"]) == 2
    second.load(second.fit(TARGET, POOL))
    each.load({name: rows[:1] for name, rows in state.items()})
    assert second.score([text])[0] == pytest.approx(2 * each.score([text])[0], rel=1e-5)


def test_directional_derivative_is_the_gradients_product():
    scorer = PdsScorer(**SMALL)
    theta = scorer._network.parameters().requires_grad_()
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0))
    windows = torch.tensor(np.stack([scorer._row(text.encode(), 0) for text in POOL[:3]]))
    products = [
        torch.autograd.grad(value, theta, retain_graph=True)[0] @ direction
        for value in scorer._losses(theta, windows)
    ]
    found = pds_scorer.directional(scorer._losses, theta.detach(), direction, windows)
    torch.testing.assert_close(found, torch.stack(products), rtol=1e-4, atol=1e-5)


def test_a_run_that_diverges_is_named():
    scorer = PdsScorer(**{**SMALL, "num_warmup": 0}, num_steps=3, learning_rate=1e30)
    with pytest.raises(
        DivergedError, match=r"not finite after \d of 3 steps at learning rate 1e\+"
    ):
        scorer.fit(TARGET, POOL)
