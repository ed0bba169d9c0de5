"""Hybrid distillation (Shi et al. 2023, arXiv 2306.15876): two teachers for a vision transformer.

The student imitates the token relations of a masked-image teacher and the features of a supervised
one. The exact forms could not be had; relations as KL of softmaxed Q K^T / sqrt(d) and features as
smooth L1 of layer-normalised tokens are our reading. The two diagnostics tell the teachers apart.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, smooth_l1_loss

from stillhouse.classification.learner import LABELS, ClassifierFacts, reading
from stillhouse.classification.stored import ImageTeacher
from stillhouse.errors import SpecError
from stillhouse.models.vit import Vit
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import not_negative
from stillhouse.training.objectives.distil import promoted
from stillhouse.training.objectives.masked import vit_of


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over rows, of attention scores [B, heads, T, T]: a scalar."""
    target, own = (promoted(scores).log_softmax(-1) for scores in (teacher.detach(), student))
    return (target.exp() * (target - own)).sum(-1).mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of tokens [B, T, H], each normalised over its width: a scalar."""
    own, target = (layer_norm(promoted(x), x.shape[-1:]) for x in (student, teacher.detach()))
    return smooth_l1_loss(own, target)


def attention_distance(attention: Tensor, grid: int) -> Tensor:
    """Mean distance in patches that each head looks at: [heads].

    Args:
        attention: probabilities [heads, grid^2, grid^2] of patches, rows are queries.
        grid: patches on each side.
    """
    axis = torch.arange(grid, dtype=attention.dtype, device=attention.device)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return (attention * torch.cdist(places, places)).sum(-1).mean(-1)


def attention_nmi(attention: Tensor) -> Tensor:
    """Normalised mutual information of queries and keys: [heads] of [heads, T, T].

    Queries are uniform and p(key | query) is the attention: I(q; k) / sqrt(H(q) H(k)).
    """
    size = attention.shape[-1]
    joint = attention / size
    keys = joint.sum(-2)
    information = torch.special.xlogy(joint, joint * size) - torch.special.xlogy(
        joint, keys[:, None]
    )
    entropy = -torch.special.xlogy(keys, keys).sum(-1)
    queries = torch.log(attention.new_tensor(float(size)))
    return information.sum((-2, -1)) / (queries * entropy).sqrt()


class Hybrid(nn.Module):
    """A `vit` that learns from labels, a masked teacher's relations and a second one's features.

    Its teachers are two vits of as many patches and heads: the first made by `masked`, the second
    by labels.

    Args:
        facts: of the training.
        label_weight, relation_weight, feature_weight: of the three terms.
        layers: blocks whose relations are compared, from 0; default all. The teacher's are those
            at the same share of its depth.
    """

    needs_models: ClassVar[bool] = True

    def __init__(
        self,
        facts: ClassifierFacts,
        label_weight: float = 1.0,
        relation_weight: float = 1.0,
        feature_weight: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        not_negative(
            label_weight=label_weight,
            relation_weight=relation_weight,
            feature_weight=feature_weight,
        )
        self._weights = label_weight, relation_weight, feature_weight
        student, self._teachers = vit_of(facts.network), facts.models
        relations, features = (vit_of(one.network) for one in self._given())
        for name, one in (("0", relations), ("1", features)):
            if (one.grid, one.heads) != (student.grid, student.heads):
                raise SpecError(
                    f"`train.objective.teachers.{name}` has {one.grid**2} patches and {one.heads} "
                    f"heads, `network` {student.grid**2} and {student.heads}: give equal ones"
                )
        depth, other = len(student.blocks), len(relations.blocks)
        self._layers = tuple(range(depth) if layers is None else layers)
        if not self._layers or not all(0 <= layer < depth for layer in self._layers):
            raise SpecError(f"`train.objective.layers: {layers}`: the network has {depth} blocks")
        self._pairs = [(layer, (layer + 1) * other // depth - 1) for layer in self._layers]
        same = features.width == student.width
        self.project = nn.Identity() if same else nn.Linear(student.width, features.width)

    def _given(self) -> list[ImageTeacher]:
        return [one for one in self._teachers if isinstance(one, ImageTeacher)]

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`."""
        student, (relations, features) = vit_of(network), self._given()
        with reading(*student.scores, student.norm) as own:
            nll = cross_entropy(promoted(student(images)), signals[LABELS])
        with torch.no_grad():
            masked = vit_of(relations.network)
            with reading(*masked.scores) as theirs:
                masked.tokens(relations.own(images))
            target = vit_of(features.network).tokens(features.own(images))
        losses = [relation_loss(own[i], theirs[max(0, j)]) for i, j in self._pairs]
        terms = nll, torch.stack(losses).mean(), feature_loss(self.project(own[-1]), target)
        total = torch.stack([w * term for w, term in zip(self._weights, terms, strict=True)]).sum()
        return LossValue(total, nll)


@torch.no_grad()
def attention_diagnostics(network: Vit, images: Tensor) -> dict[str, list[float]]:
    """Means over images [n, C, H, H] and heads of both diagnostics, by layer."""
    with reading(*network.eval().scores) as scores:
        network.tokens(images)
    found: dict[str, list[float]] = {"distance": [], "nmi": []}
    for layer in scores:
        attention = layer.double().softmax(-1)
        distances = [attention_distance(one, network.grid).mean() for one in attention]
        found["distance"].append(float(torch.stack(distances).mean()))
        found["nmi"].append(
            float(torch.stack([attention_nmi(one).mean() for one in attention]).mean())
        )
    return found
