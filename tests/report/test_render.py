import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stillhouse.report.data import DeadLetters, Drop, ExampleRow, ReportData, StepCost
from stillhouse.report.render import render
from stillhouse.selection.sources import OTHER

EVIL = "<script>alert(1)</script>\"'&amp; \x00\x1b[31m \ud800 \u202egnp.exe " + "x" * 500 + " שלום"
VOID = {"meta", "link", "br", "col"}


class Checker(HTMLParser):
    """Collects ids, tags and outward references; notes tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [v for k, v in attrs if k in ("src", "href", "action", "data", "poster")]
        assert not [key for key in values if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    page.encode("utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert not checker.tags & {"script", "iframe", "img", "object", "embed"}
    assert [r for r in checker.references if not r.startswith("data:image/svg+xml,")] == []
    assert "@import" not in page and "url(" not in page
    return checker


def test_page_is_whole_and_alone(report):
    checker = check(render(report))
    assert checker.ids == [
        "health", "sources", "scores", "examples", "target", "training", "cost", "dropped",
        "provenance",
    ]  # fmt: skip


def test_same_data_same_page(report):
    assert render(report) == render(replace(report))


def test_page_says_the_main_things(report):
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", render(report)))
    assert "A model trained on them ends 0.42 nats under one trained on as many random" in text
    assert "2 things to look at first" in text
    assert "33 more sources" in text
    assert "prior 1.00 M 977 8 0.0039 4.712" in text
    assert OTHER not in text
    assert "the cut, 0.412" in text
    assert "−0.422 ± 0.007" in text
    assert all(source.name in text for source in report.sources)


def test_one_seed_is_said_to_be_one(report):
    single = [replace(row, losses=row.losses[:1]) for row in report.targets]
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", render(replace(report, targets=single))))
    assert "measured on held-out target text in one run of each." in text
    assert "how much of a difference is chance is not known" in text
    several = render(report)
    assert "one run of each" not in several and "chance" not in several


def test_other_sources_are_explained(report):
    rows = [*report.sources, replace(report.sources[0], name=OTHER)]
    page = render(replace(report, sources=rows))
    assert f"all others together as {OTHER}." in page


OPTIONAL = ("score_histogram", "seen", "losses")
LISTS = ("sources", "examples", "curves", "targets", "trainings")
LISTS += ("drops", "costs", "warnings", "environment")


@pytest.mark.parametrize("name", [*OPTIONAL, *LISTS, "artifacts"])
def test_any_piece_may_be_missing(report, name):
    check(render(replace(report, **{name: None if name in OPTIONAL else []})))


def test_paper_costs_and_spec_may_be_missing(report):
    check(render(replace(report, paper={}, spec_yaml="")))


def test_nothing_but_the_first_block():
    page = render(
        ReportData(
            "t", "2026-01-01T00:00:00", "store/runs/x", "fraction = 0.1", "documents",
            0, 0, 0, 0, 0, 0, float("nan"), [],
        )
    )  # fmt: skip
    assert check(page).ids == ["health"]
    assert "No warnings." in page


def test_texts_from_the_wild_stay_texts(report):
    example = ExampleRow("best", 1.0, 4.0, 3.0, EVIL, EVIL, EVIL, 1, EVIL, EVIL)
    letters = [replace(letter, file=EVIL, preview=EVIL) for letter in report.dead_letters.first]
    page = render(
        replace(
            report,
            title=EVIL,
            run_uri=EVIL,
            rule=EVIL,
            examples=[example],
            sources=[replace(row, name=EVIL) for row in report.sources],
            curves=[replace(curve, name=EVIL) for curve in report.curves],
            targets=[replace(row, name=EVIL) for row in report.targets],
            drops=[Drop(EVIL, 1, 1, 1)],
            dead_letters=DeadLetters(99, letters),
            costs=[StepCost(EVIL, 1, 1.0, 1.0, None, False)],
            paper={EVIL: 1.0},
            warnings=[replace(warning, title=EVIL, detail=EVIL) for warning in report.warnings],
            spec_yaml=EVIL,
            artifacts=[(EVIL, EVIL)],
            environment=[(EVIL, EVIL)],
        )
    )
    check(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search("[\x00\x1b\ud800]", page)
