"""A result with every kind of block, as large as a real one: 45 sources, 12 texts, 3 seeds.

`python tests/report/conftest.py OUT.html` writes its page, to be looked at in a browser.
"""

import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

import stillhouse.report.blocks as b

THRESHOLD = 0.4122
TEXT = (
    "The ferry had already cast off when Marta came down to the water, and so she sat on her trunk "
    "among the nets and waited, as she had been taught to wait, with her gloves on.\n“You will be "
    "wanting the other boat,” said the old man who was tarring the slip."
)


def build_result(hostile: str = "") -> b.Result:
    """The same every time; `hostile` stands in every text that users or data may write."""
    rng = np.random.default_rng(2)
    prior, mixed = rng.normal(4.4, 0.8, 200_000), rng.random(200_000) < 0.09
    score = np.where(mixed, rng.normal(0.75, 0.22, 200_000), rng.normal(-0.35, 0.42, 200_000))
    kept, edges = score >= THRESHOLD, np.linspace(-4, 2, 121)
    pool, chosen = np.histogram(score, edges)[0], np.histogram(score[kept], edges)[0]
    span = np.linspace(0, 10, 101)
    losses = [np.histogram2d(prior[m], (prior - score)[m], [span, span])[0].astype(int).tolist()
              for m in (slice(None), kept)]  # fmt: skip
    sources = [
        [f"source {n:02d}{hostile}", [0.03, 0.61 * 0.86**n], 0.03, 0.61 * 0.86**n, 20 * 0.86**n,
         [0.6 - 0.035 * n, 0.3 if n else None]]
        for n in range(45)
    ]  # fmt: skip
    shown = {"Source": "text", "shares": "bars", "pool": "percent", "kept": "percent"}
    tokens = np.linspace(0.1, 1, 10) * 43e6
    curves = {
        name + hostile: [
            list(
                zip(
                    tokens.tolist(), (end + 0.01 * s + np.exp(-tokens / 11e6)).tolist(), strict=True
                )
            )
            for s in range(3)
        ]
        for name, end in {"color": 3.19, "random": 3.61, "conditional_only": 3.24}.items()
    }
    card = b.Card(
        "+1.284", f"fiction{hostile}", TEXT + hostile, [b.Fact("Document", f"1{hostile}")]
    )
    png = [b64encode(b"\x89PNG").decode()] * 2
    images = [
        b.ImageRow(f"ship{hostile}", png, png, main=True),
        b.ImageRow("cat", png[:1], png[:1]),
    ]
    warning = b.Warn(
        f"2.6 % are near-duplicates{hostile}", "Set `selection.max_share`, or **read**."
    )
    sections = [
        b.Section("lead", "", [
            b.Text("Of 345 M tokens, **43.1 M were kept**.", "story", terminal=True),
            b.Facts([b.Fact("Pool", "345 M", f"1.35 M{hostile}"),
                     b.Fact("Kept", "43.1 M", main=True)], share=0.125, terminal=True),
        ]),
        b.Section("health", "", [b.Warnings([warning], "All were checked.")]),
        b.Section("sources", "What was kept", [
            b.Text("Shares [pool: in the pool] and [kept: among the kept]."),
            b.Table(shown | {"ratio": "ratio", "score": "decimals2"}, sources, shown=12,
                    style="stacked", terminal=True),
        ]),
        b.Section("scores", "How it was chosen", [b.Group([
            b.Histogram("Scores", edges.tolist(), pool.tolist(), chosen.tolist(), THRESHOLD),
            b.Cells("The two losses, and the [cut: cut]", span.tolist(), *losses, THRESHOLD),
        ])]),
        b.Section("examples", "Read some", [
            b.Cards("The best", [card] * 3, "kept"), b.Text("the cut, 0.412", "cut"),
            b.Cards("The worst", [card] * 3),
        ]),
        b.Section("target", "Does it help?", [b.Group([
            b.Curves(f"Loss{hostile}", curves, f"color{hostile}", marks=[20e6]),
            b.Table({"Rule": "text", "loss": "decimals3", "vs random": "signed"},
                    [[f"color{hostile}", [3.19, 0.002], [-0.422, 0.007]], ["random", 3.612, None]],
                    f"By rule{hostile}", f"color{hostile}", [["Both", 3.4, None]], terminal=True),
        ])]),
        b.Section("arms", "What was drawn", [
            b.Heat("Shares", [f"arm {n}{hostile}" for n in range(30)],
                   rng.dirichlet(np.ones(30), 60).T.tolist(), 300),
        ]),
        b.Section("images", "What a network learns from",
                  [b.Images(images, style) for style in ("pairs", "strips", "stages")]),
        b.Section("provenance", "How to repeat it", [
            b.Group([b.Text(f"job: select{hostile}", "code")], "The spec, with every default"),
            b.Group([b.Facts([b.Fact(f"run{hostile}", f"s3://b{hostile}")], "list")], "1 artifact"),
        ]),
    ]  # fmt: skip
    numbers = {"run": f"s3://store/runs/0{hostile}", "artifacts": {}, "warnings": []}
    created = "2026-11-21T14:05:00+00:00"
    return b.Result("select", f"Prose like the books{hostile}", created, numbers, sections, "Nats.")


@pytest.fixture(scope="session")
def result() -> b.Result:
    return build_result()


if __name__ == "__main__":
    from stillhouse.report.page import render

    Path(sys.argv[1]).write_text(render(build_result()), encoding="utf-8")
