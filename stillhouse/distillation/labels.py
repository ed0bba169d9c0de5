"""What a student is trained towards: classes, static soft labels, a teacher's word on each view.

An `Objective` maps a student's logits [B, C] on a batch of views to a scalar loss. Several
teachers speak with one voice, the mean of their logits (INFER). The divergence to soft labels is
not scaled by the squared temperature, as SRe2L, RDED and INFER have it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.distillation.settings import ViewSettings
from stillhouse.distillation.views import Views, epoch_views

Objective = Callable[[Tensor, Views], Tensor]
_BATCH = 512


def frozen(network: nn.Module) -> nn.Module:
    """The same network in evaluation mode, its parameters without gradients: a teacher."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def mean_logits(teachers: Sequence[nn.Module], images: Tensor) -> Tensor:
    """The mean of the teachers' logits on images [N, C, H, W]: [N, num_classes].

    On un-augmented images these are INFER's static labels.
    """
    return torch.cat(
        [
            torch.stack([teacher(batch) for teacher in teachers]).mean(0)
            for batch in images.split(_BATCH)
        ]
    )


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(softmax(targets / T) || softmax(logits / T)), mean over the batch; both [B, C] logits."""
    return functional.kl_div(
        (logits / temperature).log_softmax(1),
        (targets / temperature).softmax(1),
        reduction="batchmean",
    )


def towards_classes(labels: Tensor) -> Objective:
    """Cross-entropy with the mixed one-hot label; labels int64 [N] of the set's images."""

    def objective(logits: Tensor, views: Views) -> Tensor:
        return mixed_cross_entropy(logits, labels, views).mean()

    return objective


def mixed_cross_entropy(logits: Tensor, labels: Tensor, views: Views) -> Tensor:
    """-sum_c q_c log p_c of each view [B], q = weight * e_y + (1 - weight) * e_partner."""
    log_probs = logits.log_softmax(1)
    own = -_picked(log_probs, labels, views.rows)
    return views.weight * own - (1 - views.weight) * _picked(log_probs, labels, views.partners)


def _picked(log_probs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    classes = labels[rows.to(labels.device)].to(log_probs.device)
    return log_probs.gather(1, classes[:, None])[:, 0]


def towards_static(label_logits: Tensor, temperature: float) -> Objective:
    """One vector of logits an image [N, C], mixed as the images are (INFER, static)."""

    def objective(logits: Tensor, views: Views) -> Tensor:
        own = label_logits[views.rows.to(label_logits.device)]
        other = label_logits[views.partners.to(label_logits.device)]
        targets = views.weight * own + (1 - views.weight) * other
        return soft_loss(logits, targets.to(logits), temperature)

    return objective


def towards_stored(view_logits: Tensor, temperature: float) -> Objective:
    """Stored answers of teachers [epochs, N, C] in the order of the views (FKD)."""

    def objective(logits: Tensor, views: Views) -> Tensor:
        return soft_loss(logits, view_logits[views.epoch, views.span].to(logits), temperature)

    return objective


def relabel(
    teachers: Sequence[nn.Module],
    images: Tensor,
    settings: ViewSettings,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
) -> Tensor:
    """SRe2L's relabelling (FKD): the teachers' logits on every view, float16 [epochs, N, C].

    Which crop, flip and mix a view had is not stored: `epoch_views` draws it again from the same
    seed, settings and batch size.
    """

    def label(epoch: int) -> Tensor:
        views = epoch_views(images, settings, batch_size=batch_size, seed=seed, epoch=epoch)
        return torch.cat([mean_logits(teachers, view.images).half() for view in views])

    return torch.stack([label(epoch) for epoch in range(num_epochs)])
