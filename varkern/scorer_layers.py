"""The layers of the scorer network (:mod:`varkern.scorer`), their initial weights, and how autocast treats them."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkern.ops import map_norm
from varkern.ops.fusion_tables import tables_of

SLOPE = 0.2  # of every LeakyReLU


class MapNorm(nn.LayerNorm):
    """Layer norm over all numbers of a map, ``[N, C, H, W] -> [N, C, H, W]``; weight and bias are ``[C, H, W]``."""

    def forward(self, x: Tensor, residual: Tensor | None = None, negative_slope: float | None = None) -> Tensor:
        """See :func:`varkern.ops.map_norm`."""
        return map_norm(x, self.weight, self.bias, residual=residual, negative_slope=negative_slope, eps=self.eps)


class ResidualBlock(nn.Module):
    """3x3, 3x3 and 1x1 convolutions without bias, each followed by a norm, plus the input.

    LeakyReLU follows the first two norms and the sum. If the shapes differ, the input goes through a 1x1 convolution
    and a norm.

    Args:
        channels: of the input.
        width: channels of the output.
        side: of the output.
        stride: of the first convolution.
    """

    def __init__(self, channels: int, width: int, side: int, stride: int = 1):
        super().__init__()
        shape = [width, side, side]
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.ln1 = MapNorm(shape)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.ln2 = MapNorm(shape)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.ln3 = MapNorm(shape)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), MapNorm(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(self.conv1(x), negative_slope=SLOPE)
        y = self.ln2(self.conv2(y), negative_slope=SLOPE)
        return self.ln3(self.conv3(y), residual=self.shortcut(x), negative_slope=SLOPE)


def convert(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return weight.to(dtype), bias.to(dtype)


class WideLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights.

    Converted weights that need no gradient are kept until the weights change. Else a search would convert the same
    weights for each of its calls, which takes two launches per layer and as many bytes as the convolutions' weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype == x.dtype:
            return F.linear(x, weight, bias)
        if weight.requires_grad or bias.requires_grad or torch.compiler.is_compiling():
            return F.linear(x, *convert(x.dtype, weight, bias))
        return F.linear(x, *tables_of(convert, (x.dtype,), weight, bias))


# Asked once, because torch.compile of PyTorch 2.5 breaks the graph at this question.
AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "hpu", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def autocasting(x: Tensor) -> bool:
    kind = x.device.type
    return kind in AUTOCASTS and torch.is_autocast_enabled(kind)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


@torch.no_grad()
def initialise(scorer: nn.Module) -> None:
    """The published initial weights: He for convolutions (fan-out), Glorot for linear layers, small embeddings."""
    for layer in scorer.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=0.02)
