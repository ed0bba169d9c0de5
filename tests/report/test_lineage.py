"""The lineage of a chain: where its nodes lie, in whatever order they are written."""

import itertools
import re

import pytest

from stillhouse.report.blocks import Lineage, Node
from stillhouse.report.lineage import lineage

NEEDS = {"base": [], "choose": ["base"], "teacher": ["choose"], "target": ["base", "teacher"]}
LEFT = {"base": 12.5, "choose": 37.5, "teacher": 62.5, "target": 87.5}  # four columns of 25 %


@pytest.mark.parametrize("order", itertools.permutations(NEEDS))
def test_a_node_stands_right_of_all_that_it_needs(order):
    nodes = [Node(name, "train", "done", f"{name}.html", NEEDS[name]) for name in order]
    drawn = lineage(Lineage("", nodes))
    places = re.findall(r'href="(\w+)\.html" style="left:([\d.]+)%;top:([\d.]+)%', drawn)
    assert {name: float(left) for name, left, _ in places} == LEFT
    assert {top for _, _, top in places} == {"50.00"}
    assert drawn.count("<path") == 4
