"""What the scorer is trained on equals the quantizer's partial sums, and what a search shows the scorer."""

import pytest
import torch
from torch.nn import functional as F

import varkern
from tests.helpers import relative_error, small_vae, small_var
from tests.references import vqvae as reference
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern.models import PATCH_NUMS_256
from varkern.training.features import FeatureMaker

SCHEDULES = [(1, 2, 4), (1, 2, 3, 4, 6), PATCH_NUMS_256]


def tokens_for(sides, count=3, vocabulary=64):
    length = sum(side * side for side in sides)
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def partial_sums(vae, tokens, sides):
    """e_k of every scale in float64, by the tests' own form of the VQ-VAE."""
    weights, total, sums = reference.weights_of(vae), 0.0, []
    for scale, ids in enumerate(tokens.split([side * side for side in sides], dim=1)):
        total = total + reference.fused(weights, weights["quantize.embedding.weight"][ids], scale, sides)
        sums.append(total)
    return torch.stack(sums, dim=1)


@pytest.mark.parametrize("sides", SCHEDULES, ids=str)
@pytest.mark.parametrize("first_scale", [0, 1, 2])
def test_fused_features_are_the_partial_sums(sides, first_scale):
    vae, tokens = small_vae(sides), tokens_for(sides)
    found = FeatureMaker.of_quantizer(vae.quantize)(tokens, first_scale)
    assert found.dtype == torch.float32 and found.shape == (3, len(sides) - first_scale, 8, sides[-1], sides[-1])
    assert relative_error(found, partial_sums(vae, tokens, sides)[:, first_scale:]) < 1e-6


def test_fused_features_are_the_quantizers_own():
    sides = (1, 2, 3, 4, 6)
    vae, tokens = small_vae(sides), tokens_for(sides)
    ids = tokens.split([side * side for side in sides], dim=1)
    codes = [vae.quantize.codes(scale_ids, scale) for scale, scale_ids in enumerate(ids)]
    wanted = torch.stack(vae.quantize.embed_to_fhat(codes), dim=1)
    assert relative_error(FeatureMaker.of_quantizer(vae.quantize)(tokens), wanted) < 1e-6


def test_no_phi():
    vae = small_vae((1, 2, 4), quant_resi=0.0)
    tokens = tokens_for((1, 2, 4))
    maker = FeatureMaker.of_quantizer(vae.quantize)
    assert maker.phis == [None] * 3
    ids = tokens.split([1, 4, 16], dim=1)
    codes = [vae.quantize.codes(scale_ids, scale) for scale, scale_ids in enumerate(ids)]
    assert relative_error(maker(tokens), torch.stack(vae.quantize.embed_to_fhat(codes), dim=1)) < 1e-6


@pytest.mark.parametrize("first_scale", [0, 1])
def test_own_features_are_a_scales_normalised_codes_resized(first_scale):
    sides = (1, 2, 4)
    codebook, tokens = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), tokens_for(sides)
    found = FeatureMaker.of_codebook(codebook, sides)(tokens, first_scale)
    codes = codebook.double() / codebook.double().square().sum(1, keepdim=True).sqrt()
    wanted = []
    for side, ids in zip(sides, tokens.split([1, 4, 16], dim=1), strict=True):
        x = codes[ids].transpose(1, 2).reshape(3, 8, side, side)
        wanted.append(reference.resized(x, reference.bicubic_matrix(side, 4)))
    assert relative_error(found, torch.stack(wanted, dim=1)[:, first_scale:]) < 1e-6


@pytest.mark.parametrize("kind", ["fused", "own"])
def test_no_tokens(kind):
    vae = small_vae((1, 2, 4))
    maker = FeatureMaker.of_quantizer(vae.quantize)
    maker = maker if kind == "fused" else FeatureMaker.of_codebook(maker.codebook, (1, 2, 4))
    assert maker(torch.zeros(0, 21, dtype=torch.int64)).shape == (0, 3, 8, 4, 4)


def test_no_gradient_is_kept():
    maker = FeatureMaker.of_quantizer(small_vae((1, 2, 4)).requires_grad_(True).quantize)
    assert not maker(tokens_for((1, 2, 4))).requires_grad


def test_fingerprint():
    makers = [FeatureMaker.of_quantizer(small_vae((1, 2, 4), seed=seed).quantize) for seed in (0, 0, 1)]
    makers.append(FeatureMaker.of_codebook(makers[0].codebook, (1, 2, 4)))
    changed = small_vae((1, 2, 4))
    changed.quantize.phi(2).bias[0] += 0.25
    makers.append(FeatureMaker.of_quantizer(changed.quantize))
    prints = [maker.fingerprint() for maker in makers]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_unknown_features():
    with pytest.raises(ValueError, match="features must be one of 'fused', 'own', got 'all'"):
        FeatureMaker(F.normalize(torch.ones(4, 2)), [None], (1,), "all")


def test_to_keeps_all():
    maker = FeatureMaker.of_quantizer(small_vae((1, 2, 4)).quantize)
    moved = maker.to(torch.device("cpu"))
    assert moved.fingerprint() == maker.fingerprint()
    assert torch.equal(moved(tokens_for((1, 2, 4))), maker(tokens_for((1, 2, 4))))


class TestWhatASearchShows:
    """A scorer sees in training, of the tokens that were kept, what the search showed it when it kept them."""

    def shown(self, model, sides, **options):
        """Features ``[B, K, C, H, W]`` of the kept candidates, and their tokens ``[B, L]``."""
        seen = []

        def scorer(labels, features, scale):
            seen.append(features)
            return features.flatten(2).sum(-1)

        search = varkern.BestOfM(scorer, 2, first_scale=0)
        found = varkern.generate(model, [0, 3, 5], search=search, seeds=4, cfg=1.0, **options)
        assert len(seen) == len(sides)
        kept = [features[torch.arange(3), i] for features, i in zip(seen, found.choices, strict=True)]
        return torch.stack(kept, dim=1), torch.cat(found.tokens, dim=1)

    def test_var(self):
        model = small_var()
        wanted, tokens = self.shown(model, model.patch_nums)
        assert relative_error(FeatureMaker.of_quantizer(model.vae_quant_proxy[0])(tokens), wanted) < 1e-6

    def test_flexvar(self):
        model, vae = small_flexvar()
        wanted, tokens = self.shown(model, FLEX_SIDES, vqvae=vae, infer_patch_nums=FLEX_SIDES)
        maker = FeatureMaker.of_codebook(vae.quantize.embedding.weight, FLEX_SIDES)
        assert relative_error(maker(tokens), wanted) < 1e-6
