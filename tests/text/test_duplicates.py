import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import commit
from stillhouse.text.duplicates import (
    DROPS_SCHEMA,
    DuplicatesTask,
    SplitTask,
    add_digests,
    document_hash,
    hash_range,
    heldout_split,
    keyed_uniform,
    later_occurrences,
    normalise,
    unit_digests,
)
from stillhouse.text.tasks import SCAN_SCHEMA

texts = st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "e f", "e\tF"]) | st.text(max_size=2))


def hashes_of(listed):
    return np.frombuffer(b"".join(map(document_hash, listed)), np.uint8).reshape(-1, 16)


def test_the_hash_is_a_prefix_of_sha256_of_the_normalised_text():
    assert normalise("  The\u00a0ﬁrst\n\nＬＩＮＥ ") == "the first line"
    assert document_hash(" ABC\n").hex() == "ba7816bf8f01cfea414140de5dae2223"
    assert len(document_hash("\ud800")) == 16


@given(texts)
def test_later_occurrences_are_those_a_set_has_seen(listed):
    seen, expected = set(), []
    for text in listed:
        expected.append(normalise(text) in seen)
        seen.add(normalise(text))
    hashes = hashes_of(listed)
    assert later_occurrences(hashes).tolist() == expected
    assert later_occurrences(hashes.reshape(-1).view("V16")).tolist() == expected


def test_ranges_are_of_equal_size_and_in_order():
    hashes = np.zeros((256, 16), dtype=np.uint8)
    hashes[:, 0] = np.arange(256)
    assert np.bincount(hash_range(hashes, 4)).tolist() == [64] * 4
    assert hash_range(hashes, 3)[[0, 85, 86, 255]].tolist() == [0, 0, 1, 2]


def test_about_the_share_is_held_out_in_any_order():
    hashes = hashes_of([str(i) for i in range(5000)])
    held_out = heldout_split(hashes, 0.1)
    assert 440 < held_out.sum() < 560
    assert np.array_equal(held_out[::-1], heldout_split(hashes[::-1], 0.1))
    for share in (0.001, 0.999):  # of two rows one is held out, of two texts one is not
        assert sorted(heldout_split(hashes_of(["a", "b"]), share)) == [False, True]
        assert heldout_split(hashes_of(["a", "a"]), share).all()
        assert not heldout_split(hashes_of(["a"]), share).any()


def test_keyed_uniform_is_uniform_even_for_keys_in_a_row():
    draws = keyed_uniform(np.arange(20_000, dtype=np.uint64), seed=7)
    assert (draws > 0).all() and (draws < 1).all()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03


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


def test_digests_differ_for_other_sets():
    sets = [{(0, 0, 0)}, {(0, 0, 1)}, {(0, 1, 0)}, {(0, 0, 1), (0, 1, 0)}]
    assert len({unit_digests(drops_table(rows))["0"] for rows in sets}) == 4
    assert unit_digests(drops_table(set())) == {} and add_digests([]) == "0" * 32
