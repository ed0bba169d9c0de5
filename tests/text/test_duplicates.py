import hashlib
from unittest import mock

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.ranges import FetchedRanges
from stillhouse.storage.task import commit
from stillhouse.text.duplicates import (
    DROPS_SCHEMA,
    DropsTask,
    DuplicatesTask,
    HashesTask,
    SplitTask,
    document_hash,
    heldout_split,
    keyed_uniform,
    later_occurrences,
    normalise,
    read_drops,
    unit_batches,
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
        content = hashlib.sha256(repr(texts).encode()).hexdigest()
        name = f"scans/parts/{tag}{unit}-{content}.parquet"
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
@given(UNITS, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_later_copies_are_dropped_in_any_batches_and_ranges(
    tmp_path_factory, units, batch, num_ranges, block
):
    store = Store(str(tmp_path_factory.mktemp("drops")))
    receipts = scanned(store, units)
    seen, naive = set(), {}
    for address, text in addresses(units):
        if text in seen:
            naive[address] = "duplicate"
        seen.add(text)
    starts = range(0, len(receipts), batch)
    hashes = tuple(done(store, HashesTask(tuple(receipts[i : i + batch]))) for i in starts)
    ranges = [done(store, DuplicatesTask(hashes, n, num_ranges)) for n in range(num_ranges)]
    assert dropped(store, ranges) == naive
    with mock.patch("stillhouse.text.duplicates.UNITS_A_BLOCK", block):
        blocks = range(-(-len(units) // block))
        made = [done(store, DropsTask(tuple(ranges), number)) for number in blocks]
    assert dropped(store, made) == naive
    found = {unit: digest for receipt in made for unit, digest in receipt.info["units"].items()}
    assert found == unit_digests(drops_table(naive))
    for number, receipt in enumerate(made):
        for unit in range(number * block, min((number + 1) * block, len(units))):
            [part] = receipt.parts
            read = read_drops(store.path(part.path), part.num_bytes, unit).to_pylist()
            mine = [(row["unit"], row["file"], row["row"]) for row in read]
            assert mine == sorted(a for a in naive if a[0] == unit)


def test_ranges_read_their_row_groups_alone(tmp_path):
    """Of 64 k documents in 16 row groups each of 16 ranges reads two or three."""
    store = Store(str(tmp_path))
    texts = [n % 50_000 for n in range(65_536)]
    batch = done(store, HashesTask(tuple(scanned(store, [texts]))))
    with mock.patch.object(FetchedRanges, "fetch", autospec=True, side_effect=FETCH) as fetch:
        made = [done(store, DuplicatesTask((batch,), n, 16)) for n in range(16)]
    sizes = [end - start for _, start, end in (call.args for call in fetch.call_args_list)]
    assert sum(sizes) < 4 * batch.parts[0].num_bytes + 16 * 3 * 2**16
    assert len(dropped(store, made)) == 65_536 - 50_000


FETCH = FetchedRanges.fetch


def names(units):
    return [Receipt(hashlib.sha256(str(n).encode()).hexdigest(), ()) for n in units]


def test_a_new_unit_changes_few_batches():
    before = unit_batches(names(range(5000)))
    assert [r for batch in before for r in batch] == names(range(5000))
    assert {len(batch) for batch in before[:-1]} <= set(range(128, 513))
    for place in (0, 2500, 5000):
        units = [*range(place), 10_000, *range(place, 5000)]
        after = unit_batches(names(units))
        known = {tuple(receipt.task for receipt in batch) for batch in before}
        assert sum(tuple(r.task for r in batch) not in known for batch in after) <= 3
    assert unit_batches([]) == []


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


def drops_table(rows):
    rows = [dict(zip(DROPS_SCHEMA.names, (*row, "duplicate"), strict=True)) for row in sorted(rows)]
    return pa.Table.from_pylist(rows, schema=DROPS_SCHEMA)


def test_digests_differ_for_other_sets():
    sets = [{(0, 0, 0)}, {(0, 0, 1)}, {(0, 1, 0)}, {(0, 0, 1), (0, 1, 0)}]
    assert len({unit_digests(drops_table(rows))["0"] for rows in sets}) == 4
    assert unit_digests(drops_table(set())) == {}
