"""What each worker of a classifier's training does, from the images to the model artifact."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.attention import attention_diagnostics
from stillhouse.classification.learner import (
    LABELS,
    ROWS,
    ClassifierFacts,
    ImageLearner,
    classifier_layer,
    teacher_logits,
)
from stillhouse.classification.stored import (
    BuiltFrom,
    ImageTeacher,
    check_answers,
    files_of,
    load_classifier,
    load_teacher,
    put_tensors,
)
from stillhouse.classification.stream import ImageStream, bags_of
from stillhouse.classification.task import ClassifyTask
from stillhouse.distillation.prepared import Preparation, Prepared, prepare
from stillhouse.distillation.stored_sets import flat_values
from stillhouse.models.causal_lm import tokenizer_content
from stillhouse.models.device import choose_device
from stillhouse.models.vit import Vit
from stillhouse.storage.artifact import Store
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import identity
from stillhouse.training.checkpoint import WEIGHT, Snapshot
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.objectives import objective_class, refused_settings, teacher_shares
from stillhouse.training.objectives.aggregate import bag_loss
from stillhouse.training.run import History, complete, training_totals
from stillhouse.training.task import Tell

_SHOWN = 64
"""Images that live teachers are tried on, and that attention is measured on."""


def train_classifier(
    store: Store, task: ClassifyTask, tell: Tell, group: WorkerGroup | None = None
) -> None:
    """Train, from the newest checkpoint if there is one, and commit the classifier.

    Args:
        store: for images, checkpoints and model.
        tell: called by the first worker.
        group: the workers, all of which call this; default this process alone.

    Raises:
        DivergedError: the loss became NaN or exploded; the last good checkpoint stays.
        ModelError: the network cannot be built for these images.
        InputError: a teacher in the workers does not fit, or its logits are not finite.
        SpecError: an objective that does not take its settings, batch norm on several workers.
    """
    group, settings = group or WorkerGroup(), task.settings
    prepared = prepare(store, Preparation(task.images, zca=False), torch.device("cpu"))
    network, built = start_network(task, prepared)
    kind: Any = objective_class(settings.objective.place, task.own)
    device = choose_device(task.device, task.gpus)
    needed = getattr(kind, "needs_models", False)
    live = settings.objective.signals == "live" or needed
    teachers: list[ImageTeacher] = []
    for i, one in enumerate(task.teachers if live else ()):
        key = f"train.objective.teachers.{i}"
        teachers.append(load_teacher(one, prepared, key).to(device))
        check_answers(teachers[i], prepared.train[:_SHOWN].to(device), key)
    others, num_others = task.unlabelled, task.unlabelled.part.num_rows if task.unlabelled else 0
    facts = ClassifierFacts(
        network=network,
        num_classes=prepared.num_classes,
        num_images=len(prepared.train) + num_others,
        shape=prepared.shape,
        teachers=teacher_shares([one.weight for one in settings.objective.teachers]),
        models=tuple(teachers),
        unlabelled_share=others.share if others else None,
        seed=settings.seed,
        group=group,
    )
    stream = _stream(store, task, prepared, kind, group)
    trainer = Trainer(
        network,
        stream,
        settings,
        device=device,
        num_steps=task.num_steps,
        learner=partial(
            ImageLearner,
            make=partial(_make, task, kind, facts),
            teachers=() if needed else teachers,
        ),
        group=group,
        stop_on_explosion=True,
    )
    measure = partial(measured, trainer, network)
    bags = bags_of(len(prepared.validation[1]), settings.objective.bag_size, settings.seed)
    history = History(
        task.num_steps,
        settings.eval_points,
        tell if group.rank == 0 else lambda *_: None,
        partial(_evaluation, measure, prepared.validation, torch.from_numpy(bags)),
    )

    def commit(snapshot: Snapshot) -> None:
        stream.close()
        test = measure(*prepared.test)
        if group.rank == 0:
            shown = prepared.validation[0][:_SHOWN]
            _commit(store, task, built, snapshot, history.state_dict(), test, shown)

    complete(store, task, trainer, history, tell, group, commit)


def start_network(task: ClassifyTask, prepared: Prepared) -> tuple[nn.Module, BuiltFrom]:
    """The network on the CPU before the first step, and what it is built from."""
    seed, init = task.settings.seed, task.init
    if init is None:
        assert task.network is not None
        if not task.body:
            built = BuiltFrom.of(task.network, prepared)
            return built.build(seed), built
        from stillhouse.models.text_classifier import config_of, load_body

        body = load_body(task.body)
        built = BuiltFrom.of(task.network, prepared, config_of(body))
        network = built.build(seed)
        network.get_submodule("body").load_state_dict(body.state_dict())
        return network, built
    given, its = load_classifier(init.model, prepared)
    built = BuiltFrom.of(its.network, prepared, its.body)
    network = built.build(seed)
    kept, fresh = given.state_dict(), network.state_dict()
    if init.head == "fresh":
        new = {name for name in fresh if name.startswith("classifier.")}
        classifier_layer(network)
        kept |= {name: fresh[name] for name in new}
    else:
        load_teacher(init.model, prepared, "init")  # its classes and shape have to be the job's
    network.load_state_dict(kept)
    if init.frozen:
        network.requires_grad_(False)
        classifier_layer(network).requires_grad_(True)
    return network, built


def _make(task: ClassifyTask, kind: Any, facts: ClassifierFacts) -> Any:
    objective = task.settings.objective
    with refused_settings(objective.name):
        return kind(facts, **objective.options)


def _stream(
    store: Store, task: ClassifyTask, prepared: Prepared, kind: Any, group: WorkerGroup
) -> ImageStream:
    """This worker's images, with their labels and the teachers' stored logits."""
    settings = task.settings
    images, labels = prepared.train, prepared.train_labels
    if task.unlabelled is not None:
        others = task.unlabelled.images(store, prepared)
        images = torch.cat([images, others])
        labels = torch.cat([labels, torch.full((len(others),), -1)])
    bags = bags_of(len(images), settings.objective.bag_size, settings.seed)
    columns = {LABELS: labels, ROWS: torch.arange(len(images))}
    for i, part in enumerate(task.logits):
        values = flat_values(read_table(store.path(part.path)), "logits")
        shape = (-1,) if settings.views is None else (settings.views, prepared.num_classes)
        columns[teacher_logits(i)] = torch.from_numpy(values).view(len(prepared.train), *shape)
    columns_of: Callable[..., dict[str, Tensor]] | None = getattr(kind, "columns", None)
    if columns_of is not None:
        columns = columns_of(columns, bags, settings, prepared.num_classes)
    return ImageStream(
        task.order(),
        images,
        columns,
        bags,
        rank=group.rank,
        num_workers=group.size,
        augmentation=tuple(settings.augmentation),
        views=settings.views,
    )


def measured(
    trainer: Trainer,
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    bags: Tensor | None = None,
) -> dict[str, float]:
    """Accuracy, and NLL in nats, of images [N, C, H, W]; all workers call this together.

    `bag_nll` is the loss of bags [m, k] of these images.
    """
    logits = torch.from_numpy(trainer.map_rows(lambda micro: network(micro).float(), images))
    right = int((logits.argmax(1) == labels).sum())
    nll = cross_entropy(logits.double(), labels)
    found = {"accuracy": right / len(labels), "nll": float(nll)}
    if bags is not None:
        found["bag_nll"] = float(bag_loss(logits.double(), labels, bags))
    return found


def _evaluation(
    measure: Callable[..., dict[str, float]],
    part: tuple[Tensor, Tensor],
    bags: Tensor,
    _: StepRecord,
) -> tuple[dict[str, Any], float]:
    found = measure(*part, bags if bags.shape[1] > 1 and len(bags) else None)
    return dict(found), found["nll"]


def _commit(
    store: Store,
    task: ClassifyTask,
    built: BuiltFrom,
    snapshot: Snapshot,
    history: dict[str, Any],
    test: dict[str, float],
    shown: Tensor,
) -> None:
    """Write the network, what it is built from, and the training's history to the store.

    Attention, of a vit, is measured on the images `shown`.
    """
    network = built.build(0)
    own = {name.removeprefix(WEIGHT): tensor for name, tensor in snapshot.tensors.items()}
    put_tensors(network, own)

    def write(folder: Path) -> None:
        beside = tokenizer_content(task.tokenizer) if task.tokenizer else {}
        for name, data in (files_of(network, built) | beside).items():
            (folder / name).write_bytes(data)

    attention = None
    if isinstance(network, Vit):
        attention = attention_diagnostics(network, shown)
    train = task.settings.identity()
    if task.own is not None:
        train["objective"]["code"] = task.own.digest
    evaluations = history["evaluations"]
    put_folder(
        store,
        task.fingerprint,
        write,
        inputs={
            "images": task.images,
            "teachers": [one.digest for one in task.teachers],
            "unlabelled": identity(task.unlabelled),
        },
        settings={"network": identity(task.network), "init": identity(task.init), "train": train},
        totals={
            "role": "classifier",
            "label": task.label,
            "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "test": test,
            "attention": attention,
            "curve": [[one["tokens"], one["nll"]] for one in evaluations],
            **training_totals(store, task.checkpoints, snapshot, history),
        },
    )
