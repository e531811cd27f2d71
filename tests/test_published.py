"""The published sampler: filtered logits, draws and Gumbel weights against float64 forms."""

import math

import pytest
import torch

from tests.references import var as reference
from varkern.published import filter_logits, gumbel_softmax, sample_multinomial, smoothing_temperature

FILTERS = [(0, 0.0), (1, 0.0), (7, 0.0), (252, 0.0), (253, 0.0), (999, 0.0), (0, 0.3), (0, 0.999), (0, 1.0), (40, 0.6)]


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("top_k, top_p", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_filtered_logits_equal_float64(top_k, top_p, dtype):
    logits = random_logits(3, 5, 253).to(dtype)
    before = logits.clone()
    found = filter_logits(logits, top_k, top_p)
    assert torch.equal(found.double(), reference.filtered(logits.double(), min(top_k, 253), top_p))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_at_least_the_nucleus(dtype):
    logits = random_logits(4, 97).to(dtype)
    kept = filter_logits(logits, 30, 0.9).isfinite()
    assert torch.equal(filter_logits(logits, 30, 0.9)[kept], logits[kept])
    mass = reference.filtered(logits.double(), 30, 0).softmax(-1)
    assert ((mass * kept).sum(-1) > 0.9 - 0.05).all() and (kept.sum(-1) <= 31).all()


def test_ties_at_the_threshold_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert filter_logits(logits, 2).isfinite().tolist() == [[True, True, True, True, False]]


def test_any_strides_and_no_rows():
    logits = random_logits(5, 33, 4).permute(2, 0, 1)
    assert torch.equal(filter_logits(logits, 9, 0.8), filter_logits(logits.contiguous(), 9, 0.8))
    assert filter_logits(logits[:0], 9, 0.8).shape == (0, 5, 33)
    assert sample_multinomial(logits[:0], 2).shape == (0, 2, 5)
    assert gumbel_softmax(logits[:0], 0.1).shape == (0, 5, 33)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 0.0), r"top_k must be >= 0, got -1"),
        ((0, 1.5), r"top_p must be in \[0, 1\], got 1.5"),
        ((0, math.nan), r"top_p must be in \[0, 1\], got nan"),
    ],
    ids=str,
)
def test_bad_filters(arguments, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(1, 4), *arguments)


def test_drawn_tokens_are_multinomials():
    """Row by row and candidate by candidate what ``torch.multinomial`` draws from the same generator state."""
    logits = filter_logits(random_logits(2, 3, 41), 12, 0.9)
    tokens = sample_multinomial(logits, 5, torch.Generator().manual_seed(3))
    wanted = torch.multinomial(logits.softmax(-1).flatten(0, 1), 5, True, generator=torch.Generator().manual_seed(3))
    assert tokens.shape == (2, 5, 3) and tokens.dtype == torch.int64
    assert torch.equal(tokens.transpose(1, 2).reshape(6, 5), wanted)
    assert logits.gather(2, tokens.transpose(1, 2)).isfinite().all()


@pytest.mark.parametrize("temperature", [0.27, 0.005])
def test_gumbel_weights_equal_float64(temperature):
    logits = filter_logits(random_logits(2, 5, 33), 12)
    weights = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(3))
    exponential = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(3)).double()
    wanted = ((logits.double() - exponential.log()) / temperature).softmax(-1)
    assert torch.allclose(weights.double(), wanted, atol=2e-4)
    assert (weights[logits == -math.inf] == 0).all()


def test_smoothing_temperature_falls_to_its_floor():
    assert smoothing_temperature(0) == 0.27
    assert math.isclose(smoothing_temperature(0.5), 0.27 * 0.525)
    assert math.isclose(smoothing_temperature(1), 0.27 * 0.05)
    assert smoothing_temperature(1.05) == 0.005
