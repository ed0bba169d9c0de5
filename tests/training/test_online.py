"""Online batches: the best of each window, for any number of scorers and workers; real scorers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selections import rows_table
from small import STYLES, make_models
from trainings import tokens_of, train_task

from stillhouse.errors import ArtifactError, ModelError
from stillhouse.models.scoring import load_scoring_model
from stillhouse.spec import ScoringSettings
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.online import (
    OnlineBatches,
    ScoredWindow,
    WindowScorer,
    best_of,
    online_scorer,
)
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.stream import TokenSources, TokenStream
from stillhouse.training.task import OnlineTask, StartModel

PART_ROWS = (30, 50, 40)
WINDOW, BATCH, LANES = 24, 6, 4


class Losses:
    """A model whose losses are arithmetic on the tokens."""

    def __init__(self, factor):
        self.factor = factor

    def token_nll(self, input_ids):
        return (input_ids[:, 1:] * self.factor % 17).astype(np.float32)


PRIOR, CONDITIONAL = Losses(5), Losses(3)


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    made = []
    for number, rows in enumerate(PART_ROWS):
        made.append(str(folder / f"{number}.parquet"))
        pq.write_table(rows_table(sum(PART_ROWS[:number]), rows), made[-1], row_group_size=7)
    return made


def candidates_order():
    return SampleOrder([Rows(PART_ROWS)], global_batch=WINDOW, seed=3, lanes=LANES, window=5)


def stream(uris, rank=0, num_workers=1):
    fetch = read_ahead(PartReader(uris), 8)
    return TokenStream(candidates_order(), fetch, rank=rank, num_workers=num_workers)


def scorers(uris, count, excluded=None):
    return [
        WindowScorer(stream(uris, k, count), PRIOR, CONDITIONAL, excluded) for k in range(count)
    ]


def batches(made, rank=0, num_workers=1):
    return OnlineBatches(
        lambda number: [scorer.window(number) for scorer in made],
        candidates_order().describe(),
        global_batch=BATCH,
        rank=rank,
        num_workers=num_workers,
    )


def test_each_batch_holds_the_best_of_its_window(uris):
    whole, online = stream(uris), batches(scorers(uris, 1))
    for _ in range(7):
        window, batch = whole.next_batch(), online.next_batch()
        ids = window.inputs.numpy()
        scores = (PRIOR.token_nll(ids) - CONDITIONAL.token_nll(ids)).mean(axis=1)
        best = sorted(range(WINDOW), key=lambda i: (-scores[i], i))[:BATCH]
        assert batch.samples.tolist() == window.samples[sorted(best)].tolist()
        assert batch.inputs.tolist() == ids[sorted(best)].tolist()
        assert batch.sources.present() == ["web"]


@pytest.mark.parametrize(("num_scorers", "num_workers"), [(1, 2), (2, 1), (3, 3), (4, 2)])
def test_any_number_of_scorers_and_workers(uris, num_scorers, num_workers):
    alone = batches(scorers(uris, 1))
    together = [
        batches(scorers(uris, num_scorers), rank, num_workers) for rank in range(num_workers)
    ]
    for _ in range(6):
        shares = [worker.next_batch() for worker in together]
        expected = alone.next_batch()
        assert np.concatenate([s.samples for s in shares]).tolist() == expected.samples.tolist()
        ids = np.concatenate([s.inputs.numpy() for s in shares])
        assert ids.tolist() == expected.inputs.tolist()


def test_resumes_from_a_state(uris):
    first = batches(scorers(uris, 2))
    for _ in range(3):
        first.next_batch()
    state = first.state_dict()
    later = batches(scorers(uris, 3))
    later.load_state_dict(state)
    assert later.state_dict() == state
    for _ in range(3):
        assert later.next_batch().samples.tolist() == first.next_batch().samples.tolist()


def test_a_restarted_scorer_seeks(uris):
    [steady], [lost] = scorers(uris, 1), scorers(uris, 1)
    steady_windows = [steady.window(n) for n in range(4)]
    for number in (2, 3, 1):
        assert lost.window(number).samples.tolist() == steady_windows[number].samples.tolist()


def test_the_state_of_other_candidates_is_refused(uris):
    state = batches(scorers(uris, 1)).state_dict() | {"global_batch": 7}
    with pytest.raises(ArtifactError, match="chose its batches from"):
        batches(scorers(uris, 1)).load_state_dict(state)


def test_excluded_rows_are_not_chosen(uris):
    seen = []

    def odd(batch):
        seen.append(batch.samples)
        return batch.samples[:, 1] % 2 == 1

    chosen = batches(scorers(uris, 2, odd)).next_batch().samples
    assert (chosen[:, 1] % 2 == 0).all()
    assert len(np.concatenate(seen)) == WINDOW


def share(scores, names=("web",)):
    n = len(scores)
    samples = np.stack([np.zeros(n, np.int64), np.arange(n)], axis=1)
    sources = TokenSources(np.zeros((n, 2), np.int32), names)
    return ScoredWindow(np.zeros((n, 2), np.int64), samples, np.float32(scores), sources)


def test_the_first_of_equal_scores_is_kept_and_never_nan():
    kept = best_of([share([1, np.nan, 2]), share([2, 1, 1], ("sea",))], 3)
    assert kept.scores.tolist() == [1, 2, 2]
    assert kept.samples[:, 1].tolist() == [0, 2, 0]
    names = [kept.sources.names[code] for code in kept.sources.codes[:, 0]]
    assert names == ["web", "web", "sea"]
    with pytest.raises(ModelError, match=r"1 of 3 candidates may not .* 3 are to be kept"):
        best_of([share([1, np.nan, 2])], 3)


LENGTH, ROWS = 24, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {n: s["path"] for n, s in make_models(tmp_path_factory.mktemp("models")).items()}


def write_rows(path, tokenizer, seed, count):
    """Sequences of words, each of one style."""
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
    """Held-out and hidden rows have none."""
    ids, task = made
    window = online_scorer(task, 0, 1).window(0)
    unscored = window.samples[np.isnan(window.scores)].tolist()
    assert sorted(unscored) == [[0, 2], [0, 7], [1, 3]]
    assert sorted(map(tuple, window.samples.tolist())) == [
        (p, r) for p in range(2) for r in range(ROWS)
    ]
    losses = {}
    for name in ("prior", "conditional"):
        model = load_scoring_model(models[name], ScoringSettings(), device="cpu", gpus=0, threads=1)
        losses[name] = [model.token_nll(part).mean(axis=1) for part in ids]
    for (part, row), score in zip(window.samples.tolist(), window.scores.tolist(), strict=True):
        if not np.isnan(score):
            expected = losses["prior"][part][row] - losses["conditional"][part][row]
            assert score == pytest.approx(expected, abs=1e-5)


def test_two_scorers_choose_what_one_does(made):
    _, task = made
    [alone], pair = [online_scorer(task, 0, 1)], [online_scorer(task, k, 2) for k in range(2)]
    for number in (0, 2):
        one = best_of([alone.window(number)], 6)
        two = best_of([scorer.window(number) for scorer in pair], 6)
        assert one.samples.tolist() == two.samples.tolist()
        assert one.scores.tolist() == two.scores.tolist()
