"""Where random numbers come from: Philox at the image's address, or a generator; each with the right distribution."""

import math

import pytest
import torch

from tests.helpers import NUM_CLASSES, recorded, small_var
from tests.references import var as reference
from varkern import generate, image_seeds
from varkern.draws import MultinomialDraws, PhiloxDraws
from varkern.ops import sample_tokens
from varkern.ops.philox import NOISE, gumbel, uniforms
from varkern.spec import Logits

SEEDS = torch.tensor([11, -4, 2**62, 11, 0])


def test_drawn_labels_are_even():
    labels = PhiloxDraws(image_seeds(1, 70_000)).labels(NUM_CLASSES)
    # Chi-square with 6 degrees of freedom: 45 is passed by chance once in 2e7.
    counts = torch.bincount(labels, minlength=NUM_CLASSES).double()
    assert ((counts - 10_000).square() / 10_000).sum() < 45


def test_tokens_are_drawn_at_the_address_of_their_scale():
    logits = torch.randn(5, 9, 64, generator=torch.Generator().manual_seed(0))
    draws, said = PhiloxDraws(SEEDS), Logits(logits, None, 0.0, top_k=20, top_p=0.9)
    for scale in (0, 3):
        wanted = sample_tokens(logits, 2, top_k=20, top_p=0.9, seeds=SEEDS, scale=scale)
        assert torch.equal(draws.tokens(said, scale, 2), wanted)
    assert not torch.equal(draws.tokens(said, 0, 2), wanted)


def test_first_tokens_are_drawn_by_probability():
    # Chi-square over the 64 tokens of the first scale, expected counts below 20 joined; false alarms below 1e-7.
    model, count = small_var(), 20_000
    draws = PhiloxDraws(image_seeds(8, count))
    with recorded(model.head) as outputs:
        generate(model, 2, seeds=0, cfg=0)
    logits = outputs[0].expand(count, -1, -1)
    tokens = draws.tokens(Logits(logits, None, 0.0), 0, 1)
    wanted = outputs[0][0, 0].double().softmax(-1) * count
    counts = torch.bincount(tokens.flatten(), minlength=64).double()
    rare = wanted < 20
    observed = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([wanted[~rare], wanted[rare].sum().view(1)])
    freedom = len(expected) - 1
    chi2 = ((observed - expected).square() / expected).sum().item()
    assert freedom > 5 and abs(chi2 - freedom) < 5.5 * math.sqrt(2 * freedom) + 15


def test_smoothed_weights_equal_float64():
    logits = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0)) * 2
    said, seeds = Logits(logits, None, 0.0, top_k=20, top_p=0.9), torch.tensor([5, 6])
    weights = PhiloxDraws(seeds).smoothed(said, 3, sharpen=1.5, temperature=0.1)
    u = uniforms(seeds, 33, 9, 3, NOISE).transpose(1, 2).double()
    noise = -(-(u + 2.0**-25).log()).log()
    wanted = ((reference.filtered(logits.double(), 20, 0.9) * 1.5 + noise) / 0.1).softmax(-1)
    assert torch.allclose(weights.double(), wanted, atol=1e-4)


def test_gumbel_noise_is_finite_at_both_ends():
    noise = gumbel(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert noise.isfinite().all() and noise[0] < noise[1] < noise[2]
    assert noise[1].item() == pytest.approx(-math.log(math.log(2)), abs=1e-6)


def test_multinomial_candidates_are_independent_draws():
    # 20,000 rows of one distribution, 3 draws each: every pair agrees with probability sum p^2; 5.5 deviations.
    p = torch.tensor([0.5, 0.3, 0.2])
    draws = MultinomialDraws(torch.Generator().manual_seed(0), 1, torch.device("cpu"))
    tokens = draws.tokens(Logits(p.log().expand(1, 20_000, 3), None, 0.0), 0, 3)
    assert tokens.shape == (1, 3, 20_000)
    agree = p.square().sum().item()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        share = (tokens[0, a] == tokens[0, b]).double().mean().item()
        assert abs(share - agree) < 5.5 * math.sqrt(agree * (1 - agree) / 20_000)
