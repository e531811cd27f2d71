"""The Fréchet distance of two sets of features, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` (unbiased) of N features, float64."""

    mean: Tensor
    covariance: Tensor


class FrechetParts(NamedTuple):
    """A Fréchet distance taken apart, in the words of LSRS, appendix F (its Table 7).

    ``distance = mean_difference + trace_term`` and ``trace_term = trace_reference + trace_generated - cross_term``.
    """

    distance: float
    mean_difference: float
    """``|mean_r - mean_g|^2``."""
    trace_term: float
    trace_reference: float
    """``Tr(cov_r)``."""
    trace_generated: float
    """``Tr(cov_g)``: how far the generated features spread."""
    cross_term: float
    """``2 Tr((cov_r cov_g)^(1/2))``."""


def _square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix.

    Eigenvalues within rounding of zero count as zero: the square roots of a thousand roundings are no small number.
    """
    values, vectors = torch.linalg.eigh(matrix)
    rounding = values.abs().amax() * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def frechet_parts(reference: Moments, generated: Moments) -> FrechetParts:
    """Squared Fréchet distance of two normal distributions, and what it is made of.

    ``|mean_r - mean_g|^2 + Tr(cov_r) + Tr(cov_g) - 2 Tr((cov_r cov_g)^(1/2))``; the last trace is the sum of the
    singular values of ``cov_r^(1/2) cov_g^(1/2)``, so that singular covariances do no harm.

    Raises:
        ValueError: if the two have different numbers of features.

    Source:
        Heusel et al. 2017; with Inception features it is called FID. The parts: LSRS, appendix F.
    """
    if reference.mean.shape != generated.mean.shape:
        raise ValueError(
            f"reference and generated must have as many features, got {len(reference.mean)} and {len(generated.mean)}"
        )
    mean_difference = (reference.mean - generated.mean).square().sum()
    roots = [_square_root(side.covariance) for side in (reference, generated)]
    cross_term = 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = [side.covariance.trace() for side in (reference, generated)]
    trace_term = traces[0] + traces[1] - cross_term
    return FrechetParts(*map(float, (mean_difference + trace_term, mean_difference, trace_term, *traces, cross_term)))
