"""Wraps a network with the published scorer's arguments as a scorer that searches can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("x", "class_labels", "stage_label")  # of the published network's forward
CLASS_TABLE = "class_label_embedding"


class PublishedScorer(nn.Module):
    """Wraps a network of LSRS' own class, so that a search can call it as it calls any scorer.

    The published network judges maps one by one: ``(features[N, C, H, W], labels[N], scales[N]) -> scores[N, 1]``. This
    class passes the candidates of all images in this form. The network is used as it is: its weights, its dtype and its
    mode (training or evaluation) stay.

    :meth:`varkern.Scorer.from_pretrained` loads the published weights into a network with varkern's kernels, which is
    faster.

    Args:
        network: any callable of that kind; a module becomes a submodule and moves to the model's device with it.

    Raises:
        TypeError: if ``network`` cannot be called, or is wrapped already.

    Example::

        >>> def network(features, labels, scales):
        ...     return features.mean((1, 2, 3)).unsqueeze(1)
        >>> search = varkern.BestOfM(varkern.PublishedScorer(network), m=4)
        >>> varkern.generate(var, labels, search=search, seeds=0).images.shape
        torch.Size([8, 3, 24, 24])
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        if not callable(network) or isinstance(network, type):
            raise TypeError(f"network must be a callable object, got {network!r}")
        if isinstance(network, PublishedScorer):
            raise TypeError("network must be the network itself, got one that is wrapped already")
        self.network = network

    @property
    def num_classes(self) -> int | None:
        """Rows of the network's class embedding, if it has one named as in the published network; else None."""
        table = getattr(self.network, CLASS_TABLE, None)
        return table.num_embeddings if isinstance(table, nn.Embedding) else None

    def forward(self, labels: Tensor, features: Tensor, scale: int) -> Tensor:
        """Scores of every candidate.

        Args:
            labels: classes ``[B]`` int64.
            features: fused features ``[B, M, C, H, W]``.
            scale: the scale that all candidates belong to.

        Returns:
            scores ``[B, M]`` in the network's dtype.

        Raises:
            ValueError: if the network does not return scores of shape ``[B * M, 1]``.
        """
        batch, candidates = features.shape[:2]
        count = batch * candidates
        classes = labels.repeat_interleave(candidates, output_size=count)
        scales = torch.full((count,), scale, dtype=torch.int64, device=features.device)
        scores = self.network(features.flatten(0, 1), classes, scales)
        if not isinstance(scores, Tensor) or scores.shape != (count, 1):
            came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"a wrapped network must return scores of shape {[count, 1]}, got {came}")
        return scores.view(batch, candidates)


def takes_published_arguments(scorer: object) -> bool:
    """Whether a callable's arguments have the names of the published network's, so that it must be wrapped."""
    function: Any = scorer.forward if isinstance(scorer, nn.Module) else scorer
    try:
        return tuple(inspect.signature(function).parameters) == ARGUMENTS
    except (TypeError, ValueError):  # a builtin has no signature
        return False
