"""Densities of token maps and binary codes, compared with float64, the released code, and other batches."""

import numpy as np
import pytest
import torch

from tests.ops.test_density import backend, close, normal, pairs_once, poisoned  # noqa: F401
from tests.references import density as reference
from varkern.ops import bit_density, kernel_density, token_density

RULES = ["image", "batch", 3.0, "array"]


def maps(device, batch=2, n=17, length=3, vocabulary=23, width=9, seed=0):
    """Tokens with duplicates among them, and a codebook."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (batch, n, length), generator=generator)
    return tokens.to(device), normal(vocabulary, width, seed=seed + 1).to(device)


def bandwidth_of(rule, batch, positions, device):
    if rule != "array":
        return rule, rule
    h = 1 + normal(batch, positions).abs()
    return h.to(device), h.double().numpy()


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("per", ["position", "map"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_tokens(device, backend, metric, per, rule):  # noqa: F811
    tokens, codebook = maps(device)
    given, wanted = bandwidth_of(rule, 2, 3 if per == "position" else 1, device)
    if metric == "cosine" and rule == 3.0:
        given = wanted = 0.4
    codes = reference.as_float64(codebook)[tokens.cpu().numpy()]
    close(token_density(tokens, codebook, per, given, metric), reference.map_density(codes, per, wanted, metric))


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("per", ["position", "map"])
def test_bits(device, backend, per, rule):  # noqa: F811
    bits = (normal(2, 17, 3, 37) > 0.4).to(torch.uint8).to(device)
    scale = 37**-0.5
    given, wanted = bandwidth_of(rule, 2, 3 if per == "position" else 1, device)
    codes = (reference.as_float64(bits) * 2 - 1) * scale
    exact = reference.map_density(codes, per, wanted)
    close(bit_density(bits, scale, per, given), exact)
    close(bit_density(bits.bool(), scale, per, given), exact)


@pytest.mark.parametrize("d", [1, 6, 32, 64])
def test_bits_are_codes(device, backend, d):  # noqa: F811
    """The bit form equals the plain form on codes of +-scale, for bits in any memory order."""
    bits = (normal(2, d, 3, 11) > 0).to(torch.uint8).permute(0, 3, 2, 1).to(device)
    codes = (bits.float() * 2 - 1) * 0.25
    exact = reference.kernel_sums(reference.as_float64(codes).transpose(0, 2, 1, 3), 0.4).sum(1)
    close(bit_density(bits, 0.25, bandwidth=0.4), exact)
    close(bit_density(bits * 7, 0.25, bandwidth=0.4), exact)  # anything but 0 is a 1


@pytest.mark.parametrize("n", [252, 300])
def test_every_pair_of_tiles_once(device, backend, pairs_once, n):  # noqa: F811
    bits = (normal(1, n, 2, 12) > 0).to(torch.uint8).to(device)
    codes = (reference.as_float64(bits) * 2 - 1) * 0.5
    close(bit_density(bits, 0.5, bandwidth=0.9), reference.map_density(codes, bandwidth=0.9))


def test_many_positions(device, backend):  # noqa: F811
    """More positions than one program takes, so that their sums are in several slots."""
    tokens, codebook = maps(device, batch=2, n=5, length=19, width=3)
    codes = reference.as_float64(codebook)[tokens.cpu().numpy()]
    close(token_density(tokens, codebook), reference.map_density(codes))
    bits = (normal(2, 5, 19, 3) > 0).to(torch.uint8).to(device)
    close(bit_density(bits, 1.0), reference.map_density(reference.as_float64(bits) * 2 - 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_released_chain(device, backend, batch):  # noqa: F811
    """``bandwidth="batch"`` at any batch, and ``"image"`` at one image, is what the released code computes."""
    tokens, codebook = maps(device, batch=batch, width=16)
    released = reference.chain(codebook.double()[tokens])
    for rule in ("batch", "image") if batch == 1 else ("batch",):
        close(token_density(tokens, codebook, bandwidth=rule), released.cpu().numpy(), 3e-5)  # the chain adds 1e-6 to h


def test_the_sum_of_each_positions_density(device, backend):  # noqa: F811
    tokens, codebook = maps(device)
    apart = sum(kernel_density(codebook[tokens[:, :, p]]) for p in range(tokens.shape[2]))
    assert torch.allclose(token_density(tokens, codebook), apart, rtol=2e-6)


@pytest.mark.thinned(n=(17, 33))
@pytest.mark.parametrize(("per", "n"), [("position", 17), ("position", 140), ("map", 33)])
def test_an_image_alone_and_in_a_batch_bit_for_bit(device, backend, per, n):  # noqa: F811
    tokens, codebook = maps(device, batch=2, n=n, length=1 if n == 140 else 3, width=5)
    bits = (normal(2, n, 3, 9) > 0).to(torch.uint8).to(device)
    together = token_density(tokens, codebook, per), bit_density(bits, 0.3, per)
    for image in (0, 1):
        one = slice(image, image + 1)
        assert torch.equal(token_density(tokens[one], codebook, per)[0], together[0][image])
        assert torch.equal(bit_density(bits[one], 0.3, per)[0], together[1][image])
    codes = codebook[tokens[..., 0]]
    sums = kernel_density(codes)
    assert torch.equal(kernel_density(codes[1]), sums[1])


def test_the_batchs_bandwidth_is_not_an_images(device, backend):  # noqa: F811
    tokens, codebook = maps(device)
    tokens[0] = tokens[0] % 2
    alone, together = token_density(tokens, codebook), token_density(tokens, codebook, bandwidth="batch")
    assert not torch.allclose(alone, together, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_codebook(device, backend, dtype):  # noqa: F811
    tokens, codebook = maps(device)
    codebook = codebook.to(dtype)
    codes = reference.as_float64(codebook)[tokens.cpu().numpy()]
    close(token_density(tokens, codebook, bandwidth=1.5), reference.map_density(codes, bandwidth=1.5))


def test_strides(device, backend):  # noqa: F811
    tokens, codebook = maps(device)
    strided = tokens.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.empty(23, 18, device=device)[:, ::2].copy_(codebook)
    assert torch.equal(token_density(strided, wide), token_density(tokens, codebook))


def test_empty_batch(device, backend):  # noqa: F811
    for rule in ("image", "batch", 2.0):
        assert token_density(*maps(device, batch=0), bandwidth=rule).shape == (0, 17)
        assert bit_density(torch.zeros(0, 5, 2, 3, dtype=torch.uint8, device=device), 1.0, bandwidth=rule).shape == (
            0,
            5,
        )


def test_equal_maps(device, backend):  # noqa: F811
    tokens, codebook = maps(device)
    tokens[:] = tokens[:, :1]
    wanted = torch.full((2, 17), 17.0, device=device)
    assert torch.equal(token_density(tokens, codebook, "map", "image"), wanted)
    assert torch.equal(token_density(tokens, codebook, "position", "batch"), 3 * wanted)
    bits = torch.ones(2, 17, 3, 5, dtype=torch.uint8, device=device)
    assert torch.equal(bit_density(bits, 0.1), 3 * wanted) and torch.equal(bit_density(bits, 0.1, "map"), wanted)


def test_tokens_out_of_range_never_read_outside_the_codebook(device):
    from varkern.ops.backend import use_backend

    tokens, codebook = maps(device)
    wild = tokens.clone()
    wild[0, 0, 0], wild[1, 2, 2] = 10**12, -5
    clamped = wild.to(torch.int32).clamp(0, 22).long()
    with use_backend("triton"):
        assert torch.equal(token_density(wild, codebook), token_density(clamped, codebook))
    with use_backend("torch"), pytest.raises(IndexError):
        token_density(wild.cpu(), codebook.cpu())


def test_no_bandwidth_is_lost_between_float32_and_float64():
    """The reference agrees with itself: the map form at one position is the plain form."""
    codes = np.random.default_rng(0).normal(size=(2, 6, 1, 4))
    np.testing.assert_allclose(reference.map_density(codes), reference.kernel_sums(codes[:, :, 0]), rtol=1e-12)
