"""The scorer S(c, e_k, k) of LSRS (paper, appendix A): a small CNN that tells real features from generated ones."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varkern.files import atomically
from varkern.models.initialization import initialize

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

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
        return self.activation(x + self.branch(x))


class Scorer(nn.Module):
    """Scores token maps by their fused features: higher means more like a real image's.

    A scorer trained by either loss of the paper tends to ``log p_real(e) / p_generated(e)`` plus a constant of class
    and scale; see :class:`varkern.BestOfM` for what follows from it.

    Args:
        config: sizes; None: ImageNet, VAR at 256 px.
    """

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
            nn.Linear(config.widths[-1] * POOLED_SIDE**2 + 2 * config.embedding, config.hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(config.hidden, config.hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(config.hidden, 1),
        )
        initialize(self)

    def forward(self, labels: Tensor, features: Tensor, scale: int | Tensor) -> Tensor:
        """S(c, e_k, k) of every candidate.

        Args:
            labels: classes ``[B]`` int64.
            features: fused features ``[B, M, C, H, W]``, any float dtype and memory format.
            scale: the scale that all candidates belong to, or one a candidate, ``[M]`` or ``[B, M]`` int64.

        Returns:
            scores ``[B, M]`` float32.
        """
        batch, candidates = features.shape[:2]
        dtype = self.head[0].weight.dtype
        visual = self.visual(features.flatten(0, 1).to(dtype)).flatten(1)
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, device=labels.device)  # filled there: a copy from the host would wait
        scale = scale.expand(batch, candidates)
        conditions = (self.class_embedding(labels.unsqueeze(1).expand(batch, candidates)), self.scale_embedding(scale))
        joined = torch.cat((visual, *(c.flatten(0, 1).to(visual.dtype) for c in conditions)), dim=1)
        return self.head(joined).view(batch, candidates).float()

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
