"""What generated texts are dropped for, against brute force."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.generation.asking import Answer
from stillhouse.generation.screening import (
    NearIndex,
    Screen,
    answer_fault,
    language_of,
    languages_of,
)
from stillhouse.selection.contamination import NgramIndex

ENGLISH = "This is a sentence in plain English, which is long enough to be recognised as such."
GERMAN = "Dies ist ein ganz gewöhnlicher deutscher Satz, der lang genug ist, um erkannt zu werden."
NOTHING = NgramIndex.from_texts([])


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


def test_seeds_and_earlier_instructions_are_seen():
    screen = Screen(["write a poem about the sea"], NOTHING, None, 0.7)
    assert screen.reason("instruction", "Write a  poem about the sea") == "duplicate"
    assert screen.reason("instruction", "write a poem about the sea!") == "near-duplicate"
    assert screen.reason("instruction", "list all prime numbers below one hundred") is None
    assert screen.reason("instruction", "list all prime numbers below one hundred") == "duplicate"
    assert screen.reason("response", "write a poem about the sea") is None


def test_held_out_text_is_kept_out():
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
    ]
    screen = Screen([], NgramIndex.from_texts([" ".join(words)]), None, 0.7)
    reason = screen.reason("response", "so: " + " ".join(words).upper())
    assert reason == "shares word 13-grams with held-out text"
    assert screen.reason("response", " ".join(words[:-1])) is None


def test_other_languages_are_dropped():
    screen = Screen([], NOTHING, frozenset({"en"}), 0.7)
    assert screen.reason("response", GERMAN) == "another language (de)"
    assert screen.reason("response", ENGLISH) is None
    assert screen.reason("response", "Guten Tag") is None  # too short to tell
    assert Screen([], NOTHING, None, 0.7).reason("response", GERMAN) is None
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
