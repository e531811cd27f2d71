"""Figures of whole sets held in memory; the package gathers them batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from varkern.metrics.frechet import Moments, frechet_parts


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features ``[N, D]``."""
    features = features.double()
    return Moments(features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1]))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance of two sets of features ``[N, D]``."""
    return frechet_parts(moments(a), moments(b)).distance
