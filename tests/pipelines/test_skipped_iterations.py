from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.methods.rded import Rded
from stillhouse.pipelines.distill import SetSnapshot
from stillhouse.pipelines.distill_result import num_skipped, paper_name
from stillhouse.storage.artifact import PartRef

PART = PartRef("a", 1, 0, 1, "0")


def after(iteration, *losses):
    return SetSnapshot(iteration, PART, losses, 0.1, 1.0)


def test_iterations_of_too_great_or_no_loss_are_counted():
    snapshots = [after(0), after(3, 0.5, 1.5), after(6, 0.9, 1.0, 2.0)]
    method = Mtt(name="mtt", images_per_class=1, max_loss=1.0)
    assert num_skipped(method, snapshots) == 3  # 1.5, 2.0 and one that was not finite
    assert num_skipped(method.model_copy(update={"max_loss": None}), snapshots) == 0
    assert num_skipped(Rded(name="rded", images_per_class=1), snapshots) == 0


def test_methods_are_written_as_in_their_papers():
    names = [paper_name(name) for name in ("mtt", "sre2l", "nrr_dd")]
    assert names == ["MTT", "SRe2L", "NRR-DD"]
