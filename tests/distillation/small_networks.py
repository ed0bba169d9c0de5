"""Vectors, small networks and a pair of workers that these tests share."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import torch
from torch import nn
from vector_cases import VECTORS

from stillhouse.distillation.evaluate import mean_logits, soft_loss
from stillhouse.distillation.prepared import frozen
from stillhouse.distillation.preprocessing import Standardisation


def tensors(name):
    with np.load(VECTORS / name) as archive:
        return {
            key: torch.from_numpy(np.asarray(archive[key]))
            for key in archive.files
            if key != "note"
        }


class FlatHead(nn.Module):
    """One block and a linear layer over all places, as ConvNet has it."""

    def __init__(self, channels=1, width=4, num_classes=3, side=8, norm=True):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        self.features = nn.Sequential(*layers, nn.ReLU(), nn.AvgPool2d(2))
        self.classifier = nn.Linear(width * (side // 2) ** 2, num_classes)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


class MeanHead(nn.Module):
    """Two convolutions and a linear layer over the mean, as ResNet has it."""

    def __init__(self, channels=1, width=4, num_classes=3):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.second = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images):
        hidden = self.norms[0](self.first(images)).relu()
        hidden = self.norms[1](self.second(hidden)).relu()
        return self.classifier(self.pool(hidden).flatten(1))


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def teacher(seed=0, num_classes=3):
    return frozen(seeded(lambda: FlatHead(num_classes=num_classes), seed))


def towards_teachers(teachers, temperature):
    """An objective that asks the teachers anew about every batch of views."""

    def objective(logits, views):
        return soft_loss(logits, mean_logits(teachers, views.images), temperature)

    return objective


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


PLAIN = Standardisation((0.5,), (0.25,))


def two_workers(work):
    """[work(rank, all_reduce) for both ranks], in threads that really exchange their sums."""
    barrier, given = Barrier(2), {}

    def on(rank):
        def all_reduce(tensor):
            given[rank] = tensor
            barrier.wait(timeout=10)
            total = given[0] + given[1]
            barrier.wait(timeout=10)
            return total

        return work(rank, all_reduce)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(on, range(2)))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
