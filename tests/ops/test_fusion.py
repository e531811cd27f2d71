"""F(.) against a float64 chain of embedding, interpolate and conv2d, in its PyTorch form and its Triton form."""

import pytest
import torch
import torch.nn.functional as F

from tests.references.fusion import SIDES_256, case, chain, relative_error
from varkern.ops import fusion
from varkern.ops.backend import use_backend
from varkern.ops.fusion import commit_tokens, fuse_tokens


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Every result starts as NaN, so that an unwritten pixel is noticed."""
    empty = fusion._empty_features
    monkeypatch.setattr(fusion, "_empty_features", lambda *given: empty(*given).fill_(torch.nan))


@pytest.mark.thinned(side=(1, 6, 16))
@pytest.mark.parametrize("side", SIDES_256)
def test_every_scale_in_float32(device, backend, poisoned, side):
    tokens, codebook, f_hat, phi = case(device, side, 16, B=1)
    features = fuse_tokens(tokens, codebook, side=side, size=16, f_hat=f_hat, phi=phi)
    assert features.shape == (1, 2, 32, 16, 16) and features.dtype == torch.float32 and features.is_contiguous()
    assert relative_error(features, chain(tokens, codebook, side, 16, f_hat, phi)) < 2e-6


SHAPES = [
    pytest.param((1, 1), (8, 8), 8, id="1x1-8x8-C8"),
    pytest.param((6, 6), (6, 6), 16, id="6x6-unresized-C16"),
    pytest.param((3, 5), (7, 18), 16, id="3x5-7x18-C16"),
    pytest.param((7, 19), (7, 19), 64, id="7x19-unresized-C64"),
    pytest.param((4, 9), (8, 9), 64, id="4x9-8x9-one-axis-C64"),
    pytest.param((11, 2), (5, 17), 24, id="11x2-5x17-shrinks-one-axis-C24"),
    pytest.param((24, 24), (32, 32), 32, id="24x24-32x32"),
    pytest.param((32, 32), (33, 17), 8, id="32x32-33x17-C8"),
    pytest.param((9, 12), (64, 48), 8, id="9x12-64x48-C8"),
    pytest.param((5, 5), (5, 5), 130, id="5x5-unresized-C130"),
    pytest.param((1, 2), (1, 3), 1, id="1x2-1x3-C1"),
]


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize(("side", "size", "C"), SHAPES)
@pytest.mark.parametrize("with_phi", [True, False], ids=["phi", "no-phi"])
def test_odd_shapes(device, backend, poisoned, side, size, C, with_phi):
    tokens, codebook, f_hat, phi = case(device, side, size, B=1, M=2 if C > 8 else 1, C=C)
    phi = phi if with_phi else None
    features = fuse_tokens(tokens, codebook, side=side, size=size, f_hat=f_hat, phi=phi)
    assert relative_error(features, chain(tokens, codebook, side, size, f_hat, phi)) < 2e-6


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "area", "nearest", "trilinear"])
@pytest.mark.parametrize(("side", "size"), [((5, 6), (9, 8)), ((9, 8), (5, 6))], ids=["grow", "shrink"])
def test_interpolations(device, backend, poisoned, interpolation, side, size):
    tokens, codebook, f_hat, phi = case(device, side, size, C=8)
    features = fuse_tokens(
        tokens, codebook, side=side, size=size, f_hat=f_hat, phi=phi, interpolation=interpolation, channels_last=True
    )
    # nearest picks its source by a float32 quotient when its input is float32, so its truth is taken there
    dtype = torch.float32 if interpolation == "nearest" else torch.float64
    exact = chain(tokens, codebook, side, size, f_hat, phi, interpolation, dtype).double()
    assert relative_error(features, exact) < 2e-6


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("side", [1, 5, 8, 13, 16])
@pytest.mark.parametrize("with_phi", [True, False], ids=["phi", "no-phi"])
def test_half_precision_is_no_worse_than_the_chain_in_it(device, backend, poisoned, dtype, side, with_phi):
    tokens, codebook, f_hat, phi = case(device, side, 16, B=1)
    phi = phi if with_phi else None
    features = fuse_tokens(tokens, codebook, side=side, size=16, f_hat=f_hat, phi=phi, dtype=dtype, channels_last=True)
    assert features.dtype == dtype
    assert features.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    exact = chain(tokens, codebook, side, 16, f_hat, phi)
    eager = relative_error(chain(tokens, codebook, side, 16, f_hat, phi, dtype=dtype), exact)
    assert relative_error(features, exact) < eager + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("C", [8, 64, 80])
def test_half_precision_codebook_and_widths(device, backend, poisoned, dtype, C):
    tokens, codebook, f_hat, phi = case(device, 6, 6, B=1, M=1, C=C)
    codebook, f_hat = codebook.to(dtype), f_hat.to(dtype)
    phi = (phi[0].to(dtype), phi[1].to(dtype), 0.25)
    exact = chain(tokens, codebook, 6, 6, f_hat, phi)
    features = fuse_tokens(tokens, codebook, side=6, size=6, f_hat=f_hat, phi=phi)
    assert features.dtype == torch.float32 and relative_error(features, exact) < 2e-6
    features = fuse_tokens(tokens, codebook, side=6, size=6, f_hat=f_hat, phi=phi, dtype=dtype)
    eager = relative_error(chain(tokens, codebook, 6, 6, f_hat, phi, dtype=dtype), exact)
    assert relative_error(features, exact) < eager + 1e-3


@pytest.mark.parametrize("side", [4, 7], ids=["resized", "unresized"])
def test_non_contiguous_inputs(device, backend, poisoned, side):
    tokens, codebook, f_hat, (weight, bias, blend) = case(device, side, 7, B=3, C=16)
    exact = chain(tokens, codebook, side, 7, f_hat, (weight, bias, blend))
    features = fuse_tokens(
        tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        codebook.t().contiguous().t(),
        side=side,
        size=7,
        f_hat=f_hat.contiguous(memory_format=torch.channels_last),
        phi=(weight.contiguous(memory_format=torch.channels_last), torch.stack((bias, bias), 1)[:, 0], blend),
    )
    assert relative_error(features, exact) < 2e-6


@pytest.mark.parametrize("side", [3, 5], ids=["resized", "unresized"])
def test_optional_parts(device, backend, poisoned, side):
    tokens, codebook, f_hat, (weight, bias, _) = case(device, side, 5, B=1, C=8)
    for phi in (None, (weight, None, 0.5), (weight, bias, 1.0), (weight, bias, 0.0)):
        for running in (None, f_hat):
            features = fuse_tokens(tokens, codebook, side=side, size=5, f_hat=running, phi=phi)
            assert relative_error(features, chain(tokens, codebook, side, 5, running, phi)) < 2e-6


@pytest.mark.parametrize(("B", "M"), [(0, 3), (2, 0)], ids=["no-images", "no-candidates"])
def test_empty_batches(device, backend, B, M):
    tokens, codebook, _, phi = case(device, 3, 5, B=B, M=M, C=8)
    f_hat = torch.zeros(B, 8, 5, 5, device=device)
    for side in (3, 5):
        tokens = torch.zeros(B, M, side * side, dtype=torch.int64, device=device)
        features = fuse_tokens(tokens, codebook, side=side, size=5, f_hat=f_hat, phi=phi)
        assert features.shape == (B, M, 8, 5, 5)
    if B == 0:
        assert commit_tokens(tokens[:, 0], f_hat, codebook, side=5, phi=phi) is f_hat


def test_a_candidate_does_not_depend_on_its_neighbours(device, backend):
    tokens, codebook, f_hat, phi = case(device, 5, 8, B=2, M=3, C=16)
    together = fuse_tokens(tokens, codebook, side=5, size=8, f_hat=f_hat, phi=phi)
    alone = fuse_tokens(tokens[1:, 2:], codebook, side=5, size=8, f_hat=f_hat[1:], phi=phi)
    torch.testing.assert_close(alone[0, 0], together[1, 2], rtol=0, atol=1e-6 if backend == "torch" else 0)


@pytest.mark.parametrize("side", [3, 5], ids=["resized", "unresized"])
def test_the_kernel_clamps_ids(device, side):
    tokens, codebook, f_hat, phi = case(device, side, 5, B=1, C=8, V=11)
    wild = tokens.clone()
    wild[:, :, 0], wild[:, :, -1] = -(2**40), 2**40
    tokens[:, :, 0], tokens[:, :, -1] = 0, 10
    for dtype in (torch.float32, torch.float16):
        with use_backend("triton"):
            given = fuse_tokens(wild, codebook, side=side, size=5, f_hat=f_hat, phi=phi, dtype=dtype)
            wanted = fuse_tokens(tokens, codebook, side=side, size=5, f_hat=f_hat, phi=phi, dtype=dtype)
        assert torch.equal(given, wanted)


def test_the_plain_form_works_in_pieces(device, monkeypatch):
    tokens, codebook, f_hat, phi = case(device, 3, 5, B=3, M=7, C=8)
    exact = chain(tokens, codebook, 3, 5, f_hat, phi)
    fuse_piece, pieces = fusion._fuse_piece, []

    def recorded(part, *rest):
        pieces.append(part.shape[0] * part.shape[1])
        return fuse_piece(part, *rest)

    monkeypatch.setattr(fusion, "_fuse_piece", recorded)
    for maps in (1, 3, 7, 15, 100):
        pieces.clear()
        monkeypatch.setattr(fusion, "WORKSPACE_BYTES", maps * 4 * 3 * 8 * 25)
        features = fuse_tokens(tokens, codebook, side=3, size=5, f_hat=f_hat, phi=phi)
        assert relative_error(features, exact) < 2e-6
        assert max(pieces) <= maps and sum(pieces) == 21


def upstream_step(tokens, f_hat, codebook, side, phi):
    """What the published quantizer does to ``f_hat``, in its order."""
    weight, bias, blend = phi
    B, C, H, W = f_hat.shape
    x = F.embedding(tokens, codebook).transpose(1, 2).reshape(B, C, side, side)
    if side != H:
        x = F.interpolate(x, size=(H, W), mode="bicubic")
    return f_hat.add_(x.mul(1 - blend) + F.conv2d(x, weight, bias, padding=1).mul_(blend))


@pytest.mark.thinned(side=(1, 6, 16))
@pytest.mark.parametrize("side", SIDES_256)
def test_commit(device, backend, side):
    tokens, codebook, f_hat, phi = case(device, side, 16, M=3)
    kept = tokens[:, 2]  # not contiguous
    exact = chain(kept.unsqueeze(1), codebook, side, 16, f_hat, phi)[:, 0]
    wanted = upstream_step(kept, f_hat.clone(), codebook, side, phi)
    for given in (f_hat.clone(), f_hat.contiguous(memory_format=torch.channels_last)):
        result = commit_tokens(kept, given, codebook, side=side, phi=phi)
        assert result is given
        assert relative_error(result, exact) < 2e-6
        if backend == "torch" and given.is_contiguous():
            assert torch.equal(result, wanted)


def test_ten_scales_in_a_row(device, backend):
    """A whole generation of one image: ``f_hat`` after every scale equals that of the published loop."""
    f_hat = torch.zeros(1, 16, 16, 16, device=device)
    exact = f_hat.double()
    for scale, side in enumerate(SIDES_256):
        tokens, codebook, _, phi = case(device, side, 16, B=1, M=1, C=16, seed=scale)
        commit_tokens(tokens[:, 0], f_hat, codebook, side=side, phi=phi)
        exact = chain(tokens, codebook, side, 16, exact, phi)[:, 0]
        assert relative_error(f_hat, exact) < 2e-6


def test_autocast_leaves_float32_alone(device, backend):
    tokens, codebook, f_hat, phi = case(device, 3, 5, C=8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        features = fuse_tokens(tokens, codebook, side=3, size=5, f_hat=f_hat, phi=phi)
    assert relative_error(features, chain(tokens, codebook, 3, 5, f_hat, phi)) < 2e-6
