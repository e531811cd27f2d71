"""Settings of a scorer's training: the two losses of LSRS (section 3.3), and the recipe of its appendix A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from .best import LARGER_IS_BETTER
from .features import FEATURES


def pairwise_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Eq. 4 per pair: ``-log sigmoid(real - generated)``, in the shape of the scores."""
    return F.softplus(generated - real)


def pointwise_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Eq. 5 per pair: the mean of ``-log sigmoid(real)`` and ``-log(1 - sigmoid(generated))``.

    With the mean instead of the sum, scores of 0 have the loss log 2, as under the pairwise loss.
    """
    return (F.softplus(-real) + F.softplus(generated)) / 2


LOSSES = {"pairwise": pairwise_loss, "pointwise": pointwise_loss}


@dataclass(frozen=True)
class ScorerTraining:
    """Settings of a scorer's training. The defaults are those of the paper (appendix A) where it gives them.

    Args:
        loss: ``"pairwise"`` (eq. 4) or ``"pointwise"`` (eq. 5).
        first_scale: the first scale to train on, from 0 (the paper's Table 10 compares 0 and 1).
        features: ``"fused"`` for the sum of all scales, ``"own"`` for a scale's own features (FlexVAR).
        epochs: number of epochs; it need not be an integer.
        warmup_epochs: epochs of linear warm-up, included in ``epochs``; a cosine to 0 follows.
        batch_size: pairs per step over all ranks; every pair is used at all its scales.
        learning_rate, weight_decay, betas, eps: settings of AdamW; without weight decay it is Adam. Some directions
            have no gradient under eq. 4, such as a constant in a hidden unit that real and generated maps share. There
            Adam normalizes rounding errors, so two runs that round differently get different weights but the same
            scores. A larger ``eps`` prevents this.
        max_norm: largest norm of the gradient, to which it is clipped; None means no clipping.
        validation: share of each class's images, real and generated, that is held out.
        seed: seed of the weights, the order, the partners and the held-out images.
        pair_share: None means that an epoch shows every real image once, with a new random partner of its class.
            A number means that an epoch shows this share of all pairs of one class, the same pairs in every epoch.
        validation_pairs: share of all held-out pairs that is used for validation; None means every real image once.
        best_by: None keeps the weights of the last step. ``"accuracy"`` or ``"loss"`` keeps the weights with the best
            validation at the end of an epoch, averaged over all scales.
        precision: ``"float32"``, ``"bfloat16"`` (autocast), or ``"auto"``, which is bfloat16 on a GPU.
    """

    loss: str = "pairwise"
    first_scale: int = 0
    features: str = "fused"
    epochs: float = 4.0
    warmup_epochs: float = 1.0
    batch_size: int = 128
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = None
    validation: float = 0.02
    seed: int = 0
    precision: str = "auto"
    pair_share: float | None = None
    validation_pairs: float | None = None
    best_by: str | None = None

    def __post_init__(self):
        for name, choices in (
            ("loss", tuple(LOSSES)),
            ("features", FEATURES),
            ("precision", ("auto", "float32", "bfloat16")),
            ("best_by", (None, *LARGER_IS_BETTER)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        for name, least in (("first_scale", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not isinstance(getattr(self, name), Real) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if not isinstance(self.weight_decay, Real) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number >= 0, got {self.weight_decay!r}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be > 0 or None, got {self.max_norm!r}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must be in [0, epochs={self.epochs}], got {self.warmup_epochs}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {self.validation}")
        for name in ("pair_share", "validation_pairs"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1] or None, got {share!r}")
        if self.best_by is not None and not self.validation:
            raise ValueError(f"best_by={self.best_by!r} needs held-out images, got validation=0")

    def precision_on(self, device: torch.device) -> str:
        """The precision on ``device``; never ``"auto"``."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if device.type == "cuda" else "float32"

    def steps(self, examples: int) -> tuple[int, int]:
        """Number of all steps and of warm-up steps, rounded up, for an epoch of ``examples`` pairs."""
        return tuple(math.ceil(epochs * examples / self.batch_size) for epochs in (self.epochs, self.warmup_epochs))


RECIPES = {
    "paper": ScorerTraining(),
    "published": ScorerTraining(
        validation=0.1, pair_share=0.01, validation_pairs=0.1, best_by="accuracy", precision="float32"
    ),
}
"""Settings by name: the paper's text (appendix A), and the code published with it (dt-3t/LSRS).

| point | the paper's text | the published code | ``"published"`` here |
| --- | --- | --- | --- |
| pairs | real and generated maps are paired | all pairs of one class | as the code |
| an epoch | not said | a random 1% of all pairs, drawn once | as the code |
| steps, for ImageNet and 1,000 samples per class | 4 epochs | about 324,000 | as the code |
| held out | not said | a tenth of each class's images, rounded down | a tenth, rounded up |
| validated on | not said | a random tenth of the pairs of held-out images | as the code |
| the scorer kept | not said | best accuracy, best loss and every epoch, one file each | best accuracy |
| accuracy | not said | mean over batches; a tie counts 0 | mean over pairs; a tie counts 1/2 |
| warm-up | linear, one epoch | the same; the first step has rate 0 | the first step has the rate of the code's second |
| decay | cosine over the other epochs | the same, to 0 | as the code |
| batches | 128 pairs | the last batch of an epoch is smaller | all batches are full |
| last bias | not said | trained, although eq. 4 gives it no gradient | stays 0 |
| precision | not said | float32 | float32 |
| seed | not said | 42, by PyTorch's generators | ``seed``, by Philox |

``"paper"`` differs from ``"published"`` where the paper says nothing: an epoch shows every real image once with a new
partner, 2% of the images are held out, the last weights are kept, and a GPU trains under bfloat16 autocast.
"""


def wins(real: Tensor, generated: Tensor) -> Tensor:
    """1 where the real map scores higher, 1/2 for a tie. Ties are frequent at early scales, which have few maps."""
    return (real > generated).float() + 0.5 * (real == generated)
