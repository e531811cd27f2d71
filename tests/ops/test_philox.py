"""Philox-4x32-10 against its published vectors, and the counter layout built on it."""

import math

import pytest
import torch

from varkern.ops import philox as ph
from varkern.ops.backend import use_backend

ONES = 0xFFFFFFFF
# Known answers published with Random123 (kat_vectors, philox4x32 10): counter, key, output.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("counter, key, wanted", KNOWN.values(), ids=KNOWN)
def test_known_answers_with_tensors(counter, key, wanted):
    words = [torch.tensor([w, w]) for w in (*key, *counter)]
    assert [out.tolist() for out in ph.philox(*words)] == [[w, w] for w in wanted]


@pytest.mark.parametrize("counter, key, wanted", KNOWN.values(), ids=KNOWN)
def test_known_answers_with_ints(counter, key, wanted):
    # Python's unbounded integers are a second arithmetic: they would show an int64 product that wrapped wrongly.
    assert ph.philox(*key, *counter) == wanted


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF], ids=hex)
def test_uniforms_use_the_stated_counter(seed):
    scale, stream = 3, ph.PICKS
    u = ph.uniforms(torch.tensor([7, seed]), 2, 3, scale, stream)
    assert u.shape == (2, 2, 3) and u.dtype == torch.float32
    for candidate in range(2):
        for position in range(3):
            first = ph.philox(seed & ONES, (seed >> 32) & ONES, position, candidate, scale, stream)[0]
            assert u[1, candidate, position].item() == (first >> 8) / 2**24


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_uniforms_of_nothing(shape):
    assert ph.uniforms(torch.zeros(shape[0], dtype=torch.int64), *shape[1:], scale=0).shape == shape


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 37), (2, 300, 1), (0, 2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("scale, stream", [(0, ph.TOKENS), (9, ph.PICKS), (2, ph.NOISE)])
def test_the_kernel_gives_the_same_numbers(device, shape, scale, stream):
    seeds = torch.tensor([0, -1, 2**63 - 1])[: shape[0]]
    wanted = ph.uniforms(seeds, *shape[1:], scale, stream)
    with use_backend("triton"):
        assert torch.equal(ph.uniforms(seeds.to(device), *shape[1:], scale, stream).cpu(), wanted)
        spread = torch.stack((seeds, seeds + 5), dim=1).to(device)[:, 0]  # every second number of a wider tensor
        assert torch.equal(ph.uniforms(spread, *shape[1:], scale, stream).cpu(), wanted)


def test_the_kernel_is_registered(device):
    torch.library.opcheck(ph._uniforms_op, (torch.tensor([3, 4], device=device), 2, 5, 1, ph.PICKS))
    seeds = torch.tensor([3, 4], device=device)
    with use_backend("triton"):
        wanted = ph.uniforms(seeds, 2, 5, 1, ph.PICKS)
        compiled = torch.compile(lambda s: ph.uniforms(s, 2, 5, 1, ph.PICKS) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(seeds), wanted * 2)


def test_uniforms_are_even():
    # Chi-square over 256 cells of 2^18 draws; 255 degrees of freedom, false-alarm rate below 1e-7 on each side.
    u = ph.uniforms(torch.arange(64) - 32, 16, 256, scale=1)
    counts = torch.bincount((u.flatten() * 256).long(), minlength=256).double()
    expected = u.numel() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert 150 < chi2 < 395
    assert u.min() >= 0 and u.max() < 1


def test_streams_scales_and_seeds_are_unrelated():
    # Correlation of n independent pairs is about normal with deviation 1/sqrt(n): 5.5 deviations is 4e-8 a pair.
    seeds = torch.tensor([1])
    variants = [(seeds, 0, s) for s in (ph.TOKENS, ph.LABELS, ph.PICKS, ph.NOISE)]
    variants += [(seeds, 1, ph.TOKENS), (seeds + 1, 0, ph.TOKENS), (seeds + 2**32, 0, ph.TOKENS)]
    draws = torch.stack([ph.uniforms(s, 64, 64, scale, stream).flatten().double() for s, scale, stream in variants])
    correlation = torch.corrcoef(draws) - torch.eye(len(variants), dtype=torch.float64)
    assert correlation.abs().max().item() < 5.5 / math.sqrt(draws.shape[1])


def test_image_seeds_start_with_the_smaller_batch():
    assert torch.equal(ph.image_seeds(3, 16)[:5], ph.image_seeds(3, 5))


@pytest.mark.parametrize("g_seed", [0, 3, -1, 2**63 + 12345, -(2**63)])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17])
def test_few_image_seeds_are_those_of_many(g_seed, count, device):
    few, many = ph.image_seeds(g_seed, count, device), ph.image_seeds(g_seed, 200, device)
    assert few.dtype == torch.int64 and few.device.type == device.type and torch.equal(few, many[:count])
    assert (many < 0).any() and (many > 0).any()


def test_image_seeds_of_neighbouring_batches_share_nothing():
    seeds = torch.cat([ph.image_seeds(g, 50) for g in range(-20, 20)])
    assert seeds.dtype == torch.int64 and seeds.unique().numel() == seeds.numel()


def test_image_seeds_take_64_bits():
    assert torch.equal(ph.image_seeds(-1, 3), ph.image_seeds(2**64 - 1, 3))
    assert not torch.equal(ph.image_seeds(1, 3), ph.image_seeds(1 + 2**32, 3))
    assert ph.image_seeds(0, 0).shape == (0,)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ph.image_seeds(2**64, 1), ValueError, "g_seed must be < 2"),
        (lambda: ph.image_seeds(0.5, 1), TypeError, "g_seed must be an int, got float"),
        (lambda: ph.image_seeds(0, -1), ValueError, "batch_size must be >= 0, got -1"),
        (lambda: ph.uniforms(torch.zeros(2), 1, 1, 0), TypeError, "seeds must be an int64 tensor, got torch.float32"),
        (lambda: ph.uniforms(torch.zeros(2, 1).long(), 1, 1, 0), ValueError, r"seeds must have shape \[B\]"),
        (lambda: ph.uniforms(torch.zeros(2).long(), -1, 1, 0), ValueError, "num_candidates must be >= 0, got -1"),
        (lambda: ph.uniforms(torch.zeros(2).long(), 1, 1, -1), ValueError, "scale must be >= 0, got -1"),
    ],
    ids=["g_seed large", "g_seed float", "batch", "seeds dtype", "seeds shape", "candidates", "scale"],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
