"""An objective of the user's for images."""

from torch.nn.functional import cross_entropy

from stillhouse.training.objectives import LossValue


class Scaled:
    """Cross-entropy, times `factor`."""

    def __init__(self, facts, factor=1.0):
        self.factor = factor

    def __call__(self, network, images, signals):
        nll = cross_entropy(network(images), signals["labels"])
        return LossValue(self.factor * nll, nll)
