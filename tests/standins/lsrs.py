"""LSRS (dt-3t/LSRS), small: its network's call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers import NUM_CLASSES, TINY_SIDES, randomise


class MapNetwork(nn.Module):
    """Judges maps one by one, by the published arguments; scores of a few maps differ by a unit or so."""

    def __init__(self, channels: int = 8, num_classes: int = NUM_CLASSES, num_scales: int = len(TINY_SIDES)):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.class_label_embedding = nn.Embedding(num_classes, 6)
        self.stage_label_embedding = nn.Embedding(num_scales, 6)
        self.out_proj = nn.Linear(6, 1)

    def forward(self, x: Tensor, class_labels: Tensor, stage_label: Tensor) -> Tensor:
        conditions = self.class_label_embedding(class_labels) * self.stage_label_embedding(stage_label)
        return self.out_proj(torch.tanh(self.conv(x)).mean((2, 3)) * (1 + conditions)) * 20


def map_network(**sizes) -> MapNetwork:
    return randomise(MapNetwork(**sizes), 5).eval().requires_grad_(False)
