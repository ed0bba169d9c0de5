import json

import pytest
from vector_cases import VECTORS

from stillhouse.cost import paper_cost

CASES = json.loads((VECTORS / "color_filter_05_compute_cost.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_papers_table_is_reproduced(case):
    inputs = case["inputs"]
    for method, expected in case["outputs"].items():
        cost = paper_cost(
            method,
            inputs["prior_tokens_b"],
            inputs["selected_tokens_b"],
            inputs["tau"],
            inputs["L"],
        )
        for item, value in expected.items():
            assert getattr(cost, item) == pytest.approx(value, abs=1e-9)
