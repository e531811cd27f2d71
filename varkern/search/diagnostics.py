"""How a search with a scorer used its maps: effective sample sizes, and how often a block changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def effective_sample_size(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """How many equally weighted maps the maps of one choice are worth, when one is drawn by softmax of the scores.

    For probabilities ``p = softmax(scores / temperature)`` it is ``1 / sum(p**2)``, after Kish (Survey Sampling, 1965):
    M if all scores are equal, and 1 if one map has all the weight.

    Args:
        scores: ``[..., M]``, any float dtype. Scores of minus infinity have no weight, unless all have it.
        temperature: of the softmax, > 0.

    Returns:
        ``[...]`` in [1, M], in the dtype of the scores, float32 at least.

    Example::

        >>> varkern.search.effective_sample_size(torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]))
        tensor([4.0000, 1.0007])
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = scores.amax(-1, keepdim=True)
    # Where equal, the difference is 0, also between infinities.
    weights = torch.where(scores == highest, 0.0, (scores - highest) / temperature).exp()
    return weights.sum(-1).square() / weights.square().sum(-1)


class Steps(NamedTuple):
    """The steps of one scale of :class:`varkern.BlockResample`, one per block and sweep, in their order.

    Example::

        >>> search = varkern.BlockResample(scorer, m=4, proposals=4)
        >>> steps = varkern.generate(var, labels, search=search, seeds=0).steps[4]
        >>> steps.scores.shape, steps.acceptance().shape, steps.effective_sample_size().shape
        (torch.Size([8, 9, 5]), torch.Size([9]), torch.Size([8, 9]))
    """

    scores: Tensor
    """``[B, S, 1 + P]`` float32: of the map as it was, then of the maps with each of the P proposals."""
    picks: Tensor
    """``[B, S]`` int64: which of these maps was kept; 0 is the map as it was."""
    changed: Tensor
    """``[B, S]`` bool: whether the map changed. A proposal can be equal to the block that it replaces."""

    def acceptance(self) -> Tensor:
        """The share of the images whose map changed, for each step, ``[S]`` float32."""
        return self.changed.float().mean(0)

    def effective_sample_size(self, temperature: float = 1.0) -> Tensor:
        """See :func:`effective_sample_size`; of each step's 1 + P maps, ``[B, S]``."""
        return effective_sample_size(self.scores, temperature)
