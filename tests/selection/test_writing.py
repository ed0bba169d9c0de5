from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stillhouse.fingerprint import fingerprint
from stillhouse.selection.writing import group_parts


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 60), st.integers(0, 3))
def test_groups_hold_every_part_once(kept, part_rows, seed):
    names = [fingerprint(i) for i in range(len(kept))]
    groups = group_parts(names, kept, part_rows, seed)
    assert sorted(index for group in groups for index in group) == list(range(len(kept)))
    for group in groups:
        assert len(group) == 1 or sum(kept[i] for i in group) <= part_rows
    for group, following in pairwise(groups):
        assert sum(kept[i] for i in group) + kept[following[0]] > part_rows


def test_order_is_keyed_by_content_and_seed():
    names = [fingerprint(i) for i in range(12)]
    first = group_parts(names, [1] * 12, 100, 0)
    assert first == group_parts(names, [1] * 12, 100, 0)
    assert first != group_parts(names, [1] * 12, 100, 1)
    backwards = group_parts(names[::-1], [1] * 12, 100, 0)
    assert [names[::-1][i] for i in backwards[0]] == [names[i] for i in first[0]]
    assert first != [list(range(12))]
