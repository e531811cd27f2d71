"""Whether ``sample_tokens`` draws from the distribution it states, and every draw on its own."""

import pytest
import torch
from scipy.stats import chi2

from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds
from varkern.ops.sampling import sample_tokens

FALSE_ALARM = 1e-7


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def surprise(observed, expected, degrees):
    """The chance of a chi-square statistic at least this large."""
    return chi2.sf(((observed - expected) ** 2 / expected).sum().item(), degrees)


@pytest.mark.parametrize("vocab, positions", [(7, 500), (400, 1)], ids=["all pairs", "search"])
def test_draws_follow_the_filtered_distribution(vocab, positions, backend, device):
    place = device if backend == "triton" else torch.device("cpu")
    draws = 2000 if backend == "triton" and place.type == "cpu" else 200_000
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    rows = logits.expand(1, positions, vocab).to(place)
    seeds = image_seeds(0, 1, place)
    tokens = sample_tokens(rows, draws // positions, top_k=15, top_p=0.95, seeds=seeds).cpu()
    order = logits[0, 0].double().argsort(descending=True)[:15]
    probs = logits[0, 0].double()[order].softmax(0)
    kept = int((probs.cumsum(0) - probs < 0.95).sum())
    probs = probs[:kept] / probs[:kept].sum()
    counts = torch.bincount(tokens.flatten(), minlength=vocab)
    assert counts[order[:kept]].sum() == draws
    assert surprise(counts[order[:kept]].double(), probs * draws, kept - 1) > FALSE_ALARM


def test_candidates_positions_images_and_scales_are_independent():
    # Tables of pairs of draws over 8 tokens; 12 tables, so the whole test errs with a chance of 1.2e-6 at the most.
    images, candidates, positions, vocab = 40, 10, 50, 8
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(1)).expand(images, positions, vocab)
    scales = [sample_tokens(logits, candidates, seeds=image_seeds(0, images), scale=k) for k in range(4)]
    drawn = torch.stack(scales)  # [scale, image, candidate, position]
    for axis in range(4):
        for shift in (1, 2, 3):
            pairs = (drawn * vocab + drawn.roll(shift, axis)).flatten()
            table = torch.bincount(pairs, minlength=vocab**2).double().view(vocab, vocab)
            expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
            assert surprise(table, expected, (vocab - 1) ** 2) > FALSE_ALARM, (axis, shift)
