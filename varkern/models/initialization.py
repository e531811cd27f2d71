"""Initial weights, set explicitly.

The code here must not depend on ``reset_parameters`` of PyTorch's layers, because the published VAR builder disables it
for the whole process.
"""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Set uniform weights of variance 1 / (3 fan-in) in linear and convolution layers, normal ones in embeddings."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.uniform_(-bound, bound)
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_()
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            layer.weight.fill_(1)
            layer.bias.zero_()
