"""The convolutional autoencoder and the VQ-VAE's public methods against a float64 form."""

import pytest
import torch

from tests.helpers import TINY_SIDES, relative_error, small_vae
from tests.references import vqvae as reference
from varkern.models import VQVAE

SHAPES = {
    "2 resolutions": {},
    "3 resolutions, 1 block": {"ch_mult": (1, 1, 2), "num_res_blocks": 1},
    "5 resolutions, as published": {"ch_mult": (1, 1, 2, 2, 4)},
    "grey, 1x1 quant_conv": {"in_channels": 1, "quant_conv_ks": 1},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def vae(request):
    return small_vae(**request.param)


def images_for(vae, batch=2, latent=6):
    side = latent * vae.downsample
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, vae.config["in_channels"], side, side, generator=generator) * 2 - 1


def test_encoder_equals_float64(vae):
    images = images_for(vae)
    wanted = reference.encode(reference.weights_of(vae), images.double())
    assert wanted.shape == (2, 8, 6, 6)
    assert relative_error(vae.encode(images), wanted) < 1e-4


def test_decoder_equals_float64(vae):
    f_hat = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))
    wanted = reference.decode(reference.weights_of(vae), f_hat.double())
    assert (wanted.abs() < 1).double().mean() > 0.9
    assert relative_error(vae.fhat_to_img(f_hat), wanted.clamp(-1, 1)) < 1e-4


def test_images_are_clamped():
    vae = small_vae()
    vae.decoder.conv_out.weight.mul_(10)
    f_hat = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))
    wanted = reference.decode(reference.weights_of(vae), f_hat.double())
    assert wanted.min() < -1.5 and wanted.max() > 1.5
    assert relative_error(vae.fhat_to_img(f_hat), wanted.clamp(-1, 1)) < 1e-4


def test_other_sizes_than_the_schedules():
    vae = small_vae()
    f_hat = torch.randn(1, 8, 5, 3, generator=torch.Generator().manual_seed(2))
    wanted = reference.decode(reference.weights_of(vae), f_hat.double()).clamp(-1, 1)
    assert relative_error(vae.fhat_to_img(f_hat), wanted) < 1e-4


def test_images_to_tokens_and_back():
    vae = small_vae()
    weights, images = reference.weights_of(vae), images_for(vae)
    ids, sums = reference.quantized(weights, reference.encode(weights, images.double()), TINY_SIDES)
    actual = vae.img_to_idxBl(images)
    assert all(torch.equal(a, b) for a, b in zip(actual, ids, strict=True))
    pictures = [reference.decode(weights, f_hat).clamp(-1, 1) for f_hat in sums]
    for made in (vae.idxBl_to_img(actual), vae.img_to_reconstructed_img(images)):
        assert max(relative_error(a, b) for a, b in zip(made, pictures, strict=True)) < 1e-4
    for made in (vae.idxBl_to_img(actual, last_one=True), vae.img_to_reconstructed_img(images, last_one=True)):
        assert relative_error(made, pictures[-1]) < 1e-4


def test_training_forward():
    vae = small_vae(test_mode=False)
    assert vae.training and all(p.requires_grad for p in vae.parameters())
    images = images_for(vae)
    rebuilt, ids, loss = vae(images)
    weights = reference.weights_of(vae)
    wanted, sums = reference.quantized(weights, reference.encode(weights, images.double()), TINY_SIDES)
    assert all(torch.equal(a, b) for a, b in zip(ids, wanted, strict=True))
    assert relative_error(rebuilt, reference.decode(weights, sums[-1])) < 1e-4
    (rebuilt.sub(images).square().mean() + loss).backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_starts_without_gradients_in_evaluation_mode():
    vae = small_vae()
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


def test_bfloat16_weights():
    vae, half = small_vae(), small_vae().bfloat16()
    f_hat = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))
    images = half.fhat_to_img(f_hat)
    assert images.dtype == torch.bfloat16
    assert (images - vae.fhat_to_img(f_hat)).square().mean().sqrt() < 0.05


def test_no_images():
    vae = small_vae()
    assert vae.fhat_to_img(torch.zeros(0, 8, 6, 6)).shape == (0, 3, 12, 12)
    assert [x.shape for x in vae.img_to_idxBl(torch.zeros(0, 3, 12, 12))] == [(0, s * s) for s in TINY_SIDES]


def test_usage_statistics_of_another_schedule_are_left_out():
    vae, other = small_vae(), small_vae((1, 3, 6), seed=5)
    own, state = vae.quantize.ema_vocab_hit_SV.clone(), other.state_dict()
    vae.load_state_dict(state, strict=True)
    assert torch.equal(vae.quantize.ema_vocab_hit_SV, own)
    assert state["quantize.ema_vocab_hit_SV"].shape == (3, 64)  # the caller's dictionary is as it was
    assert torch.equal(vae.decoder.conv_in.weight, other.decoder.conv_in.weight)


def test_config_rebuilds_the_model():
    vae = small_vae(ch_mult=(1, 1, 2), num_res_blocks=1, in_channels=1, share_quant_resi=1)
    twin = VQVAE(**vae.config)
    twin.load_state_dict(vae.state_dict(), strict=True)
    images = images_for(vae)
    assert torch.equal(twin.encode(images), vae.encode(images))


def test_a_width_that_the_groups_do_not_divide():
    with pytest.raises(ValueError, match="channels must be a multiple of norm_groups=32, got 8"):
        VQVAE(ch=8)
