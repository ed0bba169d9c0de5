import numpy as np

from stillhouse.training.batches import TokenSources
from stillhouse.training.evaluate import SourceLoss, SourceLossTally
from stillhouse.training.group import WorkerGroup


def test_tokens_belong_to_the_owner_of_their_position():
    tally = SourceLossTally()
    sources = TokenSources(np.array([[0, 0, 1], [2, 1, 1]], np.int32), ("web", "books", "code"))
    tally.add(np.array([[1, 2], [3, 4]], np.float32), sources)
    tally.add(np.array([[5, 6], [7, 8]], np.float32), sources)
    found = tally.take(WorkerGroup())
    # the first position of a sequence is not predicted, so `code` has no token
    assert found == {"books": SourceLoss((2 + 3 + 4 + 6 + 7 + 8) / 6, 6), "web": SourceLoss(3, 2)}
    assert tally.take(WorkerGroup()) == {}


def test_names_may_come_later():
    tally = SourceLossTally()
    tally.add(np.array([[1]], np.float32), TokenSources(np.array([[0, 0]], np.int32), ("a",)))
    tally.add(np.array([[3]], np.float32), TokenSources(np.array([[1, 1]], np.int32), ("a", "b")))
    assert tally.take(WorkerGroup()) == {"a": SourceLoss(1, 1), "b": SourceLoss(3, 1)}
