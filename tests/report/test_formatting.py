import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.report import formatting as f

N = f.NARROW


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, f"10.0{N}k"),
        (999_499, f"999{N}k"),
        (999_600, f"1.00{N}M"),
        (498e6, f"498{N}M"),
        (1e13, f"10.0{N}T"),
        (None, "–"),
    ],
)
def test_compact(value, text):
    assert f.compact(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (0.125, "12.5"), (0.0034, "0.34"), (0.00001, f"<{N}0.01"), (1, "100.0")],
)
def test_percent(share, text):
    assert f.percent(share) == f"{text}{N}%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (3.42, f"3.4{N}s"),
        (59.4, f"59{N}s"),
        (59.6, f"1{N}min 00{N}s"),
        (9310, f"2{N}h 35{N}min"),
    ],
)
def test_duration(seconds, text):
    assert f.duration(seconds) == text


def test_numbers_with_sign_and_unit():
    assert f.signed(-0.4219) == "−0.422"
    assert f.signed(0.4219, 2) == "+0.42"
    assert f.decimals(None) == "–"
    assert f.ratio(5.23) == "×5.2"
    assert f.ratio(0.152) == "×0.15"
    assert f.ratio(31.4) == "×31"
    assert f.ratio(0.0) == "×0"
    assert f.flops(2.1e15) == f"2.10{N}PFLOP"
    assert f.flops(0.0) == "–"
    assert f.day("2026-11-21T14:05:00+00:00") == "21 November 2026, 14:05 UTC"


def test_visible_shows_what_html_cannot_carry():
    assert f.visible("a\x00b\x1bc\x7f\x85\ud83d\uffff\r\n\td") == "a␀b␛c␡\ufffd\ufffd\ufffd\n\td"
    assert f.visible("naïve 日本 שלום 🥃") == "naïve 日本 שלום 🥃"
    assert f.visible(7) == 7


@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_is_always_utf8(text):
    assert f.visible(f.visible(text)) == f.visible(text).encode().decode()


def test_marks_are_ours_and_everything_else_is_text():
    assert f.marked("`a <b>` is\0 **low**, [pool: in it].") == (
        '<code>a &lt;b&gt;</code> is\u2400 <em>low</em>, <span class="key pool">in it</span>.'
    )


def test_cells_of_tables():
    assert f.cell([-0.4219, 0.007], "signed") == ("−0.422", "± 0.007")
    assert f.cell([0.6512, None], "hundredths") == ("65.1", "")
    assert f.cell(None, "compact") == ("–", "")
    assert f.cell("all", "short") == ("all", "")
    assert f.cell(0.0039, "short") == ("0.0039", "")
