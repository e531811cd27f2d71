"""The Fréchet distance between two sets of features, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean ``[D]`` and covariance ``[D, D]`` (unbiased) of N features, float64."""

    mean: Tensor
    covariance: Tensor


class FrechetParts(NamedTuple):
    """A Fréchet distance and its parts, named as in LSRS, appendix F (Table 7).

    ``distance = mean_difference + trace_term`` and ``trace_term = trace_reference + trace_generated - cross_term``.
    """

    distance: float
    mean_difference: float
    """``|mean_r - mean_g|^2``."""
    trace_term: float
    trace_reference: float
    """``Tr(cov_r)``."""
    trace_generated: float
    """``Tr(cov_g)``, the total variance of the generated features."""
    cross_term: float
    """``2 Tr((cov_r cov_g)^(1/2))``."""


def _square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix.

    Eigenvalues within rounding of zero count as zero, because the square roots of a thousand rounding errors are not
    small together.
    """
    values, vectors = torch.linalg.eigh(matrix)
    rounding = values.abs().amax() * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def frechet_parts(reference: Moments, generated: Moments) -> FrechetParts:
    """Squared Fréchet distance between two normal distributions, and its parts.

    ``|mean_r - mean_g|^2 + Tr(cov_r) + Tr(cov_g) - 2 Tr((cov_r cov_g)^(1/2))``. The last trace is computed as the sum
    of the singular values of ``cov_r^(1/2) cov_g^(1/2)``, which also works for singular covariances.

    Raises:
        ValueError: if the numbers of features differ.

    Source:
        Heusel et al. 2017; with Inception features it is called FID. The parts: LSRS, appendix F.
    """
    if reference.mean.shape != generated.mean.shape:
        raise ValueError(
            "reference and generated must have the same number of features, "
            f"got {len(reference.mean)} and {len(generated.mean)}"
        )
    mean_difference = (reference.mean - generated.mean).square().sum()
    roots = [_square_root(side.covariance) for side in (reference, generated)]
    cross_term = 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = [side.covariance.trace() for side in (reference, generated)]
    trace_term = traces[0] + traces[1] - cross_term
    return FrechetParts(*map(float, (mean_difference + trace_term, mean_difference, trace_term, *traces, cross_term)))
