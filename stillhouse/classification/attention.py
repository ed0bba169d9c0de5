"""What a vision transformer's attention looks like, as hybrid distillation tells teachers apart.

Masked modelling gives near and diverse attention, supervision gives far and uniform attention (Shi
et al. 2023, arXiv 2306.15876).
"""

import torch
from torch import Tensor

from stillhouse.classification.learner import reading
from stillhouse.models.vit import Vit


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
