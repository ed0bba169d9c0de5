"""Weak supervision, search spaces and diagnostics, against numbers of the references."""

import json

import pytest
import torch
from torch import Tensor, nn
from vector_cases import VECTORS, cases, check, double

from stillhouse.classification import attention
from stillhouse.training.objectives import (
    aggregate,
    autodistil,
    distil,
    masked,
    robust,
    small_losses,
    weak_to_strong,
)


@pytest.mark.parametrize(("given", "wanted"), cases("hybrid_01_diagnostics"))
def test_attention_diagnostics(given, wanted):
    probs = double(given["attention"])
    found = attention.attention_distance(probs, given["grid"])
    torch.testing.assert_close(
        found, double(wanted["average_attention_distance_per_head"]), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        attention.attention_nmi(probs), double(wanted["nmi_per_head"]), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize(("given", "wanted"), cases("aggregate_01_losses"))
def test_bags(given, wanted):
    x, y, bags = double(given["x"]), double(given["y"]), torch.tensor(given["bags"])
    means = y[bags].mean(1)
    for rho in (0.0, 0.25, 0.5, 1.0):
        gradient = {0.0: wanted["grad_bag"], 1.0: wanted["grad_instance"]}.get(rho)
        value = wanted[f"interpolated_rho_{rho}"]
        check(
            lambda t, rho=rho: aggregate.squared((x @ t)[bags], means, rho),
            given["theta"],
            value,
            gradient,
        )
    shares = double(given["y_binary"])[bags].mean(1)
    both = torch.stack([1 - shares, shares], 1)

    def binary(theta: Tensor, rho: float) -> Tensor:
        z = (x @ theta)[bags]
        logs = torch.stack([nn.functional.logsigmoid(-z), nn.functional.logsigmoid(z)], 2)
        return aggregate.cross_entropy(logs, both, rho)

    known = wanted["binary"]
    check(lambda t: binary(t, 0.0), given["theta"], known["bag_loss"], known["grad_bag"])
    check(lambda t: binary(t, 1.0), given["theta"], known["instance_loss"], known["grad_instance"])
    limit = aggregate.response_limit(len(y), given["dp_clip_constant"])
    assert limit == pytest.approx(wanted["dp"]["clip"])
    scale = aggregate.noise_scale(limit, bags.shape[1], given["dp_epsilon"])
    assert scale == pytest.approx(wanted["dp"]["scale_for_replacing_one_label"])


@pytest.mark.parametrize(("given", "wanted"), cases("w2s_01_openai_losses"))
def test_confidence_loss(given, wanted):
    weak, logits = torch.tensor(given["weak_labels"]), given["logits"]
    released = "aux_coef" in given
    weight = weak_to_strong.confidence_weight(
        given["step_frac"],
        given["aux_coef" if released else "alpha_max"],
        given["warmup_frac"],
        released=released,
    )
    if not released:
        assert weight == pytest.approx(wanted["alpha"])
    probs = torch.tensor(logits).softmax(1)
    found = weak_to_strong.threshold(probs, weak)
    assert float(found) == pytest.approx(wanted["threshold"], rel=1e-5)
    point = torch.tensor(logits, requires_grad=True)
    loss = weak_to_strong.soft_label_loss(
        point, weak_to_strong.confidence_targets(point, weak, weight)
    )
    key = "logconf_" if released else ""
    assert loss.item() == pytest.approx(wanted[f"{key}loss"], rel=1e-5)
    (slope,) = torch.autograd.grad(loss, point)
    torch.testing.assert_close(slope, torch.tensor(wanted[f"{key}grad"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("given", "wanted"), cases("rss_01_robust", "pseudo_labels"))
def test_robust_linear(given, wanted):
    theta = double(given["theta"])
    x, other = double(given["x_labelled"]), double(given["x_unlabelled"])
    unit = theta / theta.norm()
    y = torch.tensor(given["y"])
    torch.testing.assert_close(
        robust.linear_margin(x @ unit, y, given["gamma"]),
        double(wanted["phi_labelled"]),
        rtol=1e-8,
        atol=1e-10,
    )
    assert robust.own_labels(other @ unit).tolist() == wanted["pseudo_labels"]
    check(
        lambda t: robust.linear_objective(
            t, (x, y), other, (given["gamma"], given["gamma_prime"]), given["lambda"]
        ),
        given["theta"],
        wanted["objective"],
        wanted["grad_theta"],
        rtol=1e-8,
    )


@pytest.mark.parametrize(("given", "wanted"), cases("rss_01_robust", "x_final"))
def test_inner_ascent(given, wanted):
    w1, b1, w2, b2, x = (double(given[name]) for name in ("w1", "b1", "w2", "b2", "x"))
    labels = torch.tensor(given["labels"])

    def loss(inputs: Tensor) -> Tensor:
        hidden = nn.functional.elu(inputs @ w1.T + b1)
        return nn.functional.cross_entropy(hidden @ w2.T + b2, labels, reduction="none")

    first = robust.worst_case(loss, x, given["gamma"], steps=0)
    torch.testing.assert_close(first, double(wanted["x_after_first_move"]), rtol=1e-8, atol=1e-9)
    final = robust.worst_case(loss, x, given["gamma"], given["steps"])
    torch.testing.assert_close(final, double(wanted["x_final"]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("given", "wanted"), cases("rss_01_robust", "z_star"))
def test_inner_ascent_ends_where_the_squared_loss_is_worst(given, wanted):
    """Of a linear regression, in closed form."""
    theta, x, y = (double(given[name]) for name in ("theta", "x", "y"))

    def loss(inputs: Tensor) -> Tensor:
        return (y - inputs @ theta).square()

    found = robust.worst_case(loss, x[None], given["gamma"], steps=3000)
    torch.testing.assert_close(found[0], double(wanted["z_star"]), rtol=1e-6, atol=1e-8)
    value = loss(found) - given["gamma"] * (found - x).square().sum()
    assert value.item() == pytest.approx(wanted["phi"], rel=1e-6)


@pytest.mark.parametrize(("given", "wanted"), cases("selfdistill_01_losses", "patches"))
def test_errors_of_hidden_patches(given, wanted):
    patches, hidden = double(given["patches"]), torch.tensor(given["masked"]).bool()
    check(
        lambda made: masked.patch_errors(made, patches)[hidden].mean(),
        given["predicted"],
        wanted["mae_loss_norm_pix_True"],
        wanted["mae_grad_pred_norm_pix_True"],
    )


@pytest.mark.parametrize(("given", "wanted"), cases("autodistil_01_search_space"))
def test_search_space(given, wanted):
    def published_params(one: autodistil.SubNetwork) -> float:
        h, r, heads = one.hidden, one.mlp_ratio, one.heads
        layer = h**2 + 3 * h**2 * heads / 12 + 6 * h + 2 * h**2 * r + h * r + 3 * h
        return h * (30522 + 512 + 4) + one.layers * layer + h**2 + 2 * h

    space = autodistil.search_space(
        given["layers"], given["heads"], given["hidden"], given["mlp_ratio"], published_params
    )
    assert len(space) == wanted["count"]
    for known in wanted["some_sorted_positions"]:
        one = space[known["position"]]
        assert [one.layers, one.heads, one.hidden, one.mlp_ratio] == known["arch"]
    for step, known in wanted["sampled_at_step"].items():
        drawn = autodistil.sandwich(space, int(step))
        assert [[d.layers, d.heads, d.hidden, d.mlp_ratio] for d in drawn] == known


@pytest.mark.parametrize(("given", "wanted"), cases("autodistil_02_relation_loss"))
def test_relations_of_prefix_slices(given, wanted):
    shared = json.loads((VECTORS / "kd_autodistil_02_relation_loss.json").read_text())[
        "shared_inputs"
    ]
    rows = round(shared["heads"] * given["width_mult"]) * shared["head_size"]
    columns = int(24 * given["hidden_mult"])
    names = ("query", "key", "value")
    teacher_input = double(shared["teacher_input"])
    inputs = double(given["student_input"], learned=True)
    weights = {n: double(shared["student_weights"][n], learned=True) for n in names}
    biases = {n: double(shared["student_bias"][n], learned=True) for n in names}
    teacher = [
        nn.functional.linear(
            teacher_input, double(shared["teacher_weights"][n]), double(shared["teacher_bias"][n])
        )
        for n in names
    ]
    student = [
        nn.functional.linear(inputs, weights[n][:rows, :columns], biases[n][:rows]) for n in names
    ]
    loss = autodistil.relation_losses(student, teacher, num_heads=shared["relation_heads"]).mean()
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-7)
    loss.backward()
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(weights["query"].grad, double(wanted["grad_query_weight"]), **close)
    torch.testing.assert_close(biases["value"].grad, double(wanted["grad_value_bias"]), **close)
    torch.testing.assert_close(inputs.grad, double(wanted["grad_input"]), **close)


@pytest.mark.parametrize(("given", "wanted"), cases("options_01", "relative"))
def test_ranking_of_losses(given, wanted):
    losses = double(given["true_loss"])
    known = wanted["relative"]
    check(
        lambda p: small_losses.ranking_loss(p, losses),
        given["predicted"],
        known["loss"],
        known["grad"],
    )


@pytest.mark.parametrize(("given", "wanted"), cases("options_01", "forget_rate"))
def test_co_teaching(given, wanted):
    for which in ("1", "2"):
        losses = nn.functional.cross_entropy(
            double(given[f"logits_{which}"]), torch.tensor(given["labels"]), reduction="none"
        )
        assert (
            small_losses.small_loss_rows(losses, given["forget_rate"]).tolist()
            == wanted[f"kept_by_{which}"]
        )


@pytest.mark.parametrize(("given", "wanted"), cases("options_01", "logits_past"))
def test_self_past(given, wanted):
    past = double(given["logits_past"])
    check(
        lambda s: distil.softmax_kl(s, past, given["temperature"]).mean(),
        given["logits_now"],
        wanted["loss"],
        wanted["grad"],
    )


@pytest.mark.parametrize(("given", "wanted"), cases("options_01", "lag"))
def test_ring_of_past_logits(given, wanted):
    slots = [small_losses.past_slots(epoch, given["lag"]) for epoch in given["epochs"]]
    assert [write for write, _ in slots] == wanted["write_slot"]
    assert [read for _, read in slots] == wanted["read_slot"]
