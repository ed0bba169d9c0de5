"""PDS as a scorer of texts: what `select` gets is minus the gradient of the target's loss."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small import small_spec

from stillhouse.distillation.adjoint import unrolled
from stillhouse.distillation.pds import PdsRun, uniform_weights
from stillhouse.errors import InputError
from stillhouse.selection import pds
from stillhouse.selection.own import find_code, fit
from stillhouse.selection.pds import PdsScorer
from stillhouse.spec import SelectSpec

SMALL = {"hidden_size": 16, "num_layers": 1, "window": 16, "num_warmup": 30, "num_target": 8}
LOW, HIGH = "abcdefgh", "stuvwxyz"


def texts(letters, count, seed):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), 24)) for _ in range(count)]


TARGET, POOL = texts(LOW, 20, 0), texts(LOW, 20, 1) + texts(HIGH, 20, 2)


@pytest.fixture(scope="module")
def scorer():
    code = find_code("stillhouse.selection.pds:PdsScorer")
    learned = code.build({**SMALL, "num_steps": 10, "every": 5})
    state = fit(code, learned, TARGET, POOL)
    fresh = code.build({**SMALL, "num_steps": 10, "every": 5})
    fresh.load(state)
    return fresh


def test_its_short_name(tmp_path):
    ours = {"prior": None, "conditional": None}
    short, long = (
        SelectSpec.model_validate(
            {k: v for k, v in small_spec(tmp_path, scorer=s).items() if k not in ours}
        )
        for s in ("pds", {"import": "stillhouse.selection.pds:PdsScorer"})
    )
    assert short.scorer == long.scorer is not None
    with pytest.raises(ValidationError, match="scorer"):
        SelectSpec.model_validate(small_spec(tmp_path, scorer="pdx"))


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
    weights = [torch.cat([w, bit]) for w in uniform_weights(plain, start)]
    expected = unrolled(run.descent(weights, start), start, 3, run.objective, [bit]).leaves[0]
    assert scorer.score([text])[0] == pytest.approx(-float(expected), rel=1e-4)


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no text of the target"):
        PdsScorer(**SMALL).fit(["", "a"], POOL)


def test_code_of_the_scorer_is_its_identity():
    code = find_code("stillhouse.selection.pds:PdsScorer")
    assert [path for path, _ in code.files] == [
        "stillhouse/distillation/adjoint.py",
        "stillhouse/distillation/pds.py",
        "stillhouse/selection/pds.py",
    ]
    assert code.build(SMALL).__class__ is pds.PdsScorer
