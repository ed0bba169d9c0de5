"""Steps of mixing against their formulas: losses by a loop over rows, gradients by autograd."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mixing_world import make_world, mix_task
from torch.nn.functional import log_softmax

from stillhouse.mixing.arms import ArmReader, Row
from stillhouse.mixing.decision_log import log_parts
from stillhouse.mixing.decisions import read_decisions
from stillhouse.mixing.doremi import DoReMiSettings
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.run import collator, load_shots, run_mix, start_model
from stillhouse.mixing.spec import control_settings
from stillhouse.mixing.target import TargetRow
from stillhouse.mixing.trainer import MixTrainer
from stillhouse.mixing.ucb1 import Ucb1Settings
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.group import WorkerGroup

CPU = torch.device("cpu")
UCB1 = Ucb1Settings(name="ucb1", initial_examples=8)
NUM_ARMS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing")
    return folder, *make_world(folder)


def task_of(world, *, micro_batch=4, **changes):
    folder, store, _, parts, target = world
    task = mix_task(folder, store, parts, target, **changes)
    changed = {"micro_batch": micro_batch, "max_grad_norm": 0.5, "learning_rate": 0.1}
    return replace(task, learning=task.learning.model_copy(update=changed))


def make_trainer(world, task, model, plan, *, target=(), reference=None, group=None):
    words = load_tokenizer(task.tokenizer, task.eos_token)
    parts = [replace(part, uri=world[1].path(part.uri)) for part in task.arms]
    return MixTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        ArmReader(parts, seed=task.seed),
        target,
        collator(task, words),
        plan,
        task.learning,
        device=CPU,
        num_steps=task.num_steps,
        group=group,
        reference=reference,
    )


def new_model(task, seed=None):
    task = task if seed is None else replace(task, seed=seed)
    return start_model(task, load_tokenizer(task.tokenizer, task.eos_token), CPU)


def arm_rows(world, task, arm, first, count):
    parts = [replace(part, uri=world[1].path(part.uri)) for part in task.arms]
    reader = ArmReader(parts, seed=task.seed)
    return reader.rows(arm, first, count)


def token_losses(model, row):
    """NLL of each predicted token of one row, unpadded, EOS included."""
    config = model.config
    answer = [*row.target_ids.tolist(), config.eos_token_id]
    given = torch.tensor([[*row.input_ids.tolist(), config.eos_token_id]])
    shifted = torch.tensor([[config.decoder_start_token_id, *answer[:-1]]])
    logits = model(input_ids=given, decoder_input_ids=shifted).logits[0]
    return torch.stack([-log_softmax(logits[t], -1)[token] for t, token in enumerate(answer)])


def mean_loss(model, rows):
    return torch.cat([token_losses(model, row) for row in rows]).mean()


def head_gradient(model, losses):
    """Mean of the losses' gradients by the output head, float64."""
    total = sum(losses) / len(losses)
    (gradient,) = torch.autograd.grad(total, [model.lm_head.weight])
    return gradient.double().flatten()


def rewards_of(target, arm):
    """The three formulas."""
    t, a = float(target.norm()), float(arm.norm())
    cosine = float(target @ arm) / (t * a)
    similarity = 2 * t * a / (t * t + a * a)
    return {
        "alignment": cosine,
        "magnitude": similarity,
        "aggregate": (1 + cosine) / 2 + similarity,
    }


def first_cosines(world, task):
    """Of each arm's first 8 rows and the target's training half, at the start."""
    model, shots = new_model(task), load_shots(world[1], task)
    target = head_gradient(model, [mean_loss(model, [row.row for row in shots.train])])
    rows = [arm_rows(world, task, arm, 0, 8) for arm in range(NUM_ARMS)]
    arms = [head_gradient(model, [mean_loss(model, of)]) for of in rows]
    return [rewards_of(target, arm)["alignment"] for arm in arms]


def first_decision(task):
    return read_decisions(log_parts(task.mixer.log))[0][0]


def test_static_alignment_is_a_softmax_of_the_measured_alignments(world):
    settings = control_settings("static_alignment", UCB1)
    plan = settings.plan(1)
    task = task_of(world, settings=settings, plan=plan, label="aligned", steps=1, micro_batch=8)
    run_mix(world[1], task, Mixer(task.mixer), device=CPU)
    cosines = np.array(first_cosines(world, task))
    expected = np.exp(cosines / 0.1) / np.exp(cosines / 0.1).sum()
    found = first_decision(task).probabilities
    # alignments are rounded to 1/1024, so log-odds are off by 0.01 at most
    assert found == pytest.approx(expected.tolist(), rel=0.011)
    good, _, noise = found
    assert good > 2 * noise


def test_first_rewards_are_rounded_as_all_others(world):
    task = task_of(
        world, settings=UCB1, plan=StepPlan(1, "alignment"), label="first", steps=1, micro_batch=8
    )
    run_mix(world[1], task, Mixer(task.mixer), device=CPU)
    bonus = np.sqrt(2 * np.log(NUM_ARMS))  # of every arm before the first draw
    found = (np.array(first_decision(task).indices) - bonus) * 1024
    np.testing.assert_allclose(found, found.round(), atol=1e-6)
    np.testing.assert_allclose(found / 1024, first_cosines(world, task), atol=0.6 / 1024)


def even_target(world, task):
    """Rows of two tokens each: a mean over micro-batches, however they are dealt, is one over
    rows.
    """
    rows = [row for of in range(NUM_ARMS) for row in arm_rows(world, task, of, 20, 3)][:8]
    tokens = np.array([5, 9], np.int32)
    return [TargetRow(Row(row.input_ids, tokens + i), (), -1) for i, row in enumerate(rows)]


def rewards_by_hand(world, task, before, after, target, arms):
    """Arms' gradients at the old weights, the target's at the new ones."""
    found = {}
    aim = head_gradient(after, [mean_loss(after, [row.row]) for row in target])
    for arm in {*arms}:
        batches = [arm_rows(world, task, arm, 4 * i, 4) for i in range(arms.count(arm))]
        mine = head_gradient(before, [mean_loss(before, rows) for rows in batches])
        found[arm] = rewards_of(aim, mine)
    return found


@pytest.mark.parametrize("name", ["alignment", "magnitude", "aggregate"])
@pytest.mark.parametrize("when", ["before_step", "after_step"])
def test_rewards_compare_with_the_targets_gradient_at_the_named_weights(world, name, when):
    task = task_of(world)
    target, arms = even_target(world, task), [0, 2, 0]
    model = new_model(task)
    before = deepcopy(model)
    trainer = make_trainer(world, task, model, StepPlan(2, name, when), target=target)
    found = trainer.step(arms).rewards
    after = model if when == "after_step" else before
    expected = rewards_by_hand(world, task, before, after, target, arms)
    assert found == pytest.approx({arm: of[name] for arm, of in expected.items()}, abs=2e-5)
    if when == "after_step":  # and the step has moved them further than the tolerance
        stale = rewards_by_hand(world, task, before, before, target, arms)
        assert abs(stale[0][name] - expected[0][name]) > 1e-4


DOREMI = DoReMiSettings(name="doremi", path="x", size_temperature=1.0)
SIZES = (30, 18, 12)
NUM_STEPS = 3


def doremi_task(world):
    task = task_of(world, settings=DOREMI, plan=StepPlan(0, "excess"), label="proxy", steps=9)
    return replace(task, mixer=replace(task.mixer, sizes=SIZES, seed=1))


def doremi_by_hand(world, task):
    """Gradient norms of the first steps, and the weights after them."""
    model, reference = new_model(task), new_model(task, seed=5)
    mixer = Mixer(task.mixer)  # for its draws alone
    mixer.begin([])
    q = np.array(SIZES) / sum(SIZES)
    w, excess, drawn, norms = q.copy(), np.zeros(3), [0, 0, 0], []
    for _ in range(NUM_STEPS):
        arms = mixer.deal().arms
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
                over[arm] += [
                    max(float(mine - theirs), 0.0)
                    for row in rows
                    for mine, theirs in zip(
                        token_losses(model, row), token_losses(reference, row), strict=True
                    )
                ]
        gradients = torch.autograd.grad(loss / weight, list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= task.learning.learning_rate * min(1.0, 0.5 / norms[-1]) * gradient
        for arm, values in over.items():
            excess[arm] = np.mean(values)
        w = w * np.exp(excess)
        w = 0.999 * w / w.sum() + 0.001 / 3
    return norms, w.tolist(), model.lm_head.weight.detach()


def doremi_steps(world, group=None):
    task = doremi_task(world)
    model, reference = new_model(task), new_model(task, seed=5)
    trainer = make_trainer(world, task, model, task.plan, reference=reference.eval(), group=group)
    mixer = Mixer(task.mixer)
    mixer.begin([])
    norms = []
    for _ in range(NUM_STEPS):
        draw = mixer.deal()
        record = trainer.step(draw.arms, draw.weights)
        mixer.learn(record.rewards)
        norms.append(record.grad_norm)
    weights = mixer.checkpoint()["schedule"]["policy"]["weights"]
    return norms, weights, model.lm_head.weight.detach()


def check_doremi(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert found[1] == pytest.approx(expected[1], abs=2e-3)  # rewards are rounded to 1/1024
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-5)


def test_doremis_loss_is_an_average_weighted_by_u(world):
    expected = doremi_by_hand(world, doremi_task(world))
    assert max(expected[0]) > 0.5  # clipped
    assert max(expected[1]) - min(expected[1]) > 0.05
    check_doremi(doremi_steps(world), expected)


def worker(rank, folder, world):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    group = WorkerGroup.current()
    task = task_of(world, micro_batch=8)
    shots = load_shots(world[1], task)
    static = control_settings("static_alignment", UCB1).plan(1)
    trainer = make_trainer(world, task, new_model(task), static, target=shots.train, group=group)
    first = trainer.initial_rewards(8)
    task = task_of(world)
    model, target = new_model(task), even_target(world, task)
    plan = StepPlan(2, "aggregate", "after_step")
    trainer = make_trainer(world, task, model, plan, target=target, group=group)
    rewards = trainer.step([0, 2, 0]).rewards
    found = {"first": first, "rewards": rewards, "after": model.state_dict()}
    found["doremi"] = doremi_steps(world, group)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_compute_the_same_formulas(world, tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path), world), nprocs=2)
    task = task_of(world)
    before, after = new_model(task), new_model(task)
    expected_doremi = doremi_by_hand(world, doremi_task(world))
    cosines = first_cosines(world, task_of(world, micro_batch=8))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["first"] == pytest.approx(cosines, abs=1e-5)
        after.load_state_dict(found["after"])
        target = even_target(world, task)
        expected = rewards_by_hand(world, task, before, after, target, [0, 2, 0])
        by_arm = {arm: of["aggregate"] for arm, of in expected.items()}
        assert found["rewards"] == pytest.approx(by_arm, abs=2e-5)
        check_doremi(found["doremi"], expected_doremi)
