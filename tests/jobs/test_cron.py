import pytest

from stillhouse.errors import SpecError
from stillhouse.jobs.cron import check_cron


@pytest.mark.parametrize(
    "line",
    [
        "0 3 * * *",
        "*/15 0-6,22,23 1 jan-MAR,12 Mon-Fri",
        "59 23 31 12 6",
        "5/10 * * * *",
        "0 0 29 2 *",
        "0 0 31 2 1",  # the weekday is enough
        "0 0 31 2,3 *",
        "@daily",
    ],
)
def test_good_lines_stay_as_they_are(line):
    assert check_cron(f"  {line.replace(' ', '   ')} ") == line


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "has 0 fields, not 5: minute, hour, day of month, month, weekday"),
        ("0 3 * *", "has 4 fields, not 5"),
        ("0 0 3 * * *", "has 6 fields, not 5"),
        ("@reboot", "has 1 fields, not 5.*@daily"),
        ("60 3 * * *", "minute '60' is out of range: use 0 to 59"),
        ("0 24 * * *", "hour '24' is out of range"),
        ("0 3 0 * *", "day of month '0' is out of range: use 1 to 31"),
        ("0 3 * 13 *", "month '13' is out of range: use 1 to 12 or jan, feb"),
        ("0 3 * * 7", "weekday '7' is out of range: use 0 to 6 or sun, mon"),
        ("0 3 * * Funday", "weekday 'Funday' cannot be read"),
        ("0 5-3 * * *", "hour '5-3' is backwards"),
        ("*/0 3 * * *", "minute '.*/0' has a step out of range"),
        ("*/60 3 * * *", "minute '.*/60' has a step out of range"),
        ("0, 3 * * *", "minute '' cannot be read"),
        ("*-5 3 * * *", "minute '.*-5' cannot be read"),
        ("-5 3 * * *", "minute '-5' cannot be read"),
        ("1-2-3 3 * * *", "minute '1-2-3' cannot be read"),
        ("0 3 30 2 *", "never comes: no month '2' has a day '30'"),
        ("0 3 31 apr,jun *", "never comes"),
    ],
)
def test_bad_lines_say_why(line, sentence):
    with pytest.raises(SpecError, match=sentence):
        check_cron(line)
