"""Every built-in objective of classifiers against its equation, computed here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from image_parts import CLASSES, COUNTS, NAME, VIT, batch, facts, make_task, network_of, put_images
from torch.nn.functional import gelu, kl_div, log_softmax, softmax

from stillhouse.classification.stored import BuiltFrom, ImageTeacher
from stillhouse.classification.stream import bags_of
from stillhouse.distillation.prepared import Preparation, prepare
from stillhouse.errors import SpecError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Store
from stillhouse.training.objectives.aggregate import Bags
from stillhouse.training.objectives.dhkd import Dhkd
from stillhouse.training.objectives.hybrid import Hybrid
from stillhouse.training.objectives.kd import Kd
from stillhouse.training.objectives.lsskd import Lsskd
from stillhouse.training.objectives.masked import Masked
from stillhouse.training.objectives.robust import Robust
from stillhouse.training.objectives.small_losses import CoTeaching, SelfPast
from stillhouse.training.objectives.weak_to_strong import WeakToStrong


def test_kd_is_its_equation():
    network, (images, signals) = network_of(), batch()
    value = Kd(facts(network), weight=0.3, temperature=2.0)(network, images, signals)
    logits = network(images).detach().double()
    own = -log_softmax(logits, 1)[range(8), signals["labels"]].mean()
    soft = softmax(signals["logits.0"].double() / 2, 1)
    other = kl_div(log_softmax(logits / 2, 1), soft, reduction="batchmean")
    assert value.nll.item() == pytest.approx(own.item(), rel=1e-5)
    expected = 0.7 * own + 0.3 * 4 * other
    assert value.objective.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dhkd_keeps_the_losses_apart_and_aligns_all_parameters():
    network, (images, signals) = network_of(), batch()
    objective = Dhkd(facts(network), alpha=0.5, align=True)
    value = objective(network, images, signals)
    assert value.second is not None
    parameters = [*network.parameters(), *objective.parameters()]
    first, second = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (value.objective, value.second)
    )
    # labels reach the network's head alone, teachers the second head alone, both the features
    assert [gradient is None for gradient in first[-2:]] == [True, True]
    assert [gradient is None for gradient in second[-4:-2]] == [True, True]
    pair = [
        [torch.zeros_like(p) if g is None else g for g, p in zip(one, parameters, strict=True)]
        for one in (first, second)
    ]
    flat = [torch.cat([g.flatten() for g in one]).double() for one in pair]
    dot = flat[0] @ flat[1]
    soft = flat[1] - dot / (flat[0] @ flat[0]) * flat[0] if dot < 0 else flat[1]
    joined = torch.cat([g.flatten() for g in objective.join(*pair)]).double()
    torch.testing.assert_close(joined, flat[0] + soft, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_weak_labels_set_how_many_of_each_class_are_hard(classes):
    network, (images, signals) = network_of(classes), batch(size=40)
    signals = {"logits.0": signals["logits.0"][:, :classes]}  # no labels: they are not read
    objective = WeakToStrong(facts(network, classes), maximum=1.0, warmup=0.5)
    objective.at_step(9, 10)
    objective.learn(objective.survey(network, images, signals))
    value = objective(network, images, signals)
    probs = softmax(network(images).detach(), 1).double()
    weak = softmax(signals["logits.0"].double(), 1)
    if classes == 2:
        hard = (probs[:, 0] < np.quantile(probs[:, 0], weak[:, 1].mean())).long()
        expected = -probs.log()[range(40), hard].mean()
        assert value.objective.item() == pytest.approx(expected.item(), rel=1e-5)
    expected = -(weak * probs.log()).sum(1).mean()
    assert value.nll.item() == pytest.approx(expected.item(), rel=1e-5)
    objective.at_step(0, 10)
    start = objective(network, images, signals)
    assert start.objective.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bags_read_shares_alone_and_their_noise_is_drawn_once():
    labels, bags = torch.arange(COUNTS[0]) % CLASSES, bags_of(COUNTS[0], 5, 0)
    plain = make_task({"name": "bags", "bag_size": 5}, global_batch=15).settings
    noisy = make_task({"name": "bags", "bag_size": 5, "epsilon": 1.0}, global_batch=15).settings
    columns = Bags.columns({"labels": labels}, bags, plain, CLASSES)
    assert set(columns) == {"shares"}
    for bag in bags[:3]:
        expected = np.bincount(labels.numpy()[bag], minlength=CLASSES) / 5
        np.testing.assert_allclose(columns["shares"][bag].numpy(), [expected] * 5, atol=1e-6)
    assert float(columns["shares"].sum()) == pytest.approx(95)  # one image of 96 is in no bag
    once, twice = (Bags.columns({"labels": labels}, bags, noisy, CLASSES) for _ in range(2))
    assert torch.equal(once["shares"], twice["shares"])
    assert not torch.equal(once["shares"], columns["shares"])


def test_lsskd_is_its_equation():
    network, (images, signals) = network_of(), batch(size=4)
    objective = Lsskd(facts(network), temperature=2.0, branch_weight=0.5, feature_weight=0.2)
    value = objective(network, images, signals)
    turned = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(4)], 1).flatten(0, 1)
    with torch.no_grad():
        first = network.features[:4](turned)
        last = network.features[4:](first)
        logits = network(turned)[::4].double()
        branches = [b(x).double() for b, x in zip(objective.branches, (first, last), strict=True)]
        projected = objective.projections[0](first.mean((2, 3)))
    main = -log_softmax(logits, 1)[range(4), signals["labels"]].mean()
    joint = (signals["labels"][:, None] * 4 + torch.arange(4)).flatten()
    own = sum(-log_softmax(one, 1)[range(16), joint].mean() for one in branches)
    soft = softmax(branches[1] / 2, 1)
    mimic = 4 * kl_div(log_softmax(branches[0] / 2, 1), soft, reduction="batchmean")
    gap = (projected - last.mean((2, 3))).square().mean()
    expected = main + 0.5 * own + mimic + 0.2 * gap
    assert value.objective.item() == pytest.approx(expected.item(), rel=1e-4)
    assert value.nll.item() == pytest.approx(main.item(), rel=1e-5)


def attention_of(block, tokens):
    """Scores [heads, T, T] of the tokens of one image, and the tokens after the block [T, H]."""
    heads, width = 2, tokens.shape[1]
    q, k, v = block.queries_keys_values(block.first(tokens)).split(width, dim=1)
    own = [slice(i * width // heads, (i + 1) * width // heads) for i in range(heads)]
    scores = torch.stack([q[:, at] @ k[:, at].T / (width / heads) ** 0.5 for at in own])
    mixed = torch.cat([softmax(s, 1) @ v[:, at] for s, at in zip(scores, own, strict=True)], 1)
    tokens = tokens + block.output(mixed)
    return scores, tokens + block.down(gelu(block.up(block.second(tokens))))


def walk(network, image, counts):
    """One image through a vit: scores and places of the tokens of each block, the last tokens."""
    tokens = network.embedding(image[None])[0].flatten(1).T + network.positions[0]
    places, found = list(range(len(tokens))), []
    for block, count in zip(network.blocks, counts, strict=True):
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        likeness = [float(np.mean([float(a @ b) for b in unit])) for a in unit]
        kept = sorted(sorted(range(len(places)), key=lambda i: likeness[i])[:count])
        places, tokens = [places[i] for i in kept], tokens[kept]
        scores, tokens = attention_of(block, tokens)
        found.append((scores, places))
    return found, network.norm(tokens)


@pytest.mark.parametrize(("drop", "counts"), [(0.0, [16, 16, 16]), (0.5, [16, 12, 8])])
def test_hybrid_is_its_equation(tmp_path, drop, counts):
    """A student of three blocks and 16 patches; its teachers have two and read all patches."""
    store = Store(str(tmp_path))
    put_images(store)
    prepared = prepare(store, Preparation(NAME, zca=False), torch.device("cpu"))
    small = VIT | {"options": {"heads": 2, "patch": 2}}
    student, *others = (
        network_of(settings=small | {"depth": depth}, seed=seed)
        for seed, depth in enumerate((3, 2, 2))
    )
    built = BuiltFrom.of(NetworkSettings.model_validate(small), prepared)
    teachers = tuple(ImageTeacher(one, built, prepared, "teacher") for one in others)
    images, signals = batch(size=3)
    weights = {"label_weight": 0.7, "relation_weight": 0.5, "feature_weight": 2.0}
    objective = Hybrid(replace(facts(student), models=teachers), **weights, drop=drop)
    value = objective(student, images, signals)
    labels, relations, features = [], [], []
    with torch.no_grad():
        for image, label in zip(images, signals["labels"], strict=True):
            own, tokens = walk(student, image, counts)
            (first, second), _ = walk(others[0], image, [16, 16])
            _, known = walk(others[1], image, [16, 16])
            labels.append(-log_softmax(student.classifier(tokens.mean(0)), 0)[label])
            # blocks 1, 2 and 3 of three are as deep as blocks 1, 1 and 2 of two
            for (scores, places), (other, _) in zip(own, (first, first, second), strict=True):
                target = softmax(other[:, places][:, :, places].double(), -1)
                logs = log_softmax(scores.double(), -1)
                relations.append((target * (target.log() - logs)).sum(-1).mean())
            normal = [
                (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                for x in (tokens, known[own[-1][1]])
            ]
            gap = (normal[0] - normal[1]).abs()
            features.append(torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean())
    terms = [float(torch.stack(one).double().mean()) for one in (labels, relations, features)]
    expected = 0.7 * terms[0] + 0.5 * terms[1] + 2.0 * terms[2]
    assert value.objective.item() == pytest.approx(expected, rel=1e-4)
    assert value.nll.item() == pytest.approx(terms[0], rel=1e-5)


def test_robust_reads_so_many_labels_and_moves_images_against_a_price():
    labels = torch.arange(COUNTS[0]) % CLASSES
    settings = make_task({"name": "robust", "num_labelled": 18}).settings
    known = Robust.columns({"labels": labels}, bags_of(COUNTS[0], 1, 0), settings, CLASSES)
    shown = known["labels"] >= 0
    assert (known["labels"][shown] == labels[shown]).all()
    assert torch.bincount(labels[shown]).tolist() == [4, 4, 4, 4]
    network, (images, signals) = network_of(), batch()
    signals["labels"][4:] = -1
    own = network(images).detach()
    plain = Robust(facts(network), 16, weight=0.5, gamma=1e6, gamma_unlabelled=1e6)
    value = plain(network, images, signals)  # nothing moves at this price
    targets = torch.where(signals["labels"] >= 0, signals["labels"], own.argmax(1))
    losses = -log_softmax(own.double(), 1)[range(8), targets]
    scales = torch.tensor([96 / 16] * 4 + [0.5 * 96 / 80] * 4)
    assert value.objective.item() == pytest.approx((losses * scales).mean().item(), rel=1e-4)
    moved = Robust(facts(network), 16, weight=0.5, gamma=1.0, gamma_unlabelled=1.0)
    assert moved(network, images, signals).objective > value.objective


def test_robust_with_other_images_is_its_equation():
    """Image by image: half of the batch has labels, half is of a domain without any."""
    network, (images, signals) = network_of(), batch(size=6)
    signals["labels"][3:] = -1
    weight, gammas, steps = 0.4, (3.0, 5.0), 3
    known = replace(facts(network), unlabelled_share=0.5)
    objective = Robust(known, None, weight, *gammas, steps)
    value = objective(network, images, signals)
    phi, plain = [], []
    for image, label in zip(images, signals["labels"].tolist(), strict=True):
        own = network(image[None])[0].detach()
        target = label if label >= 0 else int(own.argmax())
        gamma = gammas[0] if label >= 0 else gammas[1]

        def slope(at, target=target):
            at = at.clone().requires_grad_()
            loss = -log_softmax(network(at[None]), 1)[0, target]
            return torch.autograd.grad(loss, at)[0]

        moved = image + slope(image) / (2 * gamma)
        for step in range(steps):
            moved = moved + (slope(moved) / (2 * gamma) - (moved - image)) / (step + 2) ** 0.5
        worst = -log_softmax(network(moved[None]), 1)[0, target].item()
        phi.append(worst - gamma * (moved - image).square().sum().item())
        plain.append(-log_softmax(own, 0)[target].item())
    expected = np.mean(phi[:3]) + weight * np.mean(phi[3:])
    assert value.objective.item() == pytest.approx(expected, rel=1e-4)
    assert value.nll.item() == pytest.approx(np.mean(plain[:3]), rel=1e-4)


@pytest.mark.parametrize(("share", "num_labelled"), [(None, None), (0.5, 16)])
def test_robust_has_one_kind_of_images_without_labels(share, num_labelled):
    known = replace(facts(network_of()), unlabelled_share=share)
    with pytest.raises(SpecError, match=r"give either `unlabelled` or `train\.objective\.num_lab"):
        Robust(known, num_labelled)


def test_self_past_learns_from_the_epoch_that_it_names():
    network, (images, signals) = network_of(), batch()
    objective = SelfPast(facts(network), lag=2, weight=1.0, temperature=2.0)
    past = []
    for epoch in range(4):
        objective.learn(objective.survey(network, images, signals).detach())
        value = objective(network, images, signals)
        logits = network(images).detach()
        past.append(logits.half())
        extra = 0.0
        if epoch >= 2:
            soft = softmax(past[epoch - 2].double() / 2, 1)
            own = log_softmax(logits.double() / 2, 1)
            extra = 4 * kl_div(own, soft, reduction="batchmean").item()
        assert value.objective.item() - value.nll.item() == pytest.approx(extra, abs=1e-5)
        with torch.no_grad():
            network.classifier.weight.mul_(1.5)


def test_co_teaching_swaps_the_small_losses():
    network, (images, signals) = network_of(), batch()
    objective = CoTeaching(facts(network), forget_rate=0.5, ramp=0.0)
    objective.at_step(3, 10)
    objective.learn(objective.survey(network, images, signals).detach())
    value = objective(network, images, signals)
    losses = [
        -log_softmax(one(images).detach(), 1)[range(8), signals["labels"]]
        for one in (network, objective.peer)
    ]
    assert not torch.allclose(*losses)
    chosen = [torch.topk(loss, 4, largest=False).indices for loss in losses]
    expected = losses[0][chosen[1]].mean() + losses[1][chosen[0]].mean()
    assert value.objective.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (Kd, {"weight": 2}, r"`train\.objective\.weight: 2` is not between 0 and 1"),
        (Kd, {"temperature": 0}, r"`train\.objective\.temperature: 0` has to be above 0"),
        (Dhkd, {"heads": 3}, r"`train\.objective\.heads: 3`: one of \[1, 2\]"),
        (WeakToStrong, {"schedule": "mine"}, "use paper or released"),
        (Lsskd, {"feature_weight": -1}, r"`train\.objective\.feature_weight: -1` has to be 0 or"),
        (Masked, {}, r"needs `network: \{name: vit\}`, not ConvNet"),
        (Hybrid, {}, r"needs `network: \{name: vit\}`, not ConvNet"),
        (Hybrid, {"drop": 1}, r"`train\.objective\.drop: 1` is not in \[0, 1\)"),
        (Robust, {"num_labelled": 3}, r"`train\.objective\.num_labelled: 3`: there are 4 classes"),
        (CoTeaching, {"forget_rate": 1}, r"`train\.objective\.forget_rate: 1` is not in \[0, 1\)"),
        (Bags, {"rho": -1}, r"`train\.objective\.rho: -1` is not between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(kind, options, match):
    with pytest.raises(SpecError, match=match):
        kind(facts(network_of()), **options)
