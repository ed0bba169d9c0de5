"""A report as a real run would fill it: 45 sources, 4 rules x 3 seeds, 12 texts.

`python tests/report/conftest.py OUT.html` writes its page, to be looked at in a browser.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from stillhouse.report.data import (
    BadInput,
    Curve,
    DeadLetters,
    Density,
    Drop,
    ExampleRow,
    HealthWarning,
    Histogram,
    ReportData,
    SeenUnseen,
    SourceRow,
    StepCost,
    TargetLossRow,
    TrainingRow,
)

SOURCES = [
    "fiction",
    "essays",
    "memoirs",
    "letters",
    "travel_writing",
    "drama",
    "newspapers_1900s",
    "sermons",
    "biography",
    "history",
    "folk_tales",
    "poetry",
    "encyclopedia",
    "lecture_notes",
    "school_readers",
    "magazine_features",
    "film_reviews",
    "recipes_long_form",
    "parliamentary_debates",
    "court_opinions",
    "patents_background",
    "science_abstracts",
    "wiki_talk",
    "gardening_columns",
    "howto_articles",
    "forum_threads",
    "product_reviews",
    "job_postings",
    "press_releases",
    "sports_results",
    "weather_bulletins",
    "recipe_cards",
    "subtitles",
    "chat_logs",
    "changelogs",
    "readme_files",
    "python_docstrings",
    "config_files",
    "licence_texts",
    "mailing_list_archives",
    "bug_reports",
    "event_listings",
    "terms_of_service",
    "machine_translated_catalogue_descriptions",
    "tables_and_lists",
]
TEXTS = (
    (
        "best",
        1.284,
        "fiction",
        "The ferry had already cast off when Marta came down to the water, and so she sat on her "
        "trunk among the nets and waited, as she had been taught to wait, with her gloves on.\n"
        "“You will be wanting the other boat,” said the old man who was tarring the slip. He did "
        "not look up. “There is no other boat before morning, but you will be wanting it.”\n"
        "She said that she supposed she would. The light went slowly off the hills, first the "
        "near ones and then the far, until only the church at Skarra stood up white, as though "
        "someone had forgotten to take it in.",
    ),
    (
        "best",
        1.197,
        "memoirs",
        "My grandfather kept bees and opinions, and was stung by both. Every Sunday after the "
        "service he carried his chair into the orchard and read the paper aloud to the hives, "
        "disputing with it at the end of each column, and we children lay under the hedge and "
        "learned in that way the names of all the ministers.",
    ),
    (
        "best",
        1.152,
        "letters",
        "You ask whether I am lonely here. I have asked myself the same, usually at about four, "
        "when the lamp has to be lit and the kettle is not yet speaking. But then Tom comes in "
        "with the post and the cold, and tells me who has been seen in the lane.",
    ),
    (
        "above",
        0.4127,
        "sermons",
        "Consider how a well is dug. Nobody praises the first yard of it, for there is only dry "
        "earth in the first yard, and a tired man standing in a hole.",
    ),
    (
        "above",
        0.4124,
        "travel_writing",
        "Beyond the pass the road forgets itself. It becomes two ruts, then one, then a habit of "
        "the goats, and at last the traveller finds that he is merely walking, and that the "
        "valley has been in view for some time.",
    ),
    (
        "above",
        0.4123,
        "school_readers",
        "The fox did not see the gate. “Who shut it?” said the hen. “I did,” said the wind, and "
        "it blew the fox's tail over his eyes so that he ran twice round the barn.",
    ),
    (
        "below",
        0.4120,
        "film_reviews",
        "The second half is better than the first, which is as well, since by then half of the "
        "house had gone home. What it lacks in plot it makes up in rain.",
    ),
    (
        "below",
        0.4119,
        "encyclopedia",
        "Lime mortar sets by taking up carbon dioxide from the air, and so hardens slowly from "
        "the outside. In thick walls of the period the core is often still soft after a century.",
    ),
    (
        "below",
        0.4117,
        "parliamentary_debates",
        "I thank the honourable member for her question, which she has now put on four occasions, "
        "and I refer her to the reply that I gave on the third.",
    ),
    (
        "worst",
        -1.803,
        "config_files",
        "[server]\nlisten = 0.0.0.0:8443\ntls_min_version = 1.2\nworkers = 16\n\n[cache]\n"
        "backend = memory\nmax_entries = 65536\nttl_s = 900\n\n[log]\nlevel = info\nformat = json",
    ),
    (
        "worst",
        -2.116,
        "tables_and_lists",
        "1.00 0.98 0.97 | 12 14 15 | n/a n/a n/a | 1.00 0.99 0.97 | 11 14 16 | n/a n/a 3 | 1.00 "
        "0.98 0.96 | 12 13 15 | n/a 2 n/a |",
    ),
    ("worst", -3.402, "chat_logs", "ok ok ok\x07 ok ???? " + "ha" * 90 + " :) :) :)"),
)
SPEC = """job: select
name: Prose like the books
store: s3://distillery/experiments
pool: {path: data/pool/*.parquet, max_bad_rows: 0.01}
target: {path: data/books/*.parquet, heldout: 0.1}
tokenizer: {train: {vocab_size: 8192, num_bytes: 20000000}, pin: first}
sequence_length: 256
prior:
  model: {architecture: llama, hidden_size: 256, num_layers: 4, tie_embeddings: true}
  num_tokens: 20000000
  learning_rate: 0.001
conditional: {epochs: 1}
selection: {tau: 8.0, grain: sequences, exclude_contaminated: true, exclude_prior_rows: auto}
train: {controls: [random, conditional_only, dsir], seeds: [0, 1, 2]}
"""
THRESHOLD = 0.4122


def build_report() -> ReportData:
    """The whole report, every section filled; the same every time."""
    sources = _sources()
    pool_tokens = sum(row.pool_tokens for row in sources)
    kept_tokens = sum(row.kept_tokens for row in sources)
    return ReportData(
        title="Prose like the books",
        created="2026-11-21T14:05:00+00:00",
        run_uri="s3://distillery/experiments/runs/5f0c9b1de2a4c7d8e1f03b6a9c5d2e7f8091a2b3c4d5e6f70812",
        rule="tau = 8",
        grain="sequences",
        pool_sequences=pool_tokens // 256,
        pool_tokens=pool_tokens,
        kept_sequences=kept_tokens // 256,
        kept_tokens=kept_tokens,
        eligible_sequences=(pool_tokens - 2_214_400) // 256,
        eligible_tokens=pool_tokens - 2_214_400,
        threshold=THRESHOLD,
        sources=sources,
        score_histogram=_histogram(),
        seen=SeenUnseen(78_125, -0.302, 1_483_902, -0.264, True),
        losses=_density(),
        examples=[
            ExampleRow(
                group,
                score,
                round(4.1 + 0.1 * index, 3),
                round(4.1 + 0.1 * index - score, 3),
                source,
                text,
                f"tokens/parts/{index:02d}c41f0e88ab7d52c9e6f1a03b4d7788.parquet",
                4021 * index + 17,
                f"{source}/volume-{index:03d}.txt",
                "kept" if group in ("best", "above") else "score below the cut",
            )
            for index, (group, score, source, text) in enumerate(TEXTS)
        ],
        curves=_curves(),
        trainings=[
            TrainingRow("prior", 1_000_000, 977, 3.9e-3, 8, 4.712, 0.004),
            TrainingRow("conditional", 300_000, 293, 2e-3, 8, 4.401, None),
        ],
        targets=[
            TargetLossRow("color", kept_tokens, [3.1874, 3.1921, 3.1902]),
            TargetLossRow("random", kept_tokens, [3.6110, 3.6064, 3.6179]),
            TargetLossRow("conditional_only", kept_tokens, [3.2318, 3.2389, 3.2341]),
            TargetLossRow("dsir", kept_tokens, [3.3016, 3.2984, 3.3105]),
        ],
        drops=[
            Drop("duplicate", None, 18_402, 9_870_114),
            Drop("contaminated", 412, 96, 105_472),
            Drop("seen_by_prior", 8_238, None, 2_108_928),
        ],
        dead_letters=DeadLetters(
            23,
            [
                BadInput("data/pool/pool-03.jsonl.zst", 88_214, "text is null", '{"id": 88214, '),
                BadInput("data/pool/pool-07.jsonl.gz", 5, "not UTF-8 at byte 112", "Caf\ufffd"),
            ],
        ),
        costs=[
            StepCost("tokens", pool_tokens, 0.0, 214.0, None, True),
            StepCost("prior", 20_000_000, 3.2e14, 412.6, 6.0e7, True),
            StepCost("conditional", 2_600_000, 4.2e13, 55.1, 7.8e6, False),
            StepCost("score_prior", pool_tokens, 2.1e15, 1_820.0, float(pool_tokens), True),
            StepCost("score_conditional", pool_tokens, 2.1e15, 1_804.2, float(pool_tokens), False),
            StepCost("cut", pool_tokens, 0.0, 3.4, None, False),
            StepCost("target", 4 * 3 * kept_tokens, 9.8e15, 9_310.0, 1.8e9, False),
        ],
        paper={"color": 1.01e9, "random": 1.5e8, "conditional_only": 6.1e8, "dsir": 1.5e8},
        warnings=[
            HealthWarning(
                "Scores hardly differ inside machine_translated_catalogue_descriptions",
                "Their spread is 0.011, against 0.412 over the whole pool. All of it is kept or "
                "left together: look whether its texts are copies of one template.",
            ),
            HealthWarning(
                "2.6 % of a sample of the kept are near-duplicates",
                "130 of 5,000 texts share four fifths of their 5-word shingles with an earlier "
                "one. The target model sees them again and again: deduplicate the pool first.",
            ),
        ],
        spec_yaml=SPEC,
        artifacts=[
            (name, f"s3://distillery/experiments/{kind}/{digit * 64}")
            for name, kind, digit in (
                ("tokens", "tokens", "1"),
                ("prior", "models", "2"),
                ("conditional", "models", "3"),
                ("prior_scores", "scores", "4"),
                ("conditional_scores", "scores", "5"),
                ("selection", "selections", "6"),
            )
        ],
        environment=[("stillhouse", "0.1.0"), ("torch", "2.13.0"), ("ray", "2.60.0")],
    )


def _sources() -> list[SourceRow]:
    rng = np.random.default_rng(1)
    rows: list[SourceRow] = []
    for index, name in enumerate(SOURCES):
        pool = int(256 * (2_000 + 60_000 * rng.pareto(3)))
        share = min(0.9, 0.61 * 0.86**index * rng.uniform(0.7, 1.3))
        kept = 256 * int(pool * share / 256) if index < 44 else 0
        spread = 0.011 if "machine" in name else rng.uniform(0.2, 0.5)
        mean = round(0.6 - 0.035 * index, 3)
        rows.append(SourceRow(name, pool, kept, pool // 256, kept // 256, mean, round(spread, 3)))
    return rows


def _scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    prior = np.clip(rng.normal(4.4, 0.8, 200_000), 0.3, 9)
    mixed = rng.random(200_000) < 0.09
    score = np.where(mixed, rng.normal(0.75, 0.22, 200_000), rng.normal(-0.35, 0.42, 200_000))
    return prior, score


def _histogram() -> Histogram:
    _, score = _scores()
    edges = np.linspace(-4, 2, 121)
    pool = np.histogram(score, edges)[0]
    kept = np.histogram(score[score >= THRESHOLD], edges)[0]
    return Histogram(edges.tolist(), pool.tolist(), kept.tolist())


def _density() -> Density:
    prior, score = _scores()
    edges = np.linspace(0, 10, 101)
    kept = score >= THRESHOLD
    pool_counts = np.histogram2d(prior, prior - score, [edges, edges])[0].astype(int)
    kept_counts = np.histogram2d(prior[kept], (prior - score)[kept], [edges, edges])[0].astype(int)
    return Density(edges.tolist(), edges.tolist(), pool_counts.tolist(), kept_counts.tolist())


def _curves() -> list[Curve]:
    ends = {"color": 3.19, "random": 3.61, "conditional_only": 3.235, "dsir": 3.303}
    tokens = np.linspace(0.1, 1, 10) * 43e6
    return [
        Curve(name, seed, list(zip(tokens.tolist(), losses.tolist(), strict=True)))
        for name, end in ends.items()
        for seed in range(3)
        for losses in [end + 0.006 * (seed - 1) + 1.1 * np.exp(-tokens / 11e6) * (1 + 0.04 * seed)]
    ]


@pytest.fixture(scope="session")
def report() -> ReportData:
    return build_report()


if __name__ == "__main__":
    from stillhouse.report.render import render

    Path(sys.argv[1]).write_text(render(build_report()), encoding="utf-8")
