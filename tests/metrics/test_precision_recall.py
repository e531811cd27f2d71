"""Improved precision and recall against a brute-force float64 form and sets whose answer is known."""

import numpy as np
import pytest
import torch

from varkern.metrics.precision_recall import blocks, precision_recall


def brute_force(reference: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Every distance by subtraction, every ball asked in turn."""

    def inside(centres, points):
        radius = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]  # place 0 is c itself
        hits = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return float(np.mean(hits))

    return inside(reference, generated), inside(generated, reference)


@pytest.mark.parametrize("block", [1, 7, 64, 2048])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(41, 53, 3, 3), (30, 17, 64, 3), (12, 40, 2, 1), (25, 6, 5, 5)], ids=str
)
def test_equals_brute_force(n, m, d, k, block, device):
    rng = np.random.default_rng(n + d)
    reference, generated = rng.normal(size=(n, d)), 1.2 * rng.normal(size=(m, d)) + 0.3
    found = precision_recall(torch.from_numpy(reference).to(device), torch.from_numpy(generated).to(device), k, block)
    assert found == pytest.approx(brute_force(reference, generated, k), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_lower_precision_and_strides(dtype):
    """Distances are those of the stored numbers: no rounding of our own adds to theirs."""
    rng = np.random.default_rng(0)
    reference, generated = (torch.from_numpy(rng.normal(size=(9, 50)) + 100).to(dtype).T for _ in range(2))
    expected = brute_force(reference.double().numpy(), generated.double().numpy(), 3)
    assert precision_recall(reference, generated) == pytest.approx(expected, abs=1e-12)


def test_equal_sets():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features.clone(), block=16) == (1, 1)


def test_disjoint_sets():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features + 1000) == (0, 0)


def test_nested_sets():
    """One cluster of two: all that is generated is real, half of what is real is generated."""
    generator = torch.Generator().manual_seed(0)
    cluster, other = (torch.randn(60, 4, generator=generator) + shift for shift in (0, 1000))
    found = precision_recall(torch.cat((cluster, other)), cluster.clone())
    assert found == (1, 0.5)
    assert precision_recall(cluster, torch.cat((cluster, other))) == (0.5, 1)


def test_repeated_images_have_balls_of_radius_zero():
    """Ten copies each of two images, far from the origin: only exact copies count as inside."""
    images = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) + 37
    repeated = images.repeat_interleave(10, dim=0)
    assert precision_recall(repeated, repeated.clone()) == (1, 1)
    assert precision_recall(repeated, repeated + 1e-3) == (0, 0)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_equal_features_are_at_distance_zero_and_others_are_not(block):
    """Far from the origin, where the norms' rounding is larger than the distances asked for."""
    x = torch.randn(20, 501, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    apart = torch.cat([part for _, part in blocks(x, x, block)], 1)
    assert (apart.diagonal() == 0).all() and (apart + torch.eye(20) > 0).all()
    near = torch.cat([part for _, part in blocks(x, x + 0.01, block)], 1).diagonal()
    assert (near - 501e-4).abs().max() < 1e-2 * 501e-4


@pytest.mark.parametrize(
    "reference, generated, options, named",
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), {}, "reference must have more than k=3 images, got 3"),
        (torch.zeros(9, 2), torch.zeros(0, 2), {}, "generated must have more than k=3 images, got 0"),
        (torch.zeros(9, 2), torch.zeros(9, 3), {}, "same number of features, got 2 and 3"),
        (torch.zeros(9), torch.zeros(9, 3), {}, r"reference must have shape \[N, D\], got \[9\]"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"k": 0}, "k must be >= 1, got 0"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"block": 0}, "block must be >= 1, got 0"),
    ],
    ids=["few_reference", "none_generated", "dimensions", "shape", "k", "block"],
)
def test_wrong_arguments(reference, generated, options, named):
    with pytest.raises(ValueError, match=named):
        precision_recall(reference, generated, **options)
