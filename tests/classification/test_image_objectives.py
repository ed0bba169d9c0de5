"""Objectives of classifiers: two workers train as one, what is dropped leaves outputs as they are,
and every built-in objective against its equation, computed here.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from image_parts import CLASSES, COUNTS, NAME, SMALL, losses, make_task, manifest, put_images
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, log_softmax, softmax

from stillhouse.classification.learner import ClassifierFacts
from stillhouse.classification.signals import LogitsTask
from stillhouse.classification.stored import BuiltFrom, load_teacher
from stillhouse.classification.stream import bags_of
from stillhouse.classification.task import StoredClassifier
from stillhouse.classification.worker import train_classifier
from stillhouse.distillation.prepared import ImageHostSettings, Preparation, prepare
from stillhouse.errors import InputError, SpecError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.objectives.aggregate import Bags
from stillhouse.training.objectives.dhkd import Dhkd
from stillhouse.training.objectives.hybrid import Hybrid
from stillhouse.training.objectives.kd import Kd
from stillhouse.training.objectives.lsskd import Lsskd
from stillhouse.training.objectives.masked import Masked
from stillhouse.training.objectives.robust import Robust
from stillhouse.training.objectives.small_losses import CoTeaching, SelfPast
from stillhouse.training.objectives.weak_to_strong import WeakToStrong

TAUGHT = [{"path": "teacher"}]
OBJECTIVES = {
    "kd": {"name": "kd", "teachers": TAUGHT},
    "dhkd": {"name": "dhkd", "teachers": TAUGHT, "align": True},
    "one head": {"name": "dhkd", "teachers": TAUGHT, "heads": 1, "loss": "kl"},
    "weak_to_strong": {"name": "weak_to_strong", "teachers": TAUGHT},
    "bags": {"name": "bags", "bag_size": 4, "epsilon": 5.0},
    "lsskd": {"name": "lsskd"},
    "masked": {"name": "masked", "mask": 0.5},
    "hybrid": {"name": "hybrid", "teachers": [*TAUGHT, *TAUGHT]},
    "robust": {"name": "robust", "num_labelled": 16, "steps": 2},
    "self_past": {"name": "self_past", "lag": 1},
    "co_teaching": {"name": "co_teaching", "forget_rate": 0.3},
}
VIT = {"name": "vit", "depth": 2, "width": 16, "options": {"heads": 2}}


def quiet(*_):
    return None


def host(store):
    return ImageHostSettings(Preparation(NAME, zca=False), "cpu").build(store)


def make_store(folder):
    """Images, and a teacher with its logits: the store, and what a task needs of the teacher."""
    store = Store(str(folder / "store"))
    put_images(store)
    task = make_task(num_epochs=3, seed=1)
    train_classifier(store, task, quiet)
    teacher = StoredClassifier("a" * 64, store.path("models", task.fingerprint))
    asked = LogitsTask(NAME, teacher, "train.objective.teachers.0")
    receipt = commit(store, asked, asked.run(store, host(store)))
    vits = []
    for objective in ({"name": "masked", "mask": 0.5}, {}):
        task = make_task(objective, VIT, num_epochs=1, seed=1)
        train_classifier(store, task, quiet)
        path = store.path("models", task.fingerprint)
        vits.append(StoredClassifier(task.fingerprint, path))
    return store, {"teachers": [teacher], "logits": list(receipt.parts), "vits": vits}


def tasks(taught):
    """The trainings of all objectives, of 12 steps."""
    made = {}
    for name, objective in OBJECTIVES.items():
        given = {name: taught[name] for name in ("teachers", "logits") if "teachers" in objective}
        if name == "hybrid":
            given = {"teachers": taught["vits"]}
        network = VIT if name in ("masked", "hybrid") else None
        made[name] = make_task(objective, network, num_epochs=2, eval_points=1, **given)
    return made


def worker(rank, folder, taught, count):
    """One of `count` processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    store = Store(f"{folder}/several")
    for task in tasks(taught).values():
        train_classifier(store, task, quiet, WorkerGroup.current())
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def trained(request, tmp_path_factory):
    """One process's results, those of several, and the tasks."""
    folder = tmp_path_factory.mktemp("objectives")
    store, taught = make_store(folder)
    several = Store(str(folder / "several"))
    put_images(several)
    taught["logits"] = [replace(part, path=str(part.path)) for part in taught["logits"]]
    for part in taught["logits"]:  # signals lie in the first store
        target = Path(several.path(part.path))
        target.parent.mkdir(parents=True)
        target.write_bytes(Path(store.path(part.path)).read_bytes())
    torch.multiprocessing.spawn(worker, (str(folder), taught, request.param), nprocs=request.param)
    made = tasks(taught)
    for task in made.values():
        train_classifier(store, task, quiet)
    return store, several, made


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_several_workers_train_as_one(trained, name):
    store, several, made = trained
    task = made[name]
    assert losses(several, task) == pytest.approx(losses(store, task), rel=1e-5)
    first, second = (manifest(one, task).totals for one in (store, several))
    assert first["order_sha256"] == second["order_sha256"]
    assert min(losses(store, task)) < losses(store, task)[0]


def built_again(store, task):
    folder = Path(store.path("models", task.fingerprint))
    network = BuiltFrom.read((folder / "config.json").read_bytes()).build(3).eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network


@pytest.mark.parametrize("name", ["dhkd", "lsskd", "co_teaching"])
def test_what_is_dropped_leaves_outputs_as_they_are(trained, name):
    """The folder has the network alone, and measures what was measured in the training."""
    store, _, made = trained
    network = built_again(store, made[name])
    assert {name.split(".")[0] for name in network.state_dict()} == {"features", "classifier"}
    images, labels = prepare(store, Preparation(NAME, zca=False), torch.device("cpu")).test
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).float().mean()
    assert manifest(store, made[name]).totals["test"]["accuracy"] == pytest.approx(float(right))


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    teacher = 3 * torch.randn(size, CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return images, {"labels": labels, "logits.0": teacher.half(), "rows": torch.arange(size)}


def facts(network, classes=CLASSES):
    return ClassifierFacts(network, classes, COUNTS[0], (1, 8, 8), teachers=(1.0,))


def network_of(classes=CLASSES):
    settings = NetworkSettings.model_validate(SMALL)
    from stillhouse.models.networks import build_network

    return build_network(settings, (1, 8, 8), classes, 0)


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


def test_a_vit_reports_its_attention(trained):
    store, _, made = trained
    found = manifest(store, made["hybrid"]).totals["attention"]
    assert [len(found[name]) for name in ("distance", "nmi")] == [2, 2]
    assert 0 < found["distance"][0] < 2**0.5  # the mean over a grid of 2 x 2 is 0.85 if uniform
    assert all(0 <= value <= 1 for value in found["nmi"])
    assert manifest(store, made["kd"]).totals["attention"] is None


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
        (Robust, {"num_labelled": 3}, r"`train\.objective\.num_labelled: 3`: there are 4 classes"),
        (CoTeaching, {"forget_rate": 1}, r"`train\.objective\.forget_rate: 1` is not in \[0, 1\)"),
        (Bags, {"rho": -1}, r"`train\.objective\.rho: -1` is not between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(kind, options, match):
    with pytest.raises(SpecError, match=match):
        kind(facts(network_of()), **options)


def test_a_teacher_that_does_not_fit_is_refused(trained, tmp_path):
    store, _, made = trained
    folder = tmp_path / "teacher"
    folder.mkdir()
    source = Path(store.path("models", made["kd"].fingerprint))
    content = json.loads((source / "config.json").read_text())
    weights = load_file(source / "weights.safetensors")
    prepared = prepare(store, Preparation(NAME, zca=False), torch.device("cpu"))
    stored, key = StoredClassifier("b" * 64, str(folder)), "train.objective.teachers.0"

    def put(changes, tensors):
        (folder / "config.json").write_text(json.dumps(content | changes))
        save_file(tensors, folder / "weights.safetensors")

    names = content["class_names"]
    put({"class_names": ["another", *names[1:]]}, weights)
    with pytest.raises(
        InputError, match=r"teachers\.0` does not know the class 'class 0' \(1 of 4"
    ):
        load_teacher(stored, prepared, key)
    put({}, weights | {"classifier.bias": torch.full((CLASSES,), torch.nan)})
    with pytest.raises(InputError, match="weights that are not finite"):
        load_teacher(stored, prepared, key)
    put({}, weights | {"classifier.bias": torch.full((CLASSES,), 1e30)})
    with pytest.raises(InputError, match="the logits of 96 of 96 images are not finite"):
        LogitsTask(NAME, stored, key).run(store, host(store))
    put({"class_names": names[::-1]}, weights)  # the same network, its classes renamed
    with torch.no_grad():
        turned = load_teacher(stored, prepared, key)(prepared.train[:5])
        expected = built_again(store, made["kd"])(prepared.train[:5]).flip(1)
    assert torch.equal(turned, expected)
