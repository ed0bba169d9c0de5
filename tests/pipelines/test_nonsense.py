"""Models that cannot select because they are swapped or alike: the job warns of it first."""

import pytest
from small import LEARNING, MODEL, Quiet, parse

from stillhouse.jobs.run import run_job
from stillhouse.jobs.summary import show_result
from stillhouse.report.page import read

NO_HIGHER = "Held-out target text scores no higher than the pool"
NO_BETTER = "The selection is no better than random data"
TITLES = {NO_HIGHER, NO_BETTER, "The conditional does not know the target better than the prior"}


def test_models_the_right_way_round(finished):
    assert TITLES.isdisjoint(finished["warnings"])


def test_swapped_models(ray_cluster, world, given, tmp_path, capsys):
    """They keep what the target gains least from, which is worse than random."""
    swapped = given | {"prior": given["conditional"], "conditional": given["prior"]}
    train = {"model": MODEL, "controls": ["random"], **LEARNING}
    result = run_job(parse(world, store=str(tmp_path), train=train, **swapped), Quiet())
    assert result["target"]["color"]["heldout_nll"] > result["target"]["random"]["heldout_nll"]
    assert result["warnings"][:2] == [NO_BETTER, NO_HIGHER]
    report = read(result["run"])
    (shown,) = report.find("health", "warnings")
    assert [warning.title for warning in shown.warnings] == result["warnings"]
    pool, heldout = (row[2][0] for row in report.find("scores", "table")[0].rows[:2])
    assert heldout < 0 and heldout < pool
    show_result(result)
    assert f"warning: {NO_BETTER}" in capsys.readouterr().out


@pytest.mark.soak
def test_two_random_models(ray_cluster, world, untrained, tmp_path):
    result = run_job(parse(world, store=str(tmp_path), **untrained), Quiet())
    assert NO_HIGHER in result["warnings"]
