"""Resizing ``f_hat`` against ``F.interpolate`` in float64, in its PyTorch form and its Triton form."""

import pytest
import torch
import torch.nn.functional as F

from varkern.ops import resizing
from varkern.ops.backend import use_backend
from varkern.ops.resizing import resize_features


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Every result starts as NaN, so that an unwritten pixel is noticed."""
    empty = resizing._empty_resized
    monkeypatch.setattr(resizing, "_empty_resized", lambda *given: empty(*given).fill_(torch.nan))


CASES = [
    *(pytest.param(2, 32, (16, 16), (side, side), "area", id=f"area-{side}") for side in (1, 2, 3, 4, 5, 6, 8, 10, 13)),
    pytest.param(1, 8, (64, 48), (1, 32), "area", id="area-64x48-1x32"),
    pytest.param(1, 24, (5, 7), (5, 7), "area", id="area-same-size"),
    pytest.param(3, 5, (7, 6), (11, 4), "bicubic", id="bicubic-both-ways"),
    pytest.param(3, 40, (6, 7), (3, 9), "bilinear", id="bilinear-both-ways"),
    pytest.param(2, 8, (4, 4), (9, 9), "trilinear", id="trilinear-grow"),
    pytest.param(2, 8, (4, 4), (9, 9), "nearest", id="nearest-grow"),
]


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize(("B", "C", "shape", "size", "interpolation"), CASES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_against_float64(device, backend, poisoned, B, C, shape, size, interpolation, channels_last):
    f_hat = torch.randn(B, C, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    if channels_last:
        f_hat = f_hat.contiguous(memory_format=torch.channels_last)
    resized = resize_features(f_hat, size=size, interpolation=interpolation, channels_last=channels_last)
    mode = "bilinear" if interpolation == "trilinear" else interpolation
    exact = F.interpolate(f_hat.double(), size=size, mode=mode) if size != shape else f_hat.double()
    assert resized.shape == (B, C, *size) and resized.dtype == torch.float32
    assert resized.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert ((resized - exact).abs().max() / exact.abs().max()).item() < 2e-6


def test_the_plain_form_is_upstreams_bit_for_bit(device):
    f_hat = torch.randn(2, 8, 16, 16, device=device)
    assert torch.equal(resize_features(f_hat, size=5), F.interpolate(f_hat, size=(5, 5), mode="area"))


def test_shares_no_memory(device, backend):
    f_hat = torch.ones(1, 2, 3, 3, device=device)
    resized = resize_features(f_hat, size=3)
    f_hat.zero_()
    assert torch.equal(resized, torch.ones_like(resized))


def test_empty_batch(device, backend):
    assert resize_features(torch.zeros(0, 4, 8, 8, device=device), size=3).shape == (0, 4, 3, 3)


BAD = [
    pytest.param({"f_hat": torch.zeros(2, 3, 4)}, ValueError, r"f_hat must have shape .* got \[2, 3, 4\]", id="rank"),
    pytest.param({"f_hat": torch.zeros(2, 3, 0, 4)}, ValueError, r"f_hat must have shape", id="no-rows"),
    pytest.param({"f_hat": torch.zeros(2, 3, 4, 4).half()}, TypeError, "f_hat must be float32, got", id="dtype"),
    pytest.param({"size": 0}, ValueError, "size must be a positive int or two of them, got 0", id="size-zero"),
    pytest.param({"size": (1, 2, 3)}, ValueError, "size must be a positive int or two", id="size-of-three"),
    pytest.param({"interpolation": "cubic"}, ValueError, "interpolation must be one of .*, got 'cubic'", id="mode"),
    pytest.param({"f_hat": torch.zeros(1, 1, 2, 2, requires_grad=True)}, RuntimeError, "no gradients", id="gradient"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    given = {"f_hat": torch.zeros(1, 2, 4, 4), "size": 2} | change
    with pytest.raises(error, match=message):
        resize_features(given.pop("f_hat"), **given)


def test_opcheck(device, backend):
    f_hat = torch.randn(2, 4, 6, 6, device=device)
    torch.library.opcheck(torch.ops.varkern.resize_features.default, (f_hat, [3, 4], "area", False))
    torch.library.opcheck(torch.ops.varkern.resize_features.default, (f_hat, [3, 4], "bilinear", True))
