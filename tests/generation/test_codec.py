"""CodecLM's loop against the published vectors, and its invariants with a stand-in model."""

import json
from collections import Counter

import pytest
from generation.stand_in import StandIn, Unlimited
from hypothesis import given
from hypothesis import strategies as st
from vector_cases import VECTORS

from stillhouse.generation.asking import Ask, Asker, call_name
from stillhouse.generation.judges import Pairwise, parse_scores, recovery_ratio, verdict
from stillhouse.generation.methods.codec import Codec, mixed, parse_metadata, theta_of
from stillhouse.storage.artifact import Store

CASES = {
    case["description"].split(",")[0].split(":")[0]: case
    for case in json.loads((VECTORS / "kd_codeclm_01.json").read_text())["cases"]
}
SEEDS = [{"id": f"{n}", "instruction": f"seed {n}"} for n in range(12)]


class Desk:
    """A workshop in this process; `kept` says what the screen lets through."""

    def __init__(self, method, asker, judge=None, kept=lambda item, key: True):
        self.method, self.asker, self.judge = method, asker, judge or Pairwise()
        self.kept, self.dropped = kept, Counter()
        self.warned, self.ran, self.told = [], [], []

    def run(self, step, program, items):
        self.ran.append((step, len(items)))
        work = getattr(self.method, program)
        return self.asker.run(work(item, self.judge) for item in items)

    def screened(self, items, *keys):
        kept = [item for item in items if all(self.kept(item, key) for key in keys)]
        self.drop("screened", items[len(kept) :])
        return kept

    def delivered(self, items, key):
        self.told.extend(item[key] for item in items)

    def drop(self, reason, items):
        self.dropped[reason] += len(items)

    def warn(self, text):
        self.warned.append(text)


def desk(tmp_path, student=None, **settings):
    strong = StandIn("strong")
    backends = {"strong": strong, "student": student or StandIn("student"), "judge": strong}
    settings = {"num_pairs": 40, "theta": 3, "num_metadata": 10, "waves": 1} | settings
    method = Codec(**settings)
    return Desk(method, Asker(Store(str(tmp_path)), backends, Unlimited()))


def test_metadata_are_parsed_as_the_port_does():
    case = CASES["metadata parser"]
    found = [parse_metadata(text) for text in case["inputs"]["responses"]]
    assert found == case["outputs"]["parsed"]


def test_the_filter_keeps_what_the_vectors_keep():
    case = CASES["contrastive filter"]
    theta = case["inputs"]["theta"]
    for scores, row in zip(case["inputs"]["scores"], case["outputs"]["rows"], strict=True):
        strong, student = scores["strong_scores_two_orders"], scores["target_scores_two_orders"]
        gap = sum(strong) / 2 - sum(student) / 2
        assert gap == row["gap"]
        word = "strong" if gap > 0 else "target"
        kept = f"keep_{word}_response" if abs(gap) > theta else "to_next_round"
        assert kept == row["decision"]


class Scripted(StandIn):
    """Judges with given scores in both orders, by the number of the instruction."""

    scores = ()

    def reply(self, ask):
        if ask.prompt.startswith("Two assistants"):
            at = int(ask.prompt.split("instruction ")[1].split()[0])
            of = self.scores[at]
            strong_first = ask.prompt.index("strong answers") < ask.prompt.index("student answers")
            order = 0 if strong_first else 1
            pair = of["strong_scores_two_orders"][order], of["target_scores_two_orders"][order]
            first, second = pair if strong_first else pair[::-1]
            return f"First: {first}\nSecond: {second}"
        return super().reply(ask)


def test_the_loop_decides_as_the_vectors(tmp_path):
    """Through the judge's prompts, in both orders, and the loop's own cut."""
    case = CASES["contrastive filter"]
    judge = Scripted("strong")
    judge.scores = case["inputs"]["scores"]
    shop = desk(tmp_path, num_pairs=len(judge.scores), iterations=1)
    shop.asker.backends["judge"] = judge
    items = [
        {"instruction": f"instruction {n} .", "round": 1, "draw": n, "history": []}
        for n in range(len(judge.scores))
    ]
    judged = shop.run("judge", "answer", items)
    rows = case["outputs"]["rows"]
    assert [one["gap"] for one in judged] == [row["gap"] for row in rows]
    means = [[one["strong_score"], one["student_score"]] for one in judged]
    assert means == [[row["strong_mean"], row["target_mean"]] for row in rows]
    kept = {"keep_strong_response": "strong", "keep_target_response": "student"}
    for one, row in zip(judged, rows, strict=True):
        if row["decision"] in kept:
            assert one["answered_by"] == kept[row["decision"]]
            assert one["response"].startswith(f"{one['answered_by']} answers")


def test_two_orders_and_the_recovery_ratio():
    case = CASES["two-order judging"]
    scores = {"a_wins": (0.0, 1.0), "tie": (1.0, 1.0), "b_wins": (1.0, 0.0)}
    found = []
    for pair in case["inputs"]["pairs"]:
        orders = [scores[word] for word in pair]
        found.append(verdict(([one[0] for one in orders], [one[1] for one in orders])))
    assert found == case["outputs"]["verdicts_for_a"]
    wins, ties, losses = case["inputs"]["wins_ties_losses"]
    words = ["win"] * wins + ["tie"] * ties + ["loss"] * losses
    assert recovery_ratio(words) == pytest.approx(case["outputs"]["crr"])
    assert recovery_ratio([]) is None


def test_rounds_are_counted_as_the_vectors(tmp_path):
    """As many items as the vectors say have a large gap in each round."""
    case = CASES["loop bookkeeping with given keep counts"]
    start, kept = case["inputs"]["start"], case["inputs"]["kept"]
    shop = desk(tmp_path, num_pairs=start, iterations=len(kept))
    left = [*kept]

    def run(step, program, items):
        if program == "answer":
            count = left.pop(0)
            scored = {"response": "r", "answered_by": "strong", "response_fault": "", "fault": ""}
            scored |= {"orders": ([9.0], [1.0]), "strong_score": 9.0, "student_score": 1.0}
            return [
                one | scored | {"gap": 8.0 if i < count else 1.0} for i, one in enumerate(items)
            ]
        return Desk.run(shop, step, program, items)

    shop.run = run
    made = shop.method.make(shop, SEEDS)
    assert made.rounds == kept
    table = next(block for block in made.sections[0].blocks if block.kind == "table")
    wanted = [[row["entering"], row["kept"]] for row in case["outputs"]["rounds"]]
    assert [[row[1], row[3]] for row in table.rows] == wanted
    dropped = shop.dropped["gap below theta after the last iteration"]
    assert dropped == case["outputs"]["left_over"]


def test_what_is_kept_obeys_the_loop(tmp_path):
    shop = desk(tmp_path)
    made = shop.method.make(shop, SEEDS)
    assert made.items and sum(made.rounds) == len(made.items) <= 40
    for one in made.items:
        assert abs(one["gap"]) > 3
        assert one["answered_by"] == ("strong" if one["gap"] > 0 else "student")
        assert one["response"].startswith(f"{one['answered_by']} answers")
        assert one["round"] == len(one["history"]) + 1 <= 4
        assert all(abs(step["gap"]) <= 3 for step in one["history"])
        if one["history"]:
            assert one["instruction"].startswith(f"rewritten by {one['history'][-1]['action']}")
    assert len(made.items) + shop.dropped.total() == 40
    steps = [name for name, _ in shop.ran]
    assert steps[:4] == ["encode", "write", "judge 1", "rewrite 2"] and "rewrite 5" not in steps


def test_each_entry_has_as_many_instructions(tmp_path):
    shop, begun = desk(tmp_path, iterations=1), []
    run = shop.run

    def noting(step, program, items):
        begun.extend(items if program == "write" else ())
        return run(step, program, items)

    shop.run = noting
    shop.method.make(shop, SEEDS)
    counts = Counter((one["use_case"], *one["skills"]) for one in begun)
    assert len(counts) == 10 and {*counts.values()} == {4}
    assert len({one["draw"] for one in begun}) == 40


def test_the_same_again_without_a_call(tmp_path):
    first = desk(tmp_path)
    made = first.method.make(first, SEEDS)
    again = desk(tmp_path)
    assert again.method.make(again, SEEDS).items == made.items
    assert again.asker.counts["calls"] == 0 and again.asker.spending.calls == 0
    needed = first.asker.counts["calls"] + first.asker.counts["cached_calls"]
    assert again.asker.counts["cached_calls"] == needed
    other = desk(tmp_path / "other")
    assert other.method.make(other, SEEDS).items == made.items
    assert max(other.asker.backends["strong"].asked.values()) == 1


def test_keep_sets_theta_by_the_first_gaps(tmp_path):
    shop = desk(tmp_path, theta=None, keep=0.25, iterations=1)
    made = shop.method.make(shop, SEEDS)
    theta = made.numbers["theta"]
    assert 0.25 * 40 <= len(made.items) <= 0.25 * 40 + 6  # half points of 40 gaps tie
    assert theta < min(abs(one["gap"]) for one in made.items)
    assert shop.told == [one["instruction"] for one in made.items]


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=60), st.floats(0.01, 1))
def test_theta_is_exceeded_by_keep_or_a_tie_more(gaps, keep):
    theta = theta_of(gaps, keep)
    sizes = sorted((abs(gap) for gap in gaps if gap), reverse=True)
    above = sum(size > theta for size in sizes)
    wanted = max(1, int(keep * len(gaps)))
    assert above >= min(wanted, len(sizes))
    # all above are of the size of the last one wanted, or larger
    assert sizes[above - 1 : above] == sizes[wanted - 1 : wanted] or above == len(sizes)


def test_nothing_judged_sets_no_theta(tmp_path):
    shop = desk(tmp_path, theta=None, keep=0.5, waves=2)
    run, first = shop.run, []

    def broken(step, program, items):
        made = run(step, program, items)
        if program == "answer" and not first:
            first.append(step)
            return [one | {"fault": "scores that cannot be read"} for one in made]
        return made

    shop.run = broken
    made = shop.method.make(shop, SEEDS)
    assert made.numbers["theta"] > 0 and 15 <= len(made.items) <= 40


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 30),
)
def test_entries_are_different_pairs(described, count):
    items = [{"use_case": f"u{a}", "skills": [f"s{b}"]} for a, b in described]
    found = mixed(items, count, 0)
    pairs = {(one["use_case"], *one["skills"]) for one in found}
    total = len({a for a, _ in described}) * len({b for _, b in described})
    assert len(pairs) == len(found) == min(count, total)
    assert mixed(items, count, 0) == found


def test_entries_are_as_frequent_as_in_the_seeds():
    items = [{"use_case": "often", "skills": [f"s{n}"]} for n in range(45)]
    items += [{"use_case": f"rare {n}", "skills": ["r"]} for n in range(5)]
    found = mixed(items, 40, 0)
    assert 30 <= sum(one["use_case"] == "often" for one in found) <= 40


def test_waves_go_on_until_there_are_enough(tmp_path):
    one, three = desk(tmp_path / "1"), desk(tmp_path / "3", waves=3)
    single = one.method.make(one, SEEDS)
    assert len(single.items) < 40 and "Only" in one.warned[0]
    assert len(three.method.make(three, SEEDS).items) == 40 and not three.warned


class Mumbling(StandIn):
    """Its numbers cannot be read the first time, or never for instructions of odd numbers."""

    never = False

    def reply(self, ask):
        if ask.prompt.startswith("Two assistants") and (self.never or ask.temperature == 0):
            return "both are nice"
        return super().reply(ask)


@pytest.mark.parametrize("never", [False, True])
def test_a_judge_that_cannot_be_read_is_asked_once_more(tmp_path, never):
    judge = Mumbling("strong")
    judge.never = never
    shop = desk(tmp_path, iterations=1)
    shop.asker.backends["judge"] = judge
    made = shop.method.make(shop, SEEDS)
    prompts = Counter(p for p, _ in judge.asked if p.startswith("Two assistants"))
    assert {*prompts.values()} == {2}
    assert bool(made.items) != never
    assert shop.dropped["scores that cannot be read"] == (40 if never else 0)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("First: 8\nSecond: 3", (8, 3)),
        ("**First:** 8/10\n**Second:** 10/10", (8, 10)),
        ("first answer: 8", None),
        ("First: 0\nSecond: 11", None),
        ("First: 7.5, second: 2", (7.5, 2)),
        ("First: -5\nSecond: 3", None),
        ("First answer: 8\nSecond answer: 3\nThe first 5 are right", (8, 3)),
        ("The first 5 lines: good\nSecond: 3", None),
    ],
)
def test_scores_are_read(text, scores):
    assert parse_scores(text) == scores


def test_names_of_calls_cover_all_that_is_asked():
    base = Ask("strong", "p")
    others = [
        Ask("strong", "q"),
        Ask("strong", "p", "given"),
        Ask("strong", "p", temperature=0.5),
        Ask("strong", "p", max_tokens=7),
        Ask("strong", "p", seed=1),
    ]
    names = {call_name(["m"], one) for one in [base, *others]} | {call_name(["n"], base)}
    assert len(names) == 7
    assert call_name(["m"], Ask("judge", "p")) == call_name(["m"], base)
