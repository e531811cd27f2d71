"""The residual quantizer against a float64 form whose resizing is written out as matrices."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import TINY_SIDES, randomise, relative_error, small_vae
from tests.references import vqvae as reference
from varkern.models import PATCH_NUMS_256
from varkern.models.quantizer import VectorQuantizer

SCHEDULES = {"5 scales": TINY_SIDES, "10 scales": PATCH_NUMS_256}


@pytest.fixture(scope="module", params=SCHEDULES.values(), ids=SCHEDULES)
def vae(request):
    return small_vae(request.param)


def random_ids(vae, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vae.vocab_size, (batch, s * s), generator=generator) for s in vae.quantize.v_patch_nums]


def partial_sums(vae, ids):
    weights, f_hat, sums = reference.weights_of(vae), 0.0, []
    for k, tokens in enumerate(ids):
        codes = weights["quantize.embedding.weight"][tokens]
        f_hat = f_hat + reference.fused(weights, codes, k, vae.quantize.v_patch_nums)
        sums.append(f_hat)
    return sums


def test_the_reference_resizes_as_pytorch_does():
    # The written-out matrices against F.interpolate in float64, at the schedule's odd ratios.
    for side in PATCH_NUMS_256[:-1]:
        small, large = torch.randn(1, 2, side, side).double(), torch.randn(1, 2, 16, 16).double()
        up = reference.resized(small, reference.bicubic_matrix(side, 16))
        assert torch.allclose(up, F.interpolate(small, size=(16, 16), mode="bicubic"), atol=1e-12)
        assert torch.allclose(reference.pooled(large, side), F.interpolate(large, size=(side, side), mode="area"))


def test_partial_sums_of_tokens(vae):
    ids = random_ids(vae)
    codes = [vae.quantize.codes(tokens, k) for k, tokens in enumerate(ids)]
    wanted = partial_sums(vae, ids)
    sums = vae.quantize.embed_to_fhat(codes)
    for k, (actual, truth) in enumerate(zip(sums, wanted, strict=True)):
        assert relative_error(actual, truth) < 1e-5, f"scale {k}"
    assert torch.equal(vae.quantize.embed_to_fhat(codes, last_one=True), sums[-1])


def test_next_input_adds_in_place_and_pools(vae):
    sides, ids = vae.quantize.v_patch_nums, random_ids(vae)
    f_hat = torch.zeros(2, vae.Cvae, sides[-1], sides[-1])
    for k, truth in enumerate(partial_sums(vae, ids)):
        out, pooled = vae.quantize.get_next_autoregressive_input(k, len(sides), f_hat, vae.quantize.codes(ids[k], k))
        assert out is f_hat and relative_error(f_hat, truth) < 1e-5
        if k == len(sides) - 1:
            assert pooled is f_hat
        else:
            assert relative_error(pooled, reference.pooled(truth, sides[k + 1])) < 1e-5


def test_teacher_forcing_input(vae):
    sides, ids = vae.quantize.v_patch_nums, random_ids(vae)
    sums = partial_sums(vae, ids)
    wanted = [reference.pooled(f, s).flatten(2).transpose(1, 2) for f, s in zip(sums, sides[1:], strict=False)]
    assert relative_error(vae.quantize.idxBl_to_var_input(ids), torch.cat(wanted, dim=1)) < 1e-5


def test_features_to_ids_and_sums(vae):
    weights, sides = reference.weights_of(vae), vae.quantize.v_patch_nums
    features = torch.randn(2, vae.Cvae, sides[-1], sides[-1], generator=torch.Generator().manual_seed(1))
    before = features.clone()
    ids, sums = reference.quantized(weights, features.double(), sides)
    actual_ids = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False)
    assert all(torch.equal(a, b) for a, b in zip(actual_ids, ids, strict=True))
    assert all(a.dtype == torch.int64 for a in actual_ids)
    for actual, truth in zip(vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=True), sums, strict=True):
        assert relative_error(actual, truth) < 1e-5
    assert torch.equal(features, before)


def test_another_schedule_may_be_given():
    vae, sides = small_vae(), (2, 3, 6)
    features = torch.randn(1, 8, 6, 6)
    ids, _ = reference.quantized(reference.weights_of(vae), features.double(), sides)
    actual = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False, v_patch_nums=sides)
    assert all(torch.equal(a, b) for a, b in zip(actual, ids, strict=True))
    with pytest.raises(ValueError, match=r"v_patch_nums must be the latent's side \(6, 6\), got 5"):
        vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False, v_patch_nums=(1, 5))


def test_the_training_loss_and_its_gradients():
    vae = small_vae()
    quantizer, beta = vae.quantize.requires_grad_(True), 0.25
    features = torch.randn(2, 8, 6, 6, requires_grad=True)
    out, ids, loss = quantizer(features)
    truth_ids, sums = reference.quantized(reference.weights_of(vae), features.detach().double(), TINY_SIDES)
    assert all(torch.equal(a, b) for a, b in zip(ids, truth_ids, strict=True))
    errors = torch.stack([(s - features.detach().double()).square().mean() for s in sums])
    assert torch.isclose(loss.double(), (1 + beta) * errors.mean(), rtol=1e-5)
    assert relative_error(out, sums[-1]) < 1e-5
    (gradient,) = torch.autograd.grad(out.sum(), features, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(features))  # straight through
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    commitment = sum(2 * beta * (features.detach().double() - s) / features.numel() for s in sums) / len(sums)
    assert relative_error(gradient, commitment) < 1e-4
    loss.backward()
    assert quantizer.embedding.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in quantizer.quant_resi.parameters())


def test_phi_layers_of_the_published_schedule():
    quantizer = VectorQuantizer(8, 4, PATCH_NUMS_256)
    layers = list(quantizer.quant_resi.qresi_ls)
    assert [layers.index(quantizer.phi(k)) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "share, keys", [(0, "quant_resi.{}."), (1, "quant_resi.qresi."), (2, "quant_resi.qresi_ls.{}.")]
)
def test_sharing_of_phi_layers(share, keys):
    quantizer = VectorQuantizer(8, 4, TINY_SIDES, share_quant_resi=share)
    count = {0: 5, 1: 1, 2: 2}[share]
    wanted = {keys.format(i) + leaf for i in range(count) for leaf in ("weight", "bias")}
    assert {k for k in quantizer.state_dict() if "quant_resi" in k} == wanted
    used = [id(quantizer.phi(k)) for k in range(5)]
    assert len(set(used)) == count
    assert share != 2 or used[0] == used[1] != used[3] == used[4]


def test_no_phi_at_blend_zero():
    quantizer = VectorQuantizer(8, 4, TINY_SIDES, quant_resi=0)
    codes = torch.randn(1, 4, 6, 6)
    assert torch.equal(quantizer.fused(codes, 4, (6, 6)), codes)
    assert not [k for k in quantizer.state_dict() if "quant_resi" in k]


def test_cosine_distance_ignores_length():
    torch.manual_seed(0)
    quantizer = randomise(VectorQuantizer(16, 4, (1, 2), using_znorm=True), 0)
    vectors = torch.randn(10, 4)
    wanted = (F.normalize(vectors.double()) @ F.normalize(quantizer.embedding.weight.double()).T).argmax(-1)
    assert torch.equal(quantizer.nearest(vectors), wanted)
    assert torch.equal(quantizer.nearest(vectors * 100), wanted)


def test_sums_at_each_scales_own_size_are_refused():
    with pytest.raises(ValueError, match="all_to_max_scale must be True"):
        small_vae().quantize.embed_to_fhat([torch.zeros(1, 8, 1, 1)], all_to_max_scale=False)
