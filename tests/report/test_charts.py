import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.report import charts
from stillhouse.report.blocks import Cells, Curves, Histogram
from stillhouse.report.charts import Axis


def paths(markup: str, style: str) -> list[str]:
    root = ElementTree.fromstring(markup)
    marks = root.find("svg").iter("path")
    return [path.get("d") for path in marks if path.get("class") == style]


def texts(markup: str, style: str) -> list[str]:
    spans = ElementTree.fromstring(markup).iter("span")
    return ["".join(span.itertext()) for span in spans if span.get("class") == style]


def test_ticks_are_round_numbers_inside_the_axis():
    assert Axis(0, 1060).ticks(5) == [0, 500, 1000]
    assert Axis(-1.3, 2.2).ticks(5) == [-1, 0, 1, 2]
    assert Axis(3.17, 3.63).ticks(6) == pytest.approx([3.2, 3.3, 3.4, 3.5, 3.6])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_there_are_never_too_many_ticks(low, span, at_most):
    axis = Axis(low, low + span)
    assert len(axis.ticks(at_most)) <= at_most


def test_tick_labels_have_no_idle_zeros():
    ticks = Axis(0, 2_000_000).ticks(5)
    assert [charts._tick_text(value, 500_000) for value in ticks] == [
        "0", "500\u202fk", "1\u202fM", "1.5\u202fM", "2\u202fM",
    ]  # fmt: skip
    assert [charts._tick_text(v, 10_000) for v in (-20_000, 100_000)] == [
        "−20\u202fk",
        "100\u202fk",
    ]


def test_histogram_draws_pool_kept_and_cut():
    drawn = charts.histogram(Histogram("", [0, 1, 2, 3, 4], [0, 53, 106, 53], [0, 0, 0, 53], 3.0))
    scale = 106 * 1.06
    top, half = round(1000 - 1000 * 106 / scale), round(1000 - 1000 * 53 / scale)
    assert paths(drawn, "pool") == [f"M0 1000V{half}H333V{top}H667V{half}H1000V1000Z"]
    assert paths(drawn, "kept") == [f"M0 1000V1000H333V1000H667V{half}H1000V1000Z"]
    assert paths(drawn, "cut") == ["M667 0L667 1000"]
    assert texts(drawn, "cutlabel before") == ["cut 3.000"]


def test_histogram_leaves_far_tails_out_and_says_so():
    pool = [1] + [0] * 50 + [5000, 5000] + [0] * 50 + [2]
    drawn = charts.histogram(Histogram("", [float(i) for i in range(105)], pool, pool, 52.0))
    assert "3 further out are not drawn" in drawn
    assert texts(drawn, "x") == ["51.0", "51.5", "52.0", "52.5", "53.0"]


def test_few_values_are_drawn_in_few_bins():
    """Rice's rule: 64 values ask for 2 * 4 bins, so of 16 fine ones two make one."""
    pool = [4] * 16
    drawn = charts.histogram(Histogram("", [float(i) for i in range(17)], pool, pool, 99.0))
    assert paths(drawn, "pool")[0].count("H") == 8
    many = [4_000] * 16  # 80 would be welcome
    drawn = charts.histogram(Histogram("", [float(i) for i in range(17)], many, many, 99.0))
    assert paths(drawn, "pool")[0].count("H") == 16
    odd = [4] * 17  # the last bin is alone, and half as wide: its right end is the axis's
    (area,) = paths(
        charts.histogram(Histogram("", [float(i) for i in range(18)], odd, odd, 99.0)), "pool"
    )
    assert area.count("H") == 9 and "H941V" in area and area.endswith("H1000V1000Z")


def test_density_colours_cells_where_half_was_kept():
    counts, kept = [[4, 0], [1, 4]], [[0, 0], [1, 2]]
    drawn = charts.cells(Cells("", [0, 1, 2], counts, kept, 0.5))
    root = ElementTree.fromstring(drawn)
    cells = [path for path in root.iter("path") if "level" in path.get("class")]
    assert [(cell.get("class").split()[0], cell.get("d")) for cell in cells] == [
        ("kept", "M500 1000H1000V500H500Z"),
        ("kept", "M500 500H1000V0H500Z"),
        ("pool", "M0 1000H500V500H0Z"),
    ]
    assert paths(drawn, "cut") == ["M0 1250L1000 250"]


def test_curves_have_a_mean_a_band_and_a_label():
    two = [[(50, 3.0), (100, 2.0)], [(50, 3.5), (100, 2.5)]]
    drawn = charts.curves(Curves("", {"random": [[(50, 4.0), (100, 3.0)]], "color": two}, "color"))
    axis = Axis(2.0 - 0.12, 4.0 + 0.12)
    assert paths(drawn, "line main") == [f"M500 {axis.y(3.25)}L1000 {axis.y(2.25)}"]
    assert paths(drawn, "band main") == [
        f"M500 {axis.y(3.5)}L1000 {axis.y(2.5)}L1000 {axis.y(2.0)}L500 {axis.y(3.0)}"
    ]
    assert paths(drawn, "band dash0") == []
    assert texts(drawn, "end main") == ["color"]


def test_the_axis_of_small_numbers_ends_with_them():
    """Learning rates, and numbers below 0."""
    drawn = charts.curves(Curves("", {"a": [[(0.01, 2.0), (0.03, 3.0)]]}, "a", settled_from=0.0))
    axis = Axis(1.94, 3.06)
    assert paths(drawn, "line main") == [f"M333 {axis.y(2.0)}L1000 {axis.y(3.0)}"]
    assert texts(drawn, "x")[:3] == ["0.000", "0.005", "0.010"]
    below = charts.curves(Curves("", {"a": [[(-4, 2.0), (-1, 3.0)]]}, "a", settled_from=0.0))
    assert paths(below, "line main") == [f"M0 {axis.y(2.0)}L750 {axis.y(3.0)}"]


def test_one_flat_curve_with_an_evil_name():
    drawn = charts.curves(Curves("", {"<b>a_b": [[(10, 2.0)]]}))
    assert texts(drawn, "end dash0") == ["<b>a b"]


def test_restarts_are_marks_and_an_axis_may_begin_at_zero():
    points = [[(2_000, 5.0), (10_000, 10.0)]]
    drawn = charts.curves(Curves("", {"a": points}, marks=[2500, 7500, 7500], from_zero=True))
    assert paths(drawn, "restart") == ["M250 0L250 1000", "M750 0L750 1000"]
    assert texts(drawn, "y")[0] == "0"


def test_as_many_curves_have_names_as_can_be_told_apart():
    points = [[(100, 5.0), (1000, 4.0)]]
    drawn = charts.curves(Curves("", {f"source {n:02d}": points for n in range(31)}, num_named=6))
    styles = re.findall(r'<path class="line (\w+)" d="M', drawn.split("</svg>")[0])
    assert styles.count("faint") == 25
    named = [style for style in styles if style != "faint"]
    assert len(set(named)) == len(named) == 6
    labels = re.findall(r'class="end \w+" style="top:([\d.-]+)%"', drawn)
    assert len(labels) == 6 and all(0 <= float(place) <= 100 for place in labels)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).map(sorted))
def test_labels_never_overlap(places):
    spread = charts._spread_out(places)
    gaps = [low - high for high, low in pairwise(spread)]
    assert all(gap >= charts.LABEL_GAP - 1e-9 for gap in gaps)
    assert spread[-1] <= 100
