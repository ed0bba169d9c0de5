"""From the settings of experts to how each is trained."""

from stillhouse.distillation.expert_options import expert_options
from stillhouse.distillation.methods import ExpertSettings


def test_what_holds_an_expert_back_is_by_kind_or_as_set():
    own = expert_options(ExpertSettings(), "ast", ())
    assert (own.ramp_epochs, own.penalty_weight, own.drop_factor) == (10, 2.0, 0.6)
    plain = expert_options(ExpertSettings(), "mtt", ())
    assert (plain.ramp_epochs, plain.penalty_weight, plain.drop_factor) == (0, 0.0, 0.1)
    changed = {"smoothing": {"ramp_epochs": 0, "penalty_weight": 0.5}, "drop_factor": 0.3}
    given = expert_options(ExpertSettings.model_validate(changed), "ast", ())
    assert (given.ramp_epochs, given.penalty_weight, given.drop_factor) == (0, 0.5, 0.3)
