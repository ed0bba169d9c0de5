"""A network of the user's, with dropout."""

from torch import nn


class Dropping(nn.Module):
    """One hidden layer."""

    def __init__(self, num_channels, image_size, num_classes):
        super().__init__()
        size = num_channels * image_size**2
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.classifier(self.features(images))
