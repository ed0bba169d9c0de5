import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from conftest import build_result

import stillhouse.report.blocks as b
from stillhouse.errors import ArtifactError
from stillhouse.report.page import draw, read, render, write

EVIL = "<script>alert(1)</script>\"'&amp; \x00\x1b[31m \ud800 \u202egnp.exe " + "x" * 500 + " שלום"
VOID = {"meta", "link", "br", "img"}


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
        assert tag != "img" or values["alt"]
        assert tag != "th" or values["scope"] in ("row", "col")
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
    assert not checker.tags & {"script", "iframe", "object", "embed"}
    assert all(r.startswith(("data:image/svg+xml,", "data:image/png;")) for r in checker.references)
    assert "@import" not in page and "url(" not in page
    return checker


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))


def only(*blocks: b.Block) -> str:
    """The page of these blocks, from behind its head."""
    sections = [b.Section("one", "", [*blocks])]
    return render(b.Result("mix", "t", "2026-01-01T00:00:00", {"run": "r"}, sections)).split(
        "<main>"
    )[1]


def test_page_is_whole_and_alone(result):
    checker = check(render(result))
    assert checker.ids == [section.name for section in result.sections]
    assert render(result) == render(replace(result))


def test_page_says_what_the_blocks_say(result):
    text = text_of(render(result))
    for said in (
        "Of 345 M tokens, 43.1 M were kept .",
        "1 thing to look at first",
        "Set selection.max_share : read .",
        "33 more",
        "color 3.190 ± 0.002 −0.422 ± 0.007",
        "random 3.612 –",
        "the cut, 0.400",
        "source 44",
    ):
        assert said in text, said
    assert "All were checked." not in text
    page = only(b.Warnings([], "All were checked."))
    assert "No warnings." in page and "All were checked." in page


def test_texts_from_the_wild_stay_texts():
    page = render(build_result(EVIL))
    check(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search("[\x00\x1b\ud800]", page)


def test_rows_of_one_name_stand_out_and_narrow_pages_leave_columns_out():
    columns = {"Policy": "text", "loss": "decimals4 wide", "run": "code"}
    rows = [["ucb1", [1.0, None], "<a>"], ["ucb1", 2.0, "b"], ["uniform", 1.5, "c"]]
    page = only(b.Table(columns, rows, main="ucb1"))
    assert page.count("<tr class=main>") == 2
    assert '<table class="full">' in page
    assert page.count('class="n wide"') == 4
    assert "<code>&lt;a&gt;</code>" in page and "1.0000" in page and "±" not in page


def test_bars_are_as_wide_as_their_share():
    page = only(b.Table({"Step": "text", "share": "bars"}, [["a", [None, 0.5]], ["b", [0.0, 1.0]]]))
    assert re.findall(r'<i class="(\w+)" style="width:([^"]+)"', page) == [
        ("kept", "max(1px,50.00%)"),
        ("pool", "0"),
        ("kept", "max(1px,100.00%)"),
    ]


@pytest.mark.parametrize("num_arms", [3, 86, 300])
def test_a_heat_plot_names_its_rows_however_many(num_arms):
    shares = [[1 / num_arms] * 60 for _ in range(num_arms)]
    page = only(b.Heat("Shares", [f"arm {n}" for n in range(num_arms)], shares, 300))
    # rows of 16 px and of 10 px are labelled each, of 4 px every third
    assert page.count("<bdi style") == {3: 3, 86: 86, 300: 100}[num_arms]
    assert f"uniform: {1 / num_arms:.1%}" in page and page.count("data:image/png;base64,") == 1


def test_stored_drawn_again_and_refused_where_it_is_no_result(result, tmp_path):
    stored = replace(result, numbers=result.numbers | {"run": str(tmp_path)})
    assert write(stored) == stored.numbers
    assert read(str(tmp_path)) == stored
    page = tmp_path / "report.html"
    before = page.read_text()
    page.unlink()
    assert draw(read(str(tmp_path)), str(tmp_path)) == str(page)
    assert page.read_text() == before == render(stored)
    (tmp_path / "report.json").write_text('{"title": "x", "pool_tokens": 3}')
    with pytest.raises(ArtifactError, match="broken or of another version"):
        read(str(tmp_path))
