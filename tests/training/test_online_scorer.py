"""Scorers built from plain values: real models, held-out text and hidden rows left out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import STYLES, make_models
from trainings import tokens_of, train_task

from stillhouse.models.scoring import load_scoring_model
from stillhouse.spec import ScoringSettings
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.online import best_of, online_scorer
from stillhouse.training.task import OnlineTask, StartModel

LENGTH, ROWS = 24, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {n: s["path"] for n, s in make_models(tmp_path_factory.mktemp("models")).items()}


def write_rows(path, tokenizer, seed, count):
    """Sequences of words of one style a row."""
    rng = np.random.default_rng(seed)
    styles = list(STYLES.values())
    texts = [" ".join(rng.choice(styles[i % len(styles)], 60)) for i in range(count)]
    ids = np.stack([ids[:LENGTH] for ids in tokenizer.encode_batch(texts)]).astype(np.uint16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), LENGTH)
    pq.write_table(pa.table({"input_ids": column}), path)
    return ids


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """A pool of two parts; its row 3 of part 1 is the held-out text."""
    folder = tmp_path_factory.mktemp("online")
    tokenizer = load_tokenizer(models["tokenizer"], None)
    parts = [str(folder / f"{i}.parquet") for i in range(2)]
    ids = [write_rows(path, tokenizer, i, ROWS) for i, path in enumerate(parts)]
    heldout = str(folder / "heldout.parquet")
    pq.write_table(pq.read_table(parts[1]).slice(3, 1), heldout)
    online = OnlineTask(
        candidates=2 * ROWS,
        lanes=4,
        shuffled=5,
        prior=StartModel(models["prior"], "p"),
        conditional=StartModel(models["conditional"], "c"),
        scoring=ScoringSettings(),
        hidden={0: np.array([2, 7])},
        gpus=0,
        threads=1,
    )
    held = tokens_of(heldout)
    return ids, train_task(tokens_of(*parts), models["tokenizer"], 4, heldout=held, online=online)


def test_scores_are_the_difference_of_mean_losses(made, models):
    ids, task = made
    window = online_scorer(task, 0, 1).window(0)
    assert sorted(map(tuple, window.samples.tolist())) == [
        (p, r) for p in range(2) for r in range(ROWS)
    ]
    losses = {}
    for name in ("prior", "conditional"):
        model = load_scoring_model(models[name], ScoringSettings(), device="cpu", gpus=0, threads=1)
        losses[name] = [model.token_nll(part).mean(axis=1) for part in ids]
    for (part, row), score in zip(window.samples.tolist(), window.scores.tolist(), strict=True):
        if (part, row) not in {(0, 2), (0, 7), (1, 3)}:
            expected = losses["prior"][part][row] - losses["conditional"][part][row]
            assert score == pytest.approx(expected, abs=1e-5)


def test_held_out_and_hidden_rows_have_no_score(made):
    _, task = made
    window = online_scorer(task, 0, 1).window(0)
    without = window.samples[np.isnan(window.scores)].tolist()
    assert sorted(without) == [[0, 2], [0, 7], [1, 3]]


def test_two_scorers_choose_what_one_does(made):
    _, task = made
    [alone], pair = [online_scorer(task, 0, 1)], [online_scorer(task, k, 2) for k in range(2)]
    for number in (0, 2):
        one = best_of([alone.window(number)], 6)
        two = best_of([scorer.window(number) for scorer in pair], 6)
        assert one.samples.tolist() == two.samples.tolist()
        assert one.scores.tolist() == two.scores.tolist()
