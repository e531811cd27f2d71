"""Kernel densities against float64 NumPy, SciPy and scikit-learn, in their PyTorch form and their Triton form."""

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity
from varkern.kernels import density as density_kernels
from varkern.kernels import density_bits as bit_kernels

from tests.references import density as reference
from varkern.ops import kernel_density, silverman_bandwidth
from varkern.ops.backend import use_backend


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def pairs_once(monkeypatch):
    """Use the form for large N, which visits every pair of tiles once, at sizes that the interpreter can handle."""
    for module in (density_kernels, bit_kernels):
        monkeypatch.setattr(module, "SMALLEST_SYMMETRIC", 100)
        module.plan.cache_clear()
    yield
    for module in (density_kernels, bit_kernels):
        module.plan.cache_clear()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory from ``new_empty`` starts as NaN, so that an unwritten sum or slot is noticed."""
    empty = torch.Tensor.new_empty

    def poison(*given, **options):
        tensor = empty(*given, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found, exact, relative=1e-5):
    found = found.detach().cpu().double().numpy()
    assert found.shape == exact.shape
    np.testing.assert_allclose(found, exact, rtol=relative, atol=0)


SHAPES = [
    pytest.param((2, 3, 20, 8), id="leading-axes"),
    pytest.param((1, 1), id="N=1 D=1"),
    pytest.param((2, 5), id="N=2"),
    pytest.param((40, 1), id="D=1"),
    pytest.param((130, 3), id="two-tiles"),
    pytest.param((2, 19, 33), id="D=33"),
    pytest.param((0, 3, 5, 4), id="no-groups"),
]


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_against_float64(device, backend, metric, shape):
    x = normal(*shape)
    x[..., -1, :] = x[..., 0, :]  # a duplicate
    exact = reference.as_float64(x)
    close(silverman_bandwidth(x.to(device), metric), np.asarray(reference.silverman(exact, metric)), 1e-6)
    close(kernel_density(x.to(device), metric=metric), reference.kernel_sums(exact, metric=metric))
    wide = 0.3 if metric == "cosine" else float(np.sqrt(shape[-1]))  # so that far pairs count too
    close(kernel_density(x.to(device), wide, metric), reference.kernel_sums(exact, wide, metric))


@pytest.mark.thinned(coordinates=(1024,))
@pytest.mark.parametrize("coordinates", [1024, 8192])
def test_a_map_of_many_coordinates(device, backend, coordinates):
    x = normal(3, coordinates)
    x[2] = x[0]
    close(kernel_density(x.to(device), 90.0), reference.kernel_sums(reference.as_float64(x), 90.0))


@pytest.mark.parametrize(
    ("n", "d"), [pytest.param(252, 5, id="N=252"), pytest.param(300, 3, id="N=300"), pytest.param(128, 20, id="N=128")]
)
def test_every_pair_of_tiles_once(device, backend, pairs_once, n, d):
    x = normal(2, n, d)[1:] if n < 252 else normal(1, n, d)
    close(kernel_density(x.to(device), 1.5), reference.kernel_sums(reference.as_float64(x), 1.5))


@pytest.mark.parametrize(("n", "d"), [pytest.param(507, 7, id="N=507"), pytest.param(1500, 40, id="N=1500")])
def test_large(device, quick_backend, n, d):
    x = normal(1, n, d)
    with use_backend(quick_backend):
        close(kernel_density(x.to(device)), reference.kernel_sums(reference.as_float64(x)))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e30])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_huge_and_tiny_scales(device, backend, metric, scale):
    x = normal(12, 6) * scale
    x[3] = x[7]
    exact = reference.as_float64(x)
    close(silverman_bandwidth(x.to(device), metric), np.asarray(reference.silverman(exact, metric)), 1e-6)
    close(kernel_density(x.to(device), metric=metric), reference.kernel_sums(exact, metric=metric))


def test_far_from_the_origin(device, backend):
    """Near samples keep their distances, and equal ones are at 0. A Gram matrix in float32 would lose both."""
    x = 1000 + normal(30, 32) * 0.01
    x[11] = x[22]
    exact = reference.as_float64(x)
    close(kernel_density(x.to(device)), reference.kernel_sums(exact))
    tiny = kernel_density(x.to(device), 1e-12)
    wanted = torch.ones(30)
    wanted[[11, 22]] = 2
    assert torch.equal(tiny.cpu(), wanted)


@pytest.mark.parametrize("value", [0.0, 0.1, -7e4, 3e30])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_samples(device, backend, metric, value):
    x = torch.full((2, 9, 5), value, device=device)
    assert torch.equal(silverman_bandwidth(x, metric), torch.zeros(2, device=device))
    assert torch.equal(kernel_density(x, metric=metric), torch.full((2, 9), 9.0, device=device))


def test_vectors_of_zeros_under_cosine(device, backend):
    x = normal(7, 4)
    x[[2, 5]] = 0
    exact = reference.as_float64(x)
    close(kernel_density(x.to(device), metric="cosine"), reference.kernel_sums(exact, metric="cosine"))
    sums = kernel_density(x.to(device), 1e-3, "cosine").cpu()
    assert sums[2] == sums[5] == 2 and (sums[[0, 1, 3, 4, 6]] == 1).all()


def estimate(x, h):
    """The normalised density at each sample (eq. 2), float64, from the op's sums."""
    n, d = x.shape
    return kernel_density(x, h).double().cpu().numpy() / (n * (2 * np.pi) ** (d / 2) * h**d)


@pytest.mark.parametrize("d", [1, 3])
def test_against_scipy(device, backend, d):
    """SciPy scales its kernel by the samples' covariance, so the two agree for samples with identity covariance."""
    x = np.random.default_rng(0).normal(size=(40, d))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x.T)))).T
    x = x.astype(np.float32).astype(np.float64)
    found = estimate(torch.tensor(x, dtype=torch.float32, device=device), 0.6)
    np.testing.assert_allclose(found, gaussian_kde(x.T, bw_method=0.6)(x.T), rtol=1e-5)


@pytest.mark.parametrize("h", [0.2, 1.0, 5.0])
def test_against_scikit_learn(device, backend, h):
    x = normal(60, 5)
    exact = KernelDensity(bandwidth=h, rtol=1e-12).fit(reference.as_float64(x)).score_samples(reference.as_float64(x))
    np.testing.assert_allclose(estimate(x.to(device), h), np.exp(exact), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_half_precision_is_computed_in_float32(device, backend, metric, dtype):
    x = normal(2, 14, 9).to(dtype)
    exact = reference.kernel_sums(reference.as_float64(x), metric=metric)
    close(kernel_density(x.to(device), metric=metric), exact)


def test_strides(device, backend):
    x = normal(9, 2, 14)
    strided = x.to(device).permute(1, 2, 0)  # [2, 14, 9], the last stride not 1
    close(kernel_density(strided), reference.kernel_sums(reference.as_float64(x.permute(1, 2, 0))))
    skipping = normal(3, 40, 12).to(device)[:, ::3, ::2]
    close(kernel_density(skipping), reference.kernel_sums(reference.as_float64(skipping)))


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (2, 1)], ids=str)
def test_a_bandwidth_for_each_group(device, backend, lead):
    x = normal(2, 4, 6, 3)
    h = normal(*lead).abs() + 0.3
    exact = reference.kernel_sums(reference.as_float64(x), np.broadcast_to(h.numpy(), (2, 4)))
    close(kernel_density(x.to(device), h.to(device)), exact)
