"""A small digit classifier. The demo's Fréchet distance is measured between its features."""

from __future__ import annotations

from torch import Tensor, nn

from varkern.models.initialization import initialize

from .digits import NUM_CLASSES

FEATURES = 64
CONVOLUTIONS = 8  # number of layers of the body that return maps: the convolutions, ReLUs and poolings


class DigitClassifier(nn.Module):
    """Images ``[N, 3, 24, 24]`` in [-1, 1] to logits ``[N, 10]``."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 6 * 6, FEATURES),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)
        initialize(self)

    def features(self, images: Tensor) -> Tensor:
        """Features ``[N, 64]`` of images ``[N, 3, 24, 24]``; the last layer computes the logits from them."""
        return self.from_maps(self.maps(images))

    def maps(self, images: Tensor) -> Tensor:
        """Output of the convolutions for images ``[N, 3, 24, 24]``, ``[N, 64, 6, 6]``."""
        return self.body[:CONVOLUTIONS](images.mean(1, keepdim=True))

    def from_maps(self, maps: Tensor) -> Tensor:
        """The :meth:`features` ``[N, 64]`` from the :meth:`maps` ``[N, 64, 6, 6]``."""
        return self.body[CONVOLUTIONS:](maps)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))
