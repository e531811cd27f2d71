"""Figures of merit against independent float64 forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from varkern.metrics.frechet import Moments, frechet_parts

from ..references.metrics import frechet_distance, moments


def reference_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook form, with scipy's matrix square root of the product itself."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(ca) + np.trace(cb) - 2 * np.trace(sqrtm(ca @ cb)).real)


HALVES = slice(None, 150), slice(150, None)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 3), (301, 199, 17)], ids=["small", "odd"])
def test_frechet_distance_equals_the_textbook_form(n, m, d):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    b = rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 0.5
    got = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert got == pytest.approx(reference_distance(a, b), rel=1e-9)


def test_frechet_distance_of_known_normals():
    # Diagonal covariances: (m1 - m2)^2 + sum (s1 - s2)^2.
    a = Moments(torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
    b = Moments(torch.tensor([0.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()))
    assert frechet_parts(a, b).distance == pytest.approx(1 + 4 + 1 + 4, abs=1e-12)


def test_frechet_distance_to_itself_is_zero_even_if_singular():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).repeat(1, 2)  # rank 5 of 10
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_to_itself_is_zero_with_fewer_images_than_features():
    """Hundreds of null directions: their rounding must not add up."""
    features = 30 * torch.randn(50, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = frechet_parts(moments(features), moments(features))
    assert abs(parts.distance) <= 1e-10 * parts.trace_reference


def test_frechet_distance_of_sets_in_orthogonal_subspaces():
    """Where one set varies the other does not: no cross term, though both covariances are singular."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
    a, b = (10 * torch.randn(50, 150, generator=generator, dtype=torch.float64) @ basis[half] for half in HALVES)
    parts = frechet_parts(moments(a), moments(b))
    assert abs(parts.cross_term) <= 1e-11 * parts.trace_reference


def test_frechet_parts_of_shifted_normals():
    """Equal covariances S, means apart by d: the distance is |d|^2 alone, and Tr (S S)^(1/2) = Tr S."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(9, 9))
    covariance, shift = torch.from_numpy(root @ root.T), torch.from_numpy(rng.normal(size=9))
    parts = frechet_parts(Moments(torch.zeros(9).double(), covariance), Moments(shift, covariance))
    assert parts.distance == pytest.approx(float(shift @ shift), rel=1e-10)
    assert parts.mean_difference == pytest.approx(float(shift @ shift), rel=1e-12)
    assert parts.trace_term == pytest.approx(0, abs=1e-10)
    assert parts.cross_term == pytest.approx(2 * float(covariance.trace()), rel=1e-12)


def test_frechet_parts_add_up_and_tell_the_sides_apart():
    rng = np.random.default_rng(4)
    reference, generated = rng.normal(size=(60, 5)), 2 * rng.normal(size=(40, 5)) + 1
    parts = frechet_parts(moments(torch.from_numpy(reference)), moments(torch.from_numpy(generated)))
    assert parts.trace_reference == pytest.approx(np.trace(np.cov(reference, rowvar=False)), rel=1e-12)
    assert parts.trace_generated == pytest.approx(np.trace(np.cov(generated, rowvar=False)), rel=1e-12)
    assert parts.trace_term == pytest.approx(parts.trace_reference + parts.trace_generated - parts.cross_term)
    assert parts.distance == pytest.approx(parts.mean_difference + parts.trace_term)
    assert parts.distance == pytest.approx(reference_distance(reference, generated), rel=1e-9)


def test_frechet_parts_refuse_other_features():
    a, b = (moments(torch.randn(8, d)) for d in (3, 4))
    with pytest.raises(ValueError, match="same number of features, got 3 and 4"):
        frechet_parts(a, b)
