"""The nucleus for values of ``top_p`` so near to a boundary of the distribution that float32 cannot resolve them."""

import bisect
import math

import pytest
import torch

from tests.interpreter import draw_many_at_once
from varkern.ops import sampling
from varkern.ops.backend import use_backend
from varkern.ops.philox import TOKENS, image_seeds, uniform_bits


@pytest.mark.parametrize("top_k", [0, 300], ids=["row", "shortlist"])
@pytest.mark.parametrize("spread", [0.01, 1.5], ids=["flat", "random"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_boundary_that_float32_cannot_place(backend, spread, top_k, device, monkeypatch):
    if backend == "triton":
        draw_many_at_once(monkeypatch)
    place = device if backend == "triton" else torch.device("cpu")
    vocab = 1500 if top_k else 300  # a shortlist of 300 takes 512 places, which may be at most half the row
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).sort().values * spread
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(4))
    weights = sampling._weights(logits, logits.max())[order]  # integers, in vocabulary order
    ranks = weights.argsort(descending=True)[: top_k or vocab]
    sums = weights[ranks].cumsum(0).tolist()
    seeds = image_seeds(0, 1, place)
    bits = uniform_bits(seeds.cpu(), 300, 1, 0, TOKENS).flatten().tolist()
    rows = logits[order].view(1, 1, vocab).to(place)
    for last in (7, 40, 111, 222):
        for step in (0, 1):
            nucleus = (sums[last] << 30) // sums[-1] + step  # the multiples of 2^-30 about the mass of last + 1 tokens
            target = -(-sums[-1] * nucleus >> 30)
            num_kept = 1 + sum(mass < target for mass in sums[:-1])
            kept = torch.zeros_like(weights).index_copy(0, ranks[:num_kept], weights[ranks[:num_kept]])
            running = kept.cumsum(0).tolist()
            wanted = [bisect.bisect_right(running, sums[num_kept - 1] * u >> 24) for u in bits]
            with use_backend(backend):
                tokens = sampling.sample_tokens(rows, len(bits), top_k=top_k, top_p=nucleus / 2**30, seeds=seeds)
            assert tokens.flatten().tolist() == wanted, (last, step)


ROWS = {  # vocabulary, places of equal logits, the other logits, top_k
    "all pairs": (4, [0, 1, 2, 3], -math.inf, 0),
    "row": (300, [7, 90, 91, 250], -100.0, 0),
    "shortlist": (300, [7, 90, 91, 250], 1.0, 4),
    "shortlist overflows": (300, list(range(100, 300)), 1.0, 4),
}


@pytest.mark.parametrize("vocab, places, others, top_k", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_tokens_that_reach_top_p_exactly(backend, vocab, places, others, top_k, device):
    """Half of the mass is half of the equal tokens, those of lower index, and not one fewer or more."""
    place = device if backend == "triton" else torch.device("cpu")
    row = torch.full((1, 1, vocab), others, device=place)
    row[:, :, places] = 2.5
    seeds = image_seeds(0, 1, place)
    bits = uniform_bits(seeds.cpu(), 6, 1, 0, TOKENS).flatten().tolist()
    for top_p, num_kept in ((0.5, len(places) // 2), (0.5 + 2**-30, len(places) // 2 + 1)):
        with use_backend(backend):
            tokens = sampling.sample_tokens(row, len(bits), top_k=top_k, top_p=top_p, seeds=seeds).flatten().tolist()
        assert tokens == [places[num_kept * u >> 24] for u in bits], top_p
        assert len(set(tokens)) > 1
