"""A user's ranking rule in a whole job, against numpy over the stored scores."""

from pathlib import Path

import numpy as np
import pytest
from small import Quiet, parse

from stillhouse.errors import CustomCodeError, SpecError
from stillhouse.jobs.run import run_job
from stillhouse.reading.readers import open_selection
from stillhouse.selection.rules import find_rule
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.parquet import read_table

EXTEND = Path(__file__).parents[2] / "examples" / "extend"


def scores_of(result, store, name):
    manifest = load_manifest(result["artifacts"]["scores"][name])
    return [read_table(f"{store}/{part.path}")["value"].to_numpy() for part in manifest.parts]


def test_relative_drop(ray_cluster, finished, world, monkeypatch, reports):
    monkeypatch.chdir(EXTEND)
    asked = {"tau": 8, "rule": "relative_drop:RelativeDrop"}
    asked |= {"exclude_contaminated": False, "exclude_prior_rows": False}
    result = run_job(parse(world, selection=asked), Quiet())
    store = f"{world}/store"
    prior, conditional = (scores_of(result, store, n) for n in ("prior", "conditional"))
    values = [(p - c) / p for p, c in zip(prior, conditional, strict=True)]
    part = np.concatenate([np.full(len(v), i) for i, v in enumerate(values)])
    row = np.concatenate([np.arange(len(v)) for v in values])
    value = np.concatenate(values)
    best = np.lexsort((row, part, -value))[: len(value) // 8]
    kept = open_selection(result["run"]).to_arrow(["part", "row"]).read_all()
    found = set(zip(kept["part"].to_pylist(), kept["row"].to_pylist(), strict=True))
    assert found == {(int(part[i]), int(row[i])) for i in best}
    code, verified = reports("verify", result["artifacts"]["selection"], "--sample", "0")
    assert (code, verified["problems"]) == (0, [])


RULE = """class Rule:
    scorers = {scorers}
    def values(self, scores, rows):
        return {values}
"""


@pytest.fixture
def rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name, scorers="('prior',)", values="scores['prior']"):
        (tmp_path / f"{name}.py").write_text(RULE.format(scorers=scorers, values=values))
        return find_rule("selection.rule", f"{name}:Rule")

    return make


def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(SpecError, match=r"needs `scorers = \(\.\.\.\)`"):
        rule("h7_none", scorers="make()")
    with pytest.raises(SpecError, match="names among prior, conditional"):
        rule("h7_other", scorers="('prior', 'loss')")
    with pytest.raises(SpecError, match="the module has no class"):
        find_rule("selection.rule", "h7_other:Missing")


def test_what_a_rule_raises_or_returns_is_named(rule):
    from stillhouse.selection.rules import RankedRows

    rows = RankedRows(np.full(3, 8), np.arange(3, dtype=np.uint64), 0)
    losses = {"prior": np.ones(3, np.float32)}
    assert rule("h7_good").values(losses, rows).tolist() == [1, 1, 1]
    with pytest.raises(CustomCodeError, match=r"h7_short:Rule: .*shape \(2,\) for 3 rows"):
        rule("h7_short", values="scores['prior'][:2]").values(losses, rows)
    with pytest.raises(CustomCodeError, match=r"h7_bad:Rule failed .*KeyError.*h7_bad.py:4"):
        rule("h7_bad", values="scores['x']").values(losses, rows)
