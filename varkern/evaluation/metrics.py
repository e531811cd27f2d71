"""Figures of merit over features and class probabilities, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` (unbiased) of N features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features ``[N, D]``.

    Raises:
        ValueError: if there are fewer than two.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(f"features must have shape [N, D] with N >= 2, got {list(features.shape)}")
    features = features.double()
    return Moments(features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1]))


def _square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two normal distributions.

    ``|mean_a - mean_b|^2 + Tr(cov_a) + Tr(cov_b) - 2 Tr((cov_a cov_b)^(1/2))``; the last trace is that of
    ``(cov_a^(1/2) cov_b cov_a^(1/2))^(1/2)``, which is symmetric, so that singular covariances do no harm.

    Source:
        Heusel et al. 2017; with Inception features it is called FID.
    """
    root = _square_root(a.covariance)
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * inner)


def inception_score(probabilities: Tensor) -> float:
    """``exp(mean KL(p(y|x) || p(y)))`` over class probabilities ``[N, classes]`` (Salimans et al. 2016), one split."""
    p = probabilities.double()
    if p.dim() != 2 or p.shape[0] == 0:
        raise ValueError(f"probabilities must have shape [N, classes] with N >= 1, got {list(p.shape)}")
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
    return float(divergence.sum(1).mean().exp())


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows of ``[N, classes]`` whose largest probability is at the label ``[N]``."""
    return float((probabilities.argmax(1) == labels.to(probabilities.device)).double().mean())
