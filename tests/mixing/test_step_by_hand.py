"""Steps of mixing against their formulas: losses by a loop over rows, gradients by autograd."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mixing_world import make_world
from torch.nn.functional import log_softmax

from stillhouse.mixing.arms import ArmReader, Row
from stillhouse.mixing.decisions import log_parts, read_decisions
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.flad import Ucb1
from stillhouse.mixing.mixer import Draw, Mixer
from stillhouse.mixing.policy import StepPlan
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.spec import control_policy
from stillhouse.mixing.trainer import MixTrainer
from stillhouse.training.group import WorkerGroup

CPU = torch.device("cpu")
UCB1 = Ucb1(name="ucb1", initial_examples=8)
NUM_ARMS = 3
SIZES = (30, 18, 12)
NUM_STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("mixing"))


def task_of(world, **changes):
    return world[1](**{"max_grad_norm": 0.5, "learning_rate": 0.1} | changes)


def make_trainer(world, task, *, plan=None, target=None, mixer=None, group=None):
    """With plain gradient descent."""
    if plan is not None:
        task = replace(task, rule=replace(task.rule, plan=plan))
    trainer = MixTrainer(world[0], task, mixer or Mixer(task), device=CPU, group=group)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    if target is not None:
        trainer.shots = replace(trainer.shots, train=target)
    return trainer


def arm_rows(world, task, arm, first, count):
    return ArmReader(world[0], task.arms, seed=task.seed).rows(arm, first, count)


def token_losses(model, row):
    """NLL of each predicted token of one row, unpadded, EOS included."""
    config = model.config
    answer = [*row.target_ids.tolist(), config.eos_token_id]
    inputs = torch.tensor([[*row.input_ids.tolist(), config.eos_token_id]])
    shifted = torch.tensor([[config.decoder_start_token_id, *answer[:-1]]])
    logits = model(input_ids=inputs, decoder_input_ids=shifted).logits[0]
    return torch.stack([-log_softmax(logits[t], -1)[token] for t, token in enumerate(answer)])


def mean_loss(model, rows):
    return torch.cat([token_losses(model, row) for row in rows]).mean()


def head_gradient(model, losses):
    """Mean of the losses' gradients by the output head, float64."""
    (gradient,) = torch.autograd.grad(sum(losses) / len(losses), [model.lm_head.weight])
    return gradient.double().flatten()


def rewards_of(target, arm):
    """The three formulas."""
    t, a = float(target.norm()), float(arm.norm())
    cosine = float(target @ arm) / (t * a)
    similarity = 2 * t * a / (t * t + a * a)
    aggregate = (1 + cosine) / 2 + similarity
    return {"alignment": cosine, "magnitude": similarity, "aggregate": aggregate}


def first_cosines(world, task):
    """Of each arm's first 8 rows and the target's training half, at the start."""
    trainer = make_trainer(world, task)
    model, shots = trainer.model, trainer.shots
    target = head_gradient(model, [mean_loss(model, shots.train)])
    rows = [arm_rows(world, task, arm, 0, 8) for arm in range(NUM_ARMS)]
    arms = [head_gradient(model, [mean_loss(model, of)]) for of in rows]
    return np.array([rewards_of(target, arm)["alignment"] for arm in arms])


def first_decision(world, **changes):
    task = task_of(world, steps=1, micro_batch=8, **changes)
    run_mix(world[0], task, Mixer(task), device=CPU)
    return task, read_decisions(log_parts(task.log))[0][0]


def test_static_alignment_is_a_softmax_of_the_measured_alignments(world):
    policy = control_policy("static_alignment", UCB1)
    task, decision = first_decision(world, policy=policy, plan=policy.plan(1), label="aligned")
    expected = np.exp(first_cosines(world, task) / 0.1)
    expected /= expected.sum()
    # alignments are rounded to 1/1024, so log-odds are off by 0.01 at most
    assert decision.probabilities == pytest.approx(expected.tolist(), rel=0.011)
    good, _, noise = decision.probabilities
    assert good > 2 * noise


def test_first_rewards_are_rounded_as_all_others(world):
    plan = StepPlan(1, "alignment")
    task, decision = first_decision(world, policy=UCB1, plan=plan, label="first")
    bonus = np.sqrt(2 * np.log(NUM_ARMS))  # of every arm before the first draw
    found = (np.array(decision.indices) - bonus) * 1024
    np.testing.assert_allclose(found, found.round(), atol=1e-6)
    np.testing.assert_allclose(found / 1024, first_cosines(world, task), atol=0.6 / 1024)


def even_target(world, task):
    """Rows of two tokens each: a mean over micro-batches is one over rows."""
    rows = [row for of in range(NUM_ARMS) for row in arm_rows(world, task, of, 20, 3)][:8]
    tokens = np.array([5, 9], np.int32)
    return [Row(row.input_ids, tokens + i) for i, row in enumerate(rows)]


def rewards_by_hand(world, task, before, after, target, arms):
    """Arms' gradients at the old weights, the target's at the new ones."""
    found = {}
    target = head_gradient(after, [mean_loss(after, [row]) for row in target])
    for arm in {*arms}:
        batches = [arm_rows(world, task, arm, 4 * i, 4) for i in range(arms.count(arm))]
        found[arm] = rewards_of(
            target, head_gradient(before, [mean_loss(before, rows) for rows in batches])
        )
    return found


@pytest.mark.parametrize("when", ["before_step", "after_step"])
@pytest.mark.parametrize("name", ["alignment", "magnitude", "aggregate"])
def test_rewards_compare_with_the_targets_gradient_at_the_named_weights(world, name, when):
    task = task_of(world)
    target, arms = even_target(world, task), [0, 2, 0]
    trainer = make_trainer(world, task, plan=StepPlan(2, name, when), target=target)
    before = deepcopy(trainer.model)
    found = trainer.train_on(Draw(arms)).rewards
    after = trainer.model if when == "after_step" else before
    expected = rewards_by_hand(world, task, before, after, target, arms)
    assert found == pytest.approx({arm: of[name] for arm, of in expected.items()}, abs=2e-5)
    if when == "after_step":  # and the step has moved them further than the tolerance
        stale = rewards_by_hand(world, task, before, before, target, arms)
        assert abs(stale[0][name] - expected[0][name]) > 4e-5


def doremi_trainer(world, group=None):
    """Its reference has the same shape and the weights of another seed."""
    policy = DoReMi(name="doremi", path="x", size_temperature=1.0)
    task = task_of(world, policy=policy, plan=StepPlan(0, "excess"), label="proxy", steps=9, seed=1)
    sized = zip(task.arms, SIZES, strict=True)
    task = replace(task, arms=tuple(replace(part, num_rows=n) for part, n in sized))
    mixer = Mixer(task)
    mixer.begin([])
    trainer = make_trainer(world, task, mixer=mixer, group=group)
    trainer.reference = make_trainer(world, replace(task, seed=5)).model.eval()
    return task, mixer, trainer


def doremi_by_hand(world):
    """Gradient norms of the first steps, and weights and output head after them."""
    task, mixer, trainer = doremi_trainer(world)  # the mixer for its draws alone
    model, reference = trainer.model, trainer.reference
    q = np.array(SIZES) / sum(SIZES)
    w, excess, drawn, norms = q.copy(), np.zeros(3), [0, 0, 0], []
    for _ in range(NUM_STEPS):
        arms = mixer.draw().arms
        mixer.learn({})
        u = w / q
        loss, weight = 0.0, 0.0
        over = {arm: [] for arm in arms}
        for arm in arms:
            rows = arm_rows(world, task, arm, 4 * drawn[arm], 4)
            drawn[arm] += 1
            loss = loss + u[arm] * mean_loss(model, rows)
            weight += u[arm]
            with torch.no_grad():
                for row in rows:
                    margins = token_losses(model, row) - token_losses(reference, row)
                    over[arm] += [max(float(margin), 0.0) for margin in margins]
        gradients = torch.autograd.grad(loss / weight, list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= task.train.learning_rate * min(1.0, 0.5 / norms[-1]) * gradient
        for arm, values in over.items():
            excess[arm] = np.mean(values)
        w = w * np.exp(excess)
        w = 0.999 * w / w.sum() + 0.001 / 3
    return norms, w.tolist(), model.lm_head.weight.detach()


def doremi_steps(world, group=None):
    _, mixer, trainer = doremi_trainer(world, group)
    norms = [trainer.step().grad_norm for _ in range(NUM_STEPS)]
    weights = mixer.checkpoint()["policy"]["weights"]
    return norms, weights, trainer.model.lm_head.weight.detach()


def check_doremi(found, expected, first=True):
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    if first:  # the mixers of others learn nothing; rewards are rounded to 1/1024
        assert found[1] == pytest.approx(expected[1], abs=2e-3)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-5)


def test_doremis_loss_is_an_average_weighted_by_u(world):
    expected = doremi_by_hand(world)
    assert max(expected[0]) > 0.5  # clipped
    assert max(expected[1]) - min(expected[1]) > 0.05
    check_doremi(doremi_steps(world), expected)


def worker(rank, folder, world):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    group = WorkerGroup.current()
    static = control_policy("static_alignment", UCB1).plan(1)
    first = make_trainer(world, task_of(world, micro_batch=8), plan=static, group=group)
    task = task_of(world)
    plan, target = StepPlan(2, "aggregate", "after_step"), even_target(world, task)
    trainer = make_trainer(world, task, plan=plan, target=target, group=group)
    found = {
        "first": first.initial_rewards(8),
        "rewards": trainer.train_on(Draw([0, 2, 0])).rewards,
        "after": trainer.model.state_dict(),
        "doremi": doremi_steps(world, group),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.soak
def test_two_workers_compute_the_same_formulas(world, tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path), world), nprocs=2)
    task = task_of(world)
    before = make_trainer(world, task).model
    after, target = deepcopy(before), even_target(world, task)
    expected_doremi = doremi_by_hand(world)
    cosines = first_cosines(world, task_of(world, micro_batch=8))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["first"] == pytest.approx(cosines, abs=1e-5)
        after.load_state_dict(found["after"])
        expected = rewards_by_hand(world, task, before, after, target, [0, 2, 0])
        by_arm = {arm: of["aggregate"] for arm, of in expected.items()}
        assert found["rewards"] == pytest.approx(by_arm, abs=2e-5)
        check_doremi(found["doremi"], expected_doremi, first=rank == 0)
