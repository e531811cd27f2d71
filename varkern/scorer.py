"""The scorer S(c, e_k, k) of LSRS (paper, appendix A): a small CNN that tells real features from generated ones."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varkern.files import atomically
from varkern.models.initialization import initialize
from varkern.ops import channel_norm

POOLED_SIDE = 2  # the visual features end at 2x2, as in the paper


@dataclass(frozen=True)
class ScorerConfig:
    """Sizes of a scorer; the defaults are for ImageNet and VAR at 256 px (4.1 million parameters).

    Args:
        num_classes: classes of the model whose maps are scored.
        num_scales: K, its scales.
        channels: C, the width of its codes.
        size: side of its latent; each width after the first halves it, and the last must stand at 2x2.
        widths: channels at each resolution, one residual block each.
        embedding: width of the class and of the scale embedding.
        hidden: width of the MLP.

    Example::

        >>> varkern.ScorerConfig(num_classes=10, num_scales=5, channels=16, size=6, widths=(32, 64, 64)).size
        6
    """

    num_classes: int = 1000
    num_scales: int = 10
    channels: int = 32
    size: int = 16
    widths: tuple[int, ...] = (32, 128, 256, 256)
    embedding: int = 128
    hidden: int = 128

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        side = self.size
        for _ in self.widths[1:]:
            side = (side + 1) // 2
        if side != POOLED_SIDE:
            raise ValueError(
                f"widths must halve size={self.size} down to {POOLED_SIDE}, "
                f"got {len(self.widths)} widths, which end at {side}"
            )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, ``[N, C, H, W] -> [N, C, H, W]``."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        input_bias: Tensor | None = None,
        negative_slope: float | None = None,
    ) -> Tensor:
        """See :func:`varkern.ops.channel_norm`."""
        return channel_norm(
            x,
            self.weight,
            self.bias,
            residual=residual,
            input_bias=input_bias,
            negative_slope=negative_slope,
            eps=self.eps,
        )


def normalised(
    convolution: nn.Conv2d,
    norm: ChannelNorm,
    x: Tensor,
    activation: nn.LeakyReLU | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(norm(convolution(x)) + residual)``."""
    slope = None if activation is None else activation.negative_slope
    if not bias_costs_a_pass(x):
        return norm(convolution(x), residual, negative_slope=slope)
    x = F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)
    return norm(x, residual, convolution.bias, slope)


def bias_costs_a_pass(x: Tensor) -> bool:
    """True where PyTorch's convolution adds its bias by another read and write of the result: on a GPU."""
    return x.is_cuda


class ResidualBlock(nn.Module):
    """3x3, 3x3 and 1x1 convolutions, each normalised and the first two rectified, plus the input."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            ChannelNorm(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            ChannelNorm(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 1),
            ChannelNorm(width),
        )
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        first, first_norm, first_activation, second, second_norm, second_activation, third, third_norm = self.branch
        y = normalised(first, first_norm, x, first_activation)
        y = normalised(second, second_norm, y, second_activation)
        return normalised(third, third_norm, y, self.activation, residual=x)


class WideLinear(nn.Linear):
    """A linear layer that computes in the precision of its input, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def autocasting(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


class Scorer(nn.Module):
    """Scores token maps by their fused features: higher means more like a real image's.

    A scorer trained by either loss of the paper tends to ``log p_real(e) / p_generated(e)`` plus a constant of class
    and scale; see :class:`varkern.BestOfM` for what follows from it.

    The dtype of the weights decides the precision: ``Scorer.from_pretrained(path, dtype=torch.bfloat16)`` runs its
    convolutions in bfloat16, whatever the autocast mode; autocast lowers float32 weights only. The MLP always computes
    in float32, so that scores of many candidates do not fall together (bfloat16 knows 128 numbers from 4 to 8).
    Convolutions are channels-last throughout; weights are stored so.

    Args:
        config: sizes; None: ImageNet, VAR at 256 px.

    Example::

        >>> features = torch.randn(8, 4, 16, 6, 6)  # eight images, four candidates
        >>> scorer(labels, features, 2).shape
        torch.Size([8, 4])
    """

    channels_last = True
    """The memory format that :meth:`forward` would otherwise convert features to; searches ask for it."""

    def __init__(self, config: ScorerConfig | None = None):
        super().__init__()
        self.config = config = config or ScorerConfig()
        layers: list[nn.Module] = [
            nn.Conv2d(config.channels, config.widths[0], 3, padding=1),
            ChannelNorm(config.widths[0]),
        ]
        for i, width in enumerate(config.widths):
            if i:
                layers += [nn.Conv2d(config.widths[i - 1], width, 3, stride=2, padding=1), ChannelNorm(width)]
            layers.append(ResidualBlock(width))
        self.visual = nn.Sequential(*layers)
        self.class_embedding = nn.Embedding(config.num_classes, config.embedding)
        self.scale_embedding = nn.Embedding(config.num_scales, config.embedding)
        self.head = nn.Sequential(
            WideLinear(config.widths[-1] * POOLED_SIDE**2 + 2 * config.embedding, config.hidden),
            nn.LeakyReLU(0.2),
            WideLinear(config.hidden, config.hidden),
            nn.LeakyReLU(0.2),
            WideLinear(config.hidden, 1),
        )
        initialize(self)
        self.to(memory_format=torch.channels_last)  # after the weights are drawn, which goes by memory order

    @property
    def dtype(self) -> torch.dtype:
        """What the convolutions compute in: their weights' dtype, or autocast's where that is on and they float32."""
        weight = self.visual[0].weight
        if weight.dtype == torch.float32 and autocasting(weight):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of features that costs no conversion; searches ask for it. Float32 where weights are float64."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def forward(self, labels: Tensor, features: Tensor, scale: int | Tensor) -> Tensor:
        """S(c, e_k, k) of every candidate.

        Args:
            labels: classes ``[B]`` int64.
            features: fused features ``[B, M, C, H, W]``, any float dtype and memory format.
            scale: the scale that all candidates belong to, or one a candidate, ``[M]`` or ``[B, M]`` int64.

        Returns:
            scores ``[B, M]`` float32, or float64 if the weights are.
        """
        batch, candidates = features.shape[:2]
        dtype = self.dtype
        x = features.flatten(0, 1).to(dtype=dtype, memory_format=torch.channels_last)
        lowered = dtype != self.visual[0].weight.dtype
        with contextlib.nullcontext() if lowered else no_autocast(x):
            layers = list(self.visual)
            for convolution, norm, block in zip(layers[0::3], layers[1::3], layers[2::3], strict=True):
                x = block(normalised(convolution, norm, x))
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, device=labels.device)  # filled there: a copy from the host would wait
        conditions = (
            self.class_embedding(labels.unsqueeze(1).expand(batch, candidates)),
            self.scale_embedding(scale.expand(batch, candidates)),
        )
        wide = torch.promote_types(dtype, torch.float32)
        with no_autocast(x):
            joined = torch.cat([x.flatten(1).to(wide), *(c.flatten(0, 1).to(wide) for c in conditions)], dim=1)
            return self.head(joined).view(batch, candidates)

    def save_pretrained(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        """Write weights and config to one safetensors file; a crash leaves the former file whole."""
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        with atomically(path) as unfinished:
            save_file(weights, unfinished, {**(metadata or {}), "config": json.dumps(asdict(self.config))})

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Scorer:
        """Read a scorer that :meth:`save_pretrained` wrote, in evaluation mode and without gradients.

        Args:
            path: a safetensors file.
            device: where the weights go; :class:`varkern.BestOfM` moves a scorer to its model's device by itself.
            dtype: of the weights, in which the convolutions compute. On a GPU bfloat16 halves the bytes; its scores
                err by some hundredths of their spread, which changes few choices.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no scorer's file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no scorer at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            config = ScorerConfig(**json.loads(metadata["config"]))
            scorer = cls(config)
            scorer.load_state_dict(load_file(path), strict=True)
        except Exception as error:
            raise ValueError(f"{path} is not a scorer's safetensors file: {error}") from error
        return scorer.to(device=device, dtype=dtype).eval().requires_grad_(False)
