"""Hybrid distillation (Shi et al. 2023, arXiv 2306.15876): two teachers for a vision transformer.

The student imitates the token relations of a masked-image teacher and the features of a supervised
one, and leaves out redundant tokens step by step, which saves time. The exact forms could not be
had. Our reading: relations as KL of softmaxed Q K^T / sqrt(d), features as smooth L1 of
layer-normalised tokens; tokens that are most similar to the others of their image are left out
after each third of the blocks, and are not compared from there on.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize, smooth_l1_loss

from stillhouse.classification.learner import LABELS, ClassifierFacts, reading
from stillhouse.classification.stored import ImageTeacher
from stillhouse.errors import SpecError
from stillhouse.models.vit import Vit, rows_of
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


@torch.no_grad()
def least_redundant(tokens: Tensor, count: int) -> Tensor:
    """The `count` tokens of each image that are least like its others: ascending int64 [B, count].

    By the mean cosine similarity with all tokens [B, T, H] of the image.
    """
    directions = normalize(promoted(tokens), dim=-1)
    likeness = (directions @ directions.mean(1, keepdim=True).transpose(1, 2))[..., 0]
    return likeness.topk(count, dim=1, largest=False).indices.sort(1).values


def kept_counts(num_tokens: int, depth: int, drop: float) -> dict[int, int]:
    """Tokens that are left from a block on, by its number: fewer after a third and after two."""
    places = sorted({round(depth / 3), round(2 * depth / 3)} - {0})
    shares = [1 - drop * (i + 1) / len(places) for i in range(len(places))]
    return {place: max(1, round(num_tokens * s)) for place, s in zip(places, shares, strict=True)}


class Hybrid(nn.Module):
    """A `vit` that learns from labels, a masked teacher's relations and a second one's features.

    Its teachers are two vits of as many patches and heads: the first made by `masked`, the second
    by labels.

    Args:
        facts: of the training.
        label_weight, relation_weight, feature_weight: of the three terms.
        layers: blocks whose relations are compared, from 0; default all. The teacher's are those
            at the same share of its depth.
        drop: share of the tokens that is left out in the end (the paper's is not known to us).
    """

    needs_models: ClassVar[bool] = True

    def __init__(
        self,
        facts: ClassifierFacts,
        label_weight: float = 1.0,
        relation_weight: float = 1.0,
        feature_weight: float = 1.0,
        layers: Sequence[int] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        not_negative(
            label_weight=label_weight,
            relation_weight=relation_weight,
            feature_weight=feature_weight,
        )
        if not 0 <= drop < 1:
            raise SpecError(f"`train.objective.drop: {drop}` is not in [0, 1)")
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
        self._counts = kept_counts(student.grid**2, depth, drop) if drop else {}
        same = features.width == student.width
        self.project = nn.Identity() if same else nn.Linear(student.width, features.width)

    def _given(self) -> list[ImageTeacher]:
        return [one for one in self._teachers if isinstance(one, ImageTeacher)]

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`."""
        student, (relations, features) = vit_of(network), self._given()
        with reading(*student.scores) as own:
            tokens, kept = self._tokens(student, images)
        nll = cross_entropy(promoted(student.classify(tokens)), signals[LABELS])
        with torch.no_grad():
            masked = vit_of(relations.network)
            with reading(*masked.scores) as theirs:
                masked.tokens(relations.own(images))
            target = rows_of(vit_of(features.network).tokens(features.own(images)), kept[-1])
        losses = [
            relation_loss(own[i], pairs_of(theirs[max(0, j)], kept[i])) for i, j in self._pairs
        ]
        terms = nll, torch.stack(losses).mean(), feature_loss(self.project(tokens), target)
        total = torch.stack([w * term for w, term in zip(self._weights, terms, strict=True)]).sum()
        return LossValue(total, nll)

    def _tokens(self, student: Vit, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last tokens [B, k, width], and which ones each block read: int64 [B, k]."""
        states, kept = student.embedded(images), list[Tensor]()
        left = torch.arange(states.shape[1], device=images.device).expand(len(images), -1)
        for i, block in enumerate(student.blocks):
            if i in self._counts:
                chosen = least_redundant(states, self._counts[i])
                states, left = rows_of(states, chosen), left.gather(1, chosen)
            kept.append(left)
            states = block(states)
        return student.norm(states), kept


def pairs_of(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores [B, heads, T, T] between the places kept [B, k]: [B, heads, k, k]."""
    queries = kept[:, None, :, None].expand(-1, scores.shape[1], -1, scores.shape[-1])
    found = scores.gather(2, queries)
    return found.gather(3, kept[:, None, None, :].expand(*found.shape[:3], -1))
