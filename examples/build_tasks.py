"""Build the mixing example's tasks from the Python code that every environment holds.

    python examples/build_tasks.py --out examples/data/tasks

Writes `targets.parquet` (task `keyword`: which keyword was blanked in a line of the standard
library) and `auxiliary.parquet`: ten tasks, of which two are close to the target, two have its form
with wrong answers, and six are something else. Nothing is imported or downloaded.
"""

import argparse
import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

KEYWORDS = ("return", "import", "raise", "while")
OPERATORS = ("==", "!=", "<=", ">=")
ROWS = 400
SKIPPED = {"test", "tests", "site-packages", "idlelib"}
MAX_BYTES = 200_000
Row = dict[str, object]


def code_files(folder: Path) -> Iterator[str]:
    """Texts of the Python files under a folder, sorted by name, tests left out."""
    for path in sorted(folder.rglob("*.py")):
        names = {part.lower() for part in path.relative_to(folder).parts}
        if not names & SKIPPED and path.stat().st_size < MAX_BYTES:
            yield path.read_text(encoding="utf-8", errors="ignore")


def blanked(texts: Iterator[str], words: tuple[str, ...], name: str) -> list[Row]:
    """Lines with one of some words blanked; as many of each word, the word is the answer."""
    pattern = re.compile("|".join(rf"(?<!\S){re.escape(word)}(?!\S)" for word in words))
    found: dict[str, list[str]] = {word: [] for word in words}
    wanted = 2 * ROWS // len(words)
    for text in texts:
        for line in text.splitlines():
            hits = pattern.findall(line)
            if len(hits) == 1 and 20 < len(line.strip()) < 80 and len(found[hits[0]]) < wanted:
                found[hits[0]].append(pattern.sub("_", line.strip()))
        if all(len(lines) == wanted for lines in found.values()):
            break
    rows = [
        {
            "task": name,
            "input": f"Which word was here? {line}",
            "target": word,
            "choices": list(words),
        }
        for word, lines in found.items()
        for line in lines
    ]
    random.Random(name).shuffle(rows)
    return rows


def docstrings(texts: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    """Name, arguments and first line of documented functions."""
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                names = ", ".join(argument.arg for argument in node.args.args)
                yield node.name.strip("_"), names, doc.splitlines()[0].strip()


def sums(rng: random.Random) -> Row:
    """An addition."""
    a, b = rng.randrange(100), rng.randrange(100)
    return {"task": "addition", "input": f"{a} + {b} =", "target": str(a + b), "choices": None}


def reversals(rng: random.Random) -> Row:
    """A word backwards."""
    word = "".join(rng.choices("abcdefgh", k=6))
    return {
        "task": "reversal",
        "input": f"Backwards: {word}",
        "target": word[::-1],
        "choices": None,
    }


def counts(rng: random.Random) -> Row:
    """How often a letter stands in a word."""
    word = "".join(rng.choices("xyz", k=7))
    target = str(word.count("x"))
    return {"task": "counting", "input": f"How many x? {word}", "target": target, "choices": None}


def wrong(rows: list[Row], name: str, rng: random.Random) -> list[Row]:
    """The same inputs with another answer."""
    return [
        row | {"task": name, "target": rng.choice([c for c in KEYWORDS if c != row["target"]])}
        for row in rows
    ]


def build(out: Path) -> None:
    """Write both files."""
    paths = sysconfig.get_paths()
    library, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    rng = random.Random(0)
    target = blanked(code_files(library), KEYWORDS, "keyword")
    test, train, near, other = (target[i::4] for i in range(4))
    rows = [row | {"split": "test"} for row in test] + [row | {"split": "train"} for row in train]
    foreign = blanked(code_files(packages / "numpy"), KEYWORDS, "keyword_in_numpy")
    arms: list[Row] = [row | {"task": "keyword_more"} for row in near]
    arms += foreign[:ROWS] + wrong(other, "keyword_wrong", rng)
    arms += wrong(foreign[ROWS:] or foreign, "keyword_wrong_in_numpy", rng)
    arms += blanked(code_files(library), OPERATORS, "operator")[:ROWS]
    documented = [d for _, d in zip(range(ROWS), docstrings(code_files(library)), strict=False)]
    for name, names, line in documented:
        arms += [
            {"task": "function_name", "input": line, "target": name, "choices": None},
            {"task": "arguments", "input": name, "target": names or "none", "choices": None},
        ]
    arms += [make(rng) for make in (sums, reversals, counts) for _ in range(ROWS)]
    out.mkdir(parents=True, exist_ok=True)
    for file, content in (("targets", rows), ("auxiliary", arms)):
        pq.write_table(pa.Table.from_pylist(content), out / f"{file}.parquet")
        print(f"{out / file}.parquet: {len(content):,} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/data/tasks"))
    build(parser.parse_args().out)
