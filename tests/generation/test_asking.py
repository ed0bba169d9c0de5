"""Programs that ask models: batches, threads, equal calls, answers that are kept."""

import threading
import time

import pytest
from generation.stand_in import StandIn, Unlimited

from stillhouse.errors import SpentError
from stillhouse.generation.asking import Answer, Ask, Asker
from stillhouse.storage.artifact import Store


def asker(tmp_path, spending=None, **backends):
    return Asker(Store(str(tmp_path)), backends, spending or Unlimited())


def talk(role, name, turns):
    """Asks for the next turn with what was said before."""
    said = name
    for _ in range(turns):
        [answer] = yield [Ask(role, said)]
        said = answer.text
    return {"said": said}


class Slow(StandIn):
    """An endpoint that notes how many calls it has at once."""

    in_flight = 8

    def __init__(self, name):
        super().__init__(name)
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def answer(self, asks):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        try:
            return super().answer(asks)
        finally:
            with self.lock:
                self.now -= 1


class Batched(StandIn):
    """Notes the sizes of its batches."""

    def __init__(self, name):
        super().__init__(name)
        self.sizes = []

    def answer(self, asks):
        self.sizes.append(len(asks))
        return super().answer(asks)


def expected(name, turns, model="m"):
    said = name
    for _ in range(turns):
        said = StandIn(model).reply(Ask("strong", said))
    return {"said": said}


def test_a_model_here_answers_all_that_wait_at_once(tmp_path):
    model = Batched("m")
    turns = [1, 3, 2, 3]
    found = asker(tmp_path, strong=model).run(
        talk("strong", f"p{i}", n) for i, n in enumerate(turns)
    )
    assert found == [expected(f"p{i}", n) for i, n in enumerate(turns)]
    assert model.sizes == [4, 3, 2]


def test_an_endpoint_has_as_many_calls_at_once_as_it_may(tmp_path):
    model = Slow("m")
    asked = asker(tmp_path, strong=model)
    found = asked.run(talk("strong", f"p{i}", 3) for i in range(24))
    assert found == [expected(f"p{i}", 3) for i in range(24)]
    assert model.most == 8 and asked.counts["calls"] == 72


def test_equal_calls_are_made_once(tmp_path):
    for kind in (Batched, Slow):
        model = kind("m")
        asked = asker(tmp_path / kind.__name__, strong=model)
        found = asked.run(talk("strong", "same", 2) for _ in range(5))
        assert found == [expected("same", 2)] * 5
        assert asked.counts["calls"] == asked.spending.calls == 2
        assert max(model.asked.values()) == 1


def test_both_kinds_side_by_side(tmp_path):
    here, far = Batched("here"), Slow("far")
    asked = asker(tmp_path, strong=far, student=here)

    def program(i):
        strong, student = yield [Ask("strong", f"p{i}"), Ask("student", f"p{i}")]
        return {"texts": [strong.text, student.text]}

    found = asked.run(program(i) for i in range(12))
    for i, one in enumerate(found):
        wanted = [StandIn(name).reply(Ask("strong", f"p{i}")) for name in ("far", "here")]
        assert one["texts"] == wanted
    assert sum(far.asked.values()) == sum(here.asked.values()) == 12


def test_answers_are_kept_and_the_first_one_counts(tmp_path):
    first = asker(tmp_path, strong=StandIn("m"))
    first.run([talk("strong", "p", 2)])

    class Other(StandIn):
        def reply(self, ask):
            return "something else"

    again = asker(tmp_path, strong=Other("m"))
    assert again.run([talk("strong", "p", 2)]) == [expected("p", 2)]
    assert again.counts["calls"] == 0 and again.counts["cached_calls"] == 2
    # a worker that answered at the same time, and wrote first
    raced = asker(tmp_path, strong=Other("m"))
    raced.stored = lambda names: {}
    assert raced.run([talk("strong", "p", 1)]) == [expected("p", 1)]


class Spent(Unlimited):
    """Allows some calls."""

    def take(self, role, calls):
        if self.calls + calls > 5:
            raise SpentError("spent")
        super().take(role, calls)


@pytest.mark.parametrize("kind", [Batched, Slow])
def test_a_spent_budget_stops_and_keeps_what_was_answered(tmp_path, kind):
    with pytest.raises(SpentError):
        asker(tmp_path, Spent(), strong=kind("m")).run(talk("strong", f"p{i}", 9) for i in range(2))
    again = asker(tmp_path, strong=kind("m"))
    assert again.run(talk("strong", f"p{i}", 9) for i in range(2))
    assert again.counts["cached_calls"] in (4, 5) and again.counts["calls"] >= 13


def test_an_error_of_a_call_ends_the_run(tmp_path):
    class Broken(Slow):
        def answer(self, asks):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        asker(tmp_path, strong=Broken("m")).run(talk("strong", f"p{i}", 1) for i in range(4))


@pytest.mark.parametrize("answer", [Answer(fault="too long"), Answer("")])
def test_a_fault_is_an_answer_which_is_not_kept(tmp_path, answer):
    class Faulty(StandIn):
        def answer(self, asks):
            return [answer for _ in asks]

    def program():
        [said] = yield [Ask("strong", "p")]
        return {"fault": said.fault, "text": said.text}

    found = asker(tmp_path, strong=Faulty("m")).run([program()])
    assert found == [{"fault": answer.fault, "text": ""}]
    assert asker(tmp_path, strong=StandIn("m")).run([program()])[0]["text"]
