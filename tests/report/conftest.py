"""A result with every kind of block, for tests of the page.

`python tests/report/conftest.py OUT.html` writes its page, to be looked at in a browser.
"""

import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

import stillhouse.report.blocks as b

CUT = 0.4
TEXT = (
    "The ferry had already cast off when Marta came down to the water, and so she sat on her trunk "
    "among the nets and waited.\n“You will be wanting the other boat,” said the old man."
)


def build_result(hostile: str = "") -> b.Result:
    """The same every time; `hostile` is added to every text that users or data may write."""
    rng = np.random.default_rng(2)
    prior = rng.normal(4.4, 0.8, 20_000)
    score = np.where(rng.random(20_000) < 0.09, *rng.normal([[0.75], [-0.35]], 0.3, (2, 20_000)))
    kept, edges, span = score >= CUT, np.linspace(-4, 2, 121), np.linspace(0, 10, 101)
    counts = [np.histogram(score[m], edges)[0].tolist() for m in (slice(None), kept)]
    losses = [
        np.histogram2d(prior[m], (prior - score)[m], [span, span])[0].astype(int).tolist()
        for m in (slice(None), kept)
    ]
    shown = {"Source": "text", "shares": "bars", "kept": "percent", "score": "decimals2"}
    sources = [
        [f"source {n:02d}{hostile}", [0.03, 0.6 * 0.86**n], 0.6 * 0.86**n, [0.6 - n, 0.3]]
        for n in range(45)
    ]
    ends = {"color": 3.19, "random": 3.61, "conditional_only": 3.24}
    curves = {
        name + hostile: [
            [(x * 1e6, end + 0.01 * s + 3 / x) for x in range(4, 44)] for s in range(3)
        ]
        for name, end in ends.items()
    }
    rules = [[f"color{hostile}", [3.19, 0.002], [-0.422, 0.007]], ["random", 3.612, None]]
    columns = {"Rule": "text", "loss": "decimals3", "vs random": "signed"}
    card = b.Card("+1.284", f"fiction{hostile}", TEXT + hostile, [b.Fact("Document", hostile)])
    png = [b64encode(b"\x89PNG").decode()] * 2
    images = [b.ImageRow(f"ship{hostile}", png, png, main=True), b.ImageRow("cat", png[:1], png)]
    warning = b.Warn(f"2.6 % are near-duplicates{hostile}", "Set `selection.max_share`: **read**.")
    arms, shares = [f"arm {n}{hostile}" for n in range(30)], rng.dirichlet(np.ones(30), 60).T
    facts = [b.Fact("Pool", "345 M", f"1.35 M{hostile}"), b.Fact("Kept", "43.1 M", main=True)]
    blocks: dict[str, list[b.Block]] = {
        "lead": [
            b.Text("Of 345 M tokens, **43.1 M were kept**.", "story", terminal=True),
            b.Facts(facts, share=0.125, terminal=True),
        ],
        "health": [b.Warnings([warning], "All were checked.")],
        "sources": [
            b.Text("Shares [pool: in the pool] and [kept: among the kept]."),
            b.Table(shown, sources, shown=12, style="stacked", terminal=True),
        ],
        "scores": [
            b.Group(
                [
                    b.Histogram("Scores", edges.tolist(), *counts, CUT),
                    b.Cells("The two losses, and the [cut: cut]", span.tolist(), *losses, CUT),
                ]
            )
        ],
        "examples": [
            b.Cards("The best", [card] * 3, "kept"),
            b.Text("the cut, 0.400", "cut"),
            b.Cards("The worst", [card] * 3),
        ],
        "target": [
            b.Curves(f"Loss{hostile}", curves, f"color{hostile}", marks=[20e6]),
            b.Table(columns, rules, f"By rule{hostile}", f"color{hostile}", [["Both", 3.4, None]]),
        ],
        "arms": [b.Heat("Shares", arms, shares.tolist(), 300)],
        "images": [b.Images(images, style) for style in ("pairs", "strips", "stages")],
        "provenance": [
            b.Group([b.Text(f"job: select{hostile}", "code")], "The spec, with every default"),
            b.Group([b.Facts([b.Fact(f"run{hostile}", f"s3://b{hostile}")], "list")], "1 artifact"),
        ],
    }
    sections = [b.Section(name, name.capitalize(), of) for name, of in blocks.items()]
    numbers = {"run": f"s3://store/runs/0{hostile}", "artifacts": {}, "warnings": []}
    created = "2026-11-21T14:05:00+00:00"
    return b.Result("select", f"Prose like the books{hostile}", created, numbers, sections, "Nats.")


@pytest.fixture(scope="session")
def result() -> b.Result:
    return build_result()


if __name__ == "__main__":
    from stillhouse.report.page import render

    Path(sys.argv[1]).write_text(render(build_result()), encoding="utf-8")
