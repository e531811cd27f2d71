"""Statistical tests that ``sample_tokens`` draws from the stated distribution, and that draws are independent."""

import pytest
import torch
from scipy.stats import chi2

from tests.interpreter import draw_many_at_once
from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds
from varkern.ops.sampling import sample_tokens

FALSE_ALARM = 1e-7
DRAWS = 200_000


@pytest.fixture(params=["torch", "triton"])
def backend(request, device, monkeypatch):
    if request.param == "triton":
        draw_many_at_once(monkeypatch)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def place(backend, device):
    return device if backend == "triton" else torch.device("cpu")


def surprise(observed, expected, degrees):
    """The chance of a chi-square statistic at least this large."""
    return chi2.sf(((observed - expected) ** 2 / expected).sum().item(), degrees)


@pytest.mark.parametrize(
    "vocab, top_k, positions",
    [(7, 4, 2000), (400, 15, 1), (400, 0, 1)],
    ids=["all pairs", "shortlist", "row"],
)
def test_draws_follow_the_filtered_distribution(vocab, top_k, positions, backend, place):
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    rows = logits.expand(1, positions, vocab).to(place)
    seeds = image_seeds(0, 1, place)
    tokens = sample_tokens(rows, DRAWS // positions, top_k=top_k, top_p=0.9, seeds=seeds).cpu()
    order = logits[0, 0].double().argsort(descending=True)[: top_k or vocab]
    probs = logits[0, 0].double()[order].softmax(0)
    kept = int((probs.cumsum(0) - probs < 0.9).sum())
    assert 1 < kept < len(order)
    probs = probs[:kept] / probs[:kept].sum()
    counts = torch.bincount(tokens.flatten(), minlength=vocab)
    assert counts[order[:kept]].sum() == DRAWS
    assert surprise(counts[order[:kept]].double(), probs * DRAWS, kept - 1) > FALSE_ALARM


@pytest.mark.thinned(vocab=(8,))
@pytest.mark.parametrize("vocab, positions, candidates", [(8, 50, 25), (40, 4, 3125)], ids=["all pairs", "shortlist"])
def test_candidates_positions_images_and_scales_are_independent(vocab, positions, candidates, backend, place):
    # Tables of pairs of draws over 8 kept tokens, 12 per case; the false-alarm rate of a case is at most 1.2e-6.
    images = DRAWS // 4 // positions // candidates
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(1))
    rows, seeds = logits.expand(images, positions, vocab).to(place), image_seeds(0, images, place)
    scales = [sample_tokens(rows, candidates, top_k=8, seeds=seeds, scale=k).cpu() for k in range(4)]
    rank = torch.zeros(vocab, dtype=torch.int64)
    rank[logits[0, 0].topk(8).indices] = torch.arange(8)
    drawn = rank[torch.stack(scales)]  # [scale, image, candidate, position]
    assert drawn.numel() == DRAWS
    for axis in range(4):
        for shift in (1, 2, 3):
            length = drawn.shape[axis] - shift
            pairs = (drawn.narrow(axis, 0, length) * 8 + drawn.narrow(axis, shift, length)).flatten()
            table = torch.bincount(pairs, minlength=64).double().view(8, 8)
            expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
            assert surprise(table, expected, 49) > FALSE_ALARM, (axis, shift)
