import hashlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import commit
from stillhouse.text.drops import (
    DROPS_SCHEMA,
    DuplicatesTask,
    SplitTask,
    add_digests,
    unit_digests,
)
from stillhouse.text.tasks import SCAN_SCHEMA

UNITS = st.lists(st.lists(st.integers(0, 12), max_size=10), min_size=1, max_size=4)
"""Texts by unit; equal numbers are copies."""


def text_hash(number):
    return hashlib.sha256(str(number).encode()).digest()[:16]


def scanned(store, units, tag=""):
    """Receipts of scanned units, each in one part; file = text row // 4."""
    receipts = []
    for unit, texts in enumerate(units):
        rows = [
            {"file": i // 4, "row": i % 4, "hash": text_hash(text), "chars": 1}
            for i, text in enumerate(texts)
        ]
        table = pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)
        name = f"scans/parts/{tag}{unit}-{'-'.join(map(str, texts))}.parquet"
        receipts.append(Receipt(str(unit), (store.put_part(name, table, num_tokens=0),)))
    return receipts


def done(store, task):
    return commit(store, task, task.run(store, None, None))


def dropped(store, receipts):
    """{(unit, file, row): reason} of some drop receipts."""
    found = {}
    for receipt in receipts:
        for part in receipt.parts:
            for row in read_table(store.path(part.path)).to_pylist():
                found[row["unit"], row["file"], row["row"]] = row["reason"]
    return found


def addresses(units):
    return [
        ((unit, i // 4, i % 4), text)
        for unit, texts in enumerate(units)
        for i, text in enumerate(texts)
    ]


@settings(max_examples=25)
@given(UNITS)
def test_later_copies_are_dropped_in_any_number_of_ranges(tmp_path_factory, units):
    store = Store(str(tmp_path_factory.mktemp("drops")))
    receipts = scanned(store, units)
    seen, naive = set(), {}
    for address, text in addresses(units):
        if text in seen:
            naive[address] = "duplicate"
        seen.add(text)
    digests = []
    for num_ranges in (1, 3):
        tasks = [DuplicatesTask(tuple(receipts), n, num_ranges) for n in range(num_ranges)]
        made = [done(store, task) for task in tasks]
        assert dropped(store, made) == naive
        names = {unit for receipt in made for unit in receipt.info["units"]}
        digests.append(
            {
                unit: add_digests(r.info["units"][unit] for r in made if unit in r.info["units"])
                for unit in names
            }
        )
    assert digests[0] == digests[1]
    assert set(digests[0]) == {str(unit) for unit, _, _ in naive}


@settings(max_examples=25)
@given(UNITS, st.booleans())
def test_split_parts_no_copies(tmp_path_factory, units, deduplicate):
    store = Store(str(tmp_path_factory.mktemp("split")))
    receipts = scanned(store, units)
    sides = [SplitTask(tuple(receipts), 0.4, deduplicate, held) for held in (False, True)]
    train, heldout = (dropped(store, [done(store, side)]) for side in sides)
    everywhere = addresses(units)
    on_train = {text for address, text in everywhere if address not in train}
    on_heldout = {text for address, text in everywhere if address not in heldout}
    assert not on_train & on_heldout
    assert on_train | on_heldout == {text for _, text in everywhere}
    kept = [a for a, _ in everywhere if a not in train] + [
        a for a, _ in everywhere if a not in heldout
    ]
    expected = len({text for _, text in everywhere}) if deduplicate else len(everywhere)
    assert len(kept) == len(set(kept)) == expected
    if len({text for _, text in everywhere}) > 1:
        assert on_train and on_heldout


ROWS = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9)), max_size=20)


def drops_table(rows):
    rows = [dict(zip(DROPS_SCHEMA.names, (*row, "duplicate"), strict=True)) for row in sorted(rows)]
    return pa.Table.from_pylist(rows, schema=DROPS_SCHEMA)


@given(ROWS, st.data())
def test_digests_of_disjoint_sets_add_up(rows, data):
    side = data.draw(st.sets(st.sampled_from(sorted(rows)))) if rows else set()
    whole, one, two = (unit_digests(drops_table(found)) for found in (rows, side, rows - side))
    for unit, digest in whole.items():
        assert digest == add_digests(d[unit] for d in (two, one) if unit in d)


@pytest.mark.parametrize("rows", [{(0, 0, 1)}, {(0, 1, 0)}, {(0, 0, 1), (0, 1, 0)}, set()])
def test_digests_differ_for_other_sets(rows):
    other = unit_digests(drops_table({(0, 0, 0)}))
    assert unit_digests(drops_table(rows)).get("0") != other["0"]


def test_nothing_dropped():
    assert add_digests([]) == "0" * 32
