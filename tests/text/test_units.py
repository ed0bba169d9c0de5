import random
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.text.tasks import GROUP_BYTES, FileRange, InputFile, Unit, group_units

UNIT = 1000
SIZES = st.lists(st.integers(0, 2500), max_size=60)


def file_of(number, size, row_groups=None):
    digest = sha256(str(number).encode()).hexdigest()
    return InputFile(f"/data/{number}", str(number), size, digest, row_groups)


def files_of(sizes):
    groups = (10, 0, 30, 40, 20)
    return [
        file_of(i, size, groups if size > UNIT and i % 2 else None) for i, size in enumerate(sizes)
    ]


def identity(unit, files):
    return [(files[part.file].digest, part.rows) for part in unit.ranges]


def grouped(files):
    return group_units(files, unit_bytes=UNIT)


def test_small_files_fill_a_unit_and_a_digest_of_zeros_closes_it():
    plain = [InputFile(str(i), str(i), 100, "f" * 64) for i in range(12)]
    assert [len(unit.ranges) for unit in grouped(plain)] == [10, 2]
    plain[3] = InputFile("3", "3", 100, "0" * 64)
    assert [len(unit.ranges) for unit in grouped(plain)] == [4, 8]
    plain[1] = InputFile("1", "1", 100, "0" * 64)  # 200 bytes: below a quarter, stays open
    assert [len(unit.ranges) for unit in grouped(plain)] == [4, 8]


def test_large_files_are_alone_and_parquet_is_cut_at_row_groups():
    files = [
        file_of(0, 10),
        file_of(1, 3000, (5, 5, 5, 5, 5, 5)),
        file_of(2, 3000),
        file_of(3, 10),
    ]
    assert grouped(files) == [
        Unit((FileRange(0),)),
        Unit((FileRange(1, (0, 10)),)),
        Unit((FileRange(1, (10, 20)),)),
        Unit((FileRange(1, (20, 30)),)),
        Unit((FileRange(2),)),
        Unit((FileRange(3),)),
    ]


@pytest.mark.parametrize(
    ("first", "rest", "lengths"),
    [
        (500, [200], [2]),  # 200 bytes are less than a quarter of a unit, and 700 fit one
        (500, [100, 100], [3]),
        (500, [300], [1, 1]),  # a quarter of a unit and more stays by itself
        (900, [200], [1, 1]),  # 1,100 bytes do not fit
        (1200, [200], [1, 1]),
    ],
)
def test_a_short_end_joins_the_unit_before_it(first, rest, lengths):
    files = [InputFile("0", "0", first, "0" * 64)]  # a digest of zeros closes its unit
    files += [InputFile(str(i), str(i), size, "f" * 64) for i, size in enumerate(rest, 1)]
    assert [len(unit.ranges) for unit in grouped(files)] == lengths


def test_a_short_end_joins_a_file_larger_than_a_group():
    large, small = GROUP_BYTES + 1, GROUP_BYTES // 8
    files = [InputFile("0", "0", large, "f" * 64), InputFile("1", "1", small, "f" * 64)]
    assert group_units(files, unit_bytes=large + small) == [Unit((FileRange(0), FileRange(1)))]
    apart = [Unit((FileRange(0),)), Unit((FileRange(1),))]
    assert group_units(files, unit_bytes=large + small - 1) == apart


@given(SIZES)
def test_every_file_once_in_order(sizes):
    files = files_of(sizes)
    ranges = [part for unit in grouped(files) for part in unit.ranges]
    flat = [
        (part.file, row)
        for part in ranges
        for row in (range(*part.rows) if part.rows else ["whole"])
    ]
    expected = [
        (i, row)
        for i, file in enumerate(files)
        for row in (range(sum(file.piece_rows)) if file.piece_rows else ["whole"])
    ]
    assert flat == expected
    for unit in grouped(files):
        if len(unit.ranges) > 1:
            assert sum(files[part.file].size_bytes for part in unit.ranges) <= UNIT


@given(SIZES, st.data())
def test_listings_agree_from_the_first_border_they_share(sizes, data):
    files = files_of(sizes)
    at = data.draw(st.integers(0, len(files)))
    longer = [*files[:at], file_of("new", data.draw(st.integers(0, 900))), *files[at:]]
    before, after = grouped(files), grouped(longer)
    old_units = [identity(unit, files) for unit in before]
    new_units = [identity(unit, longer) for unit in after]

    untouched = sum(unit.ranges[-1].file < at - 1 for unit in before)
    assert old_units[:untouched] == new_units[:untouched]
    old_ends = {str(unit[-1]): n for n, unit in enumerate(old_units)}
    for n, unit in enumerate(new_units):
        if after[n].ranges[-1].file > at and str(unit[-1]) in old_ends:
            assert new_units[n + 1 :] == old_units[old_ends[str(unit[-1])] + 1 :]


def test_an_added_file_changes_few_units():
    rng = random.Random(0)
    files = [file_of(i, rng.randint(1, 200)) for i in range(1000)]
    before = [tuple(identity(unit, files)) for unit in grouped(files)]
    lost = []
    for trial in range(200):
        at = rng.randint(0, len(files))
        longer = [*files[:at], file_of(f"new{trial}", 100), *files[at:]]
        after = {tuple(identity(unit, longer)) for unit in grouped(longer)}
        lost.append(len(set(before) - after))
    assert len(before) > 150
    assert sum(lost) / len(lost) < 2.5
    assert max(lost) <= 12
