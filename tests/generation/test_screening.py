"""What generated texts are dropped for, against brute force."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.generation.asking import Answer
from stillhouse.generation.screening import (
    HeldOut,
    NearIndex,
    Screen,
    answer_fault,
    language_of,
    languages_of,
)
from stillhouse.selection.contamination import NgramIndex
from stillhouse.text.duplicates import document_hash

ENGLISH = "This is a sentence in plain English, which is long enough to be recognised as such."
GERMAN = "Dies ist ein ganz gewöhnlicher deutscher Satz, der lang genug ist, um erkannt zu werden."
NOTHING = HeldOut(NgramIndex.from_texts([]))


def grams(text):
    text = " ".join(text.lower().split())
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def similarity(one, other):
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


@settings(max_examples=60)
@given(st.lists(st.text("abc ", max_size=25), max_size=12), st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_near_duplicates_are_those_of_brute_force(texts, near):
    index = NearIndex(near)
    for number, text in enumerate(texts):
        wanted = any(similarity(text, other) >= near for other in texts[:number])
        assert index.has_near(text) == wanted
        index.add(text)


def test_near_duplicates_among_many():
    rng = random.Random(0)
    words = [f"w{n}" for n in range(400)]
    index = NearIndex(0.7)
    for _ in range(500):
        index.add(" ".join(rng.choices(words, k=30)))
    text = " ".join(rng.choices(words, k=30))
    assert not index.has_near(text)
    index.add(text)
    assert index.has_near(f"{text} w1") and index.has_near(text.upper())


def reason(screen, key, text):
    [found] = screen.reasons(key, [text])
    return found


def test_seeds_delivered_and_earlier_instructions_are_seen():
    screen = Screen(["write a poem about the sea"], NOTHING, None, 0.7)
    assert reason(screen, "instruction", "Write a  poem about the sea") == "duplicate"
    assert reason(screen, "instruction", "write a poem about the sea!") == "near-duplicate"
    text = "list all prime numbers below one hundred"
    found = [*screen.reasons("instruction", [text, text, f"{text}!"])]
    assert found == [None, "duplicate", "near-duplicate"]
    # an instruction that was let through, and rewritten, is no copy of itself
    assert reason(screen, "instruction", f"{text}!") is None
    screen.add([text])
    assert reason(screen, "instruction", f"{text}!") == "near-duplicate"
    assert reason(screen, "response", "write a poem about the sea") is None


def test_held_out_text_is_kept_out():
    words = [f"word{n}" for n in range(13)]
    heldout = HeldOut(NgramIndex.from_texts([" ".join(words)]), frozenset({document_hash("Hi  A")}))
    screen = Screen([], heldout, None, 0.7)
    assert reason(screen, "response", "so: " + " ".join(words).upper()) == "held-out text"
    assert reason(screen, "response", " ".join(words[:-1])) is None
    assert reason(screen, "instruction", "hi a") == "held-out text"
    assert reason(screen, "response", "hi a") is None


def test_other_languages_are_dropped():
    screen = Screen([], NOTHING, frozenset({"en"}), 0.7)
    assert reason(screen, "response", GERMAN) == "another language (de)"
    assert reason(screen, "response", ENGLISH) is None
    assert reason(screen, "response", "Guten Tag") is None  # too short to tell
    assert reason(Screen([], NOTHING, None, 0.7), "response", GERMAN) is None
    assert language_of(ENGLISH) == "en" and language_of("Guten Tag") is None
    assert languages_of([ENGLISH] * 30 + [GERMAN]) == {"en"}
    assert languages_of([ENGLISH] * 9 + [GERMAN]) == {"en", "de"}
    assert languages_of(["short"]) == frozenset()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("fine"), ""),
        (Answer(""), "empty answer"),
        (Answer("fine", finished=False), "answer cut off at `max_tokens`"),
        (Answer("I'm sorry, but I can't help with that."), "refusal"),
        (Answer("I’m very sorry. That is not possible."), "refusal"),
        (Answer("As an AI language model, I have no opinions."), "refusal"),
        (Answer("Unfortunately, I cannot do that."), "refusal"),
        (Answer("I can help. The sorry state of the house..."), ""),
        (Answer("Sorrow is the theme of the poem."), ""),
        (Answer("I canter along."), ""),
        (Answer(fault="longer than the context"), "longer than the context"),
    ],
)
def test_faults_of_answers(answer, fault):
    assert answer_fault(answer) == fault
