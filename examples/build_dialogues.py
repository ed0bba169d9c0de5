"""Build the generation example's conversations, which teach two small models: a strong one, a weak.

    python examples/build_dialogues.py --out examples/data/dialogues
    stillhouse run examples/generate_models.yaml
    stillhouse run examples/generate.yaml

A world of requests about lists of words, whose right answers are known. `strong.jsonl` teaches the
answers, and what `job: generate` asks of a strong model: to describe a request, to write one, to
say what makes such requests hard, and to rewrite one. `student.jsonl` teaches answers alone, of
short lists. `seeds.jsonl` has some requests, `heldout.jsonl` others to measure on.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from stillhouse.generation.methods.codec import ENCODE, REWRITE, RUBRICS, WRITE

THEMES = {
    theme: words.split()
    for theme, words in {
        "fruit names": "apple pear fig plum kiwi mango lemon cherry grape melon",
        "animal names": "dog cat cow horse sheep goat fox wolf bear mouse",
        "colour names": "red blue green white black brown pink grey violet orange",
        "tool names": "hammer saw nail file drill axe rope ladder brush knife",
    }.items()
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
Words = list[str]
USES: dict[str, tuple[str, Callable[[Words], str]]] = {
    "counting words": ("How many words are in this list: {}?", lambda w: NUMBERS[len(w)]),
    "finding the last word": ("Which word is the last one of: {}?", lambda w: w[-1]),
    "finding the first word": ("Which word is the first one of: {}?", lambda w: w[0]),
    "joining words": ("Join these words with and: {}.", lambda w: " and ".join(w)),
    "repeating words": ("Repeat these words: {}.", lambda w: " ".join(w)),
}
LENGTHS = {"short lists": (2, 3), "long lists": (4, 6)}
ACTIONS = {
    "Make the list longer.": "The list has many words.",
    "Put a word of another kind first.": "The words are of several kinds.",
    "Put a word of another kind last.": "The last word is unexpected.",
    "Say one of the words twice.": "A word comes twice.",
}
ALL_WORDS = [word for words in THEMES.values() for word in words]
Row = dict[str, list[dict[str, str]]]


def request(use: str, words: Words) -> str:
    """A request by its use case and its list."""
    return USES[use][0].format(" ".join(words))


def solve(text: str) -> str | None:
    """The right answer to a request of this world; None for any other text."""
    for form, answer in USES.values():
        before, _, after = form.partition("{}")
        if text.startswith(before) and text.endswith(after):
            words = text[len(before) : len(text) - len(after)].split(" ")
            known = 0 < len(words) < len(NUMBERS) and {*words} <= {*ALL_WORDS}
            return answer(words) if known else None
    return None


def draw(rng: random.Random, use: str, theme: str, length: str) -> Words:
    """A list of a theme and length."""
    return rng.sample(THEMES[theme], rng.randint(*LENGTHS[length]))


def rewritten(rng: random.Random, action: str, words: Words) -> Words:
    """A list after one of the actions."""
    other = rng.choice(ALL_WORDS)
    if action == "Make the list longer.":
        return [*words, *rng.sample(ALL_WORDS, 2)][:8]
    if action == "Put a word of another kind first.":
        return [other, *words][:8]
    if action == "Put a word of another kind last.":
        return [*words, other][-8:]
    return [*words, rng.choice(words)][-8:]


def turn(prompt: str, answer: str) -> Row:
    """A conversation of one turn."""
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


def answers(rng: random.Random, count: int, lengths: list[str]) -> list[Row]:
    """Requests with their right answers."""
    rows: list[Row] = []
    for _ in range(count):
        use, theme = rng.choice([*USES]), rng.choice([*THEMES])
        words = draw(rng, use, theme, rng.choice(lengths))
        for _ in range(rng.choice((0, 0, 1, 2))):
            words = rewritten(rng, rng.choice([*ACTIONS]), words) if len(lengths) > 1 else words
        rows.append(turn(request(use, words), USES[use][1](words)))
    return rows


def orders(rng: random.Random, count: int) -> list[Row]:
    """What a generation asks of its strong model, with good answers."""
    rows: list[Row] = []
    for _ in range(count):
        use, theme, length = rng.choice([*USES]), rng.choice([*THEMES]), rng.choice([*LENGTHS])
        words = draw(rng, use, theme, length)
        described = {"use_case": use, "skills": f"{theme}, {length}"}
        text, action = request(use, words), rng.choice([*ACTIONS])
        pairs = list(ACTIONS.items())
        rng.shuffle(pairs)
        rubrics = "\n".join(f"Rubric: {rubric}\nAction: {act}" for act, rubric in pairs)
        harder = request(use, rewritten(rng, action, words))
        reply = f"Use case: {use}\nSkills: {theme}, {length}"
        rows += [
            turn(ENCODE.format(instruction=text), reply),
            turn(WRITE.format(**described), text),
            turn(REWRITE.format(action=action, instruction=text), harder),
        ]
        if rng.random() < 0.2:
            rows.append(turn(RUBRICS.format(count=len(pairs), **described), rubrics))
    return rows


def pairs(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Requests with responses."""
    found: list[dict[str, str]] = []
    for row in answers(rng, count, [*LENGTHS]):
        prompt, answer = (one["content"] for one in row["messages"])
        found.append({"instruction": prompt, "response": answer})
    return found


def write(folder: Path, size: float, seed: int) -> None:
    """Write the four files; `size` scales what the models are taught."""
    rng = random.Random(seed)
    strong = orders(rng, round(1500 * size)) + answers(rng, round(36_000 * size), [*LENGTHS])
    rng.shuffle(strong)
    files = {
        "strong": strong,
        "student": answers(rng, round(6000 * size), ["short lists"]),
        "seeds": pairs(rng, 60),
        "heldout": pairs(rng, 400),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows):,} rows")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.size, args.seed)


if __name__ == "__main__":
    main()
