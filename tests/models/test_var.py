"""The VAR transformer against a float64 form without cache, and the behaviour of its published method."""

import inspect

import pytest
import torch

from tests.helpers import (
    NUM_CLASSES,
    TINY_SIDES,
    caches_closed,
    recorded,
    relative_error,
    small_vae,
    small_var,
    ten_scale_var,
)
from tests.references import var as reference
from tests.references.vqvae import weights_of
from varkern.models import PATCH_NUMS_256, PATCH_NUMS_512, VAR

MODELS = {
    "5 scales": lambda: small_var(),
    "5 scales, shared AdaLN": lambda: small_var(shared_aln=True),
    "5 scales, plain attention": lambda: small_var(attn_l2_norm=False),
    "10 scales": lambda: ten_scale_var(),
    "10 scales, shared AdaLN": lambda: ten_scale_var(shared_aln=True),
}
LABELS = torch.tensor([3, 0])


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param()


def in_float64(model, labels, cfg, seed, top_k=0, top_p=0.0, more_smooth=False):
    """The published method in float64, drawing from a generator in the state that ``seed`` gives it."""
    generator = torch.Generator().manual_seed(seed)
    last = len(model.patch_nums) - 1

    def sample(scale, guided):
        probabilities = reference.filtered(guided, top_k, top_p).softmax(-1).float()  # drawn in float32, as published
        return torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(guided.shape[:2])

    def smooth(scale, guided):
        ratio = scale / last
        masked = reference.filtered(guided, top_k, top_p)
        noise = -torch.empty(guided.shape).exponential_(generator=generator).log().double()
        return ((masked * (1 + ratio) + noise) / max(0.27 * (1 - 0.95 * ratio), 0.005)).softmax(-1)

    return reference.generate(
        weights_of(model),
        weights_of(model.vae_proxy[0]),
        labels,
        model.patch_nums,
        model.num_heads,
        sample,
        cfg,
        smooth if more_smooth else None,
    )


@pytest.mark.parametrize("cfg, top_k, top_p", [(1.5, 50, 0.9), (0.0, 0, 0.0)], ids=["guided", "unguided"])
def test_generation_equals_float64(model, cfg, top_k, top_p):
    wanted = in_float64(model, LABELS, cfg, 5, top_k, top_p)
    with recorded(model.head) as logits, recorded(model.vae_quant_proxy[0].embedding) as codes:
        images = model.autoregressive_infer_cfg(2, LABELS, 5, cfg, top_k, top_p)
    assert len(logits) == len(model.patch_nums)
    for k, (both, cond, uncond) in enumerate(zip(logits, wanted.cond, wanted.uncond, strict=True)):
        assert cond.std() >= 2 and uncond.std() >= 2
        assert relative_error(both[:2], cond) < 1e-4, f"cond, scale {k}"
        assert relative_error(both[2:], uncond) < 1e-4, f"uncond, scale {k}"
    codebook = model.vae_quant_proxy[0].embedding.weight
    for tokens, drawn in zip(wanted.tokens, codes, strict=True):
        assert torch.equal(codebook[tokens], drawn)
    assert ((wanted.images > 0) & (wanted.images < 1)).double().mean() > 0.8
    assert relative_error(images, wanted.images) < 1e-4


def test_smoothed_generation_equals_float64():
    model = small_var()
    wanted = in_float64(model, LABELS, 1.5, 2, top_k=40, top_p=0.9, more_smooth=True)
    images = model.autoregressive_infer_cfg(2, LABELS, 2, 1.5, 40, 0.9, more_smooth=True)
    # A nearly hard softmax (temperature down to 0.0135) magnifies the rounding of logits some hundred times.
    assert relative_error(images, wanted.images) < 1e-2
    plain = in_float64(model, LABELS, 1.5, 2, top_k=40, top_p=0.9)
    assert relative_error(plain.images, wanted.images) > 0.05


def test_training_forward_equals_cached_generation(model):
    wanted = in_float64(model, LABELS, 1.5, 8)
    inputs = model.vae_quant_proxy[0].idxBl_to_var_input(wanted.tokens)
    forced = model(LABELS, inputs)
    assert forced.dtype == torch.float32
    assert relative_error(forced, torch.cat(wanted.cond, dim=1)) < 1e-4
    unconditional = model(torch.full_like(LABELS, NUM_CLASSES), inputs)
    assert relative_error(unconditional, torch.cat(wanted.uncond, dim=1)) < 1e-4


def test_training_drops_the_class():
    model = small_var(cond_drop_rate=1.0)
    inputs = torch.zeros(2, model.L - 1, model.Cvae)
    no_class = model(torch.full_like(LABELS, NUM_CLASSES), inputs)
    assert not torch.allclose(model(LABELS, inputs), no_class, atol=1e-3)
    assert torch.allclose(model.train()(LABELS, inputs), no_class, atol=1e-5)


def test_training_gradients_reach_every_parameter():
    model = small_var(shared_aln=True).requires_grad_(True)
    model(LABELS, torch.randn(2, model.L - 1, model.Cvae)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # In the head whose scale is above the clamp at log 100 the scale gets no gradient; in other heads it does.
    assert without == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision_stays_near_float32(dtype, how):
    model, half = small_var(), small_var()
    inputs = model.vae_quant_proxy[0].idxBl_to_var_input([torch.zeros(2, s * s, dtype=torch.int64) for s in TINY_SIDES])
    if how == "weights":
        half.to(dtype), half.vae_proxy[0].to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        logits = half(LABELS, inputs)
        images = half.autoregressive_infer_cfg(2, LABELS, 0)
    assert logits.dtype == torch.float32
    error = (logits - model(LABELS, inputs)).square().mean().sqrt() / logits.std()
    assert 0 < error < 30 * torch.finfo(dtype).eps
    assert images.shape == (2, 3, 12, 12) and images.isfinite().all() and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("label_B, wanted", [(4, 4), (-1, NUM_CLASSES), (NUM_CLASSES, NUM_CLASSES)], ids=str)
def test_int_labels(label_B, wanted):
    model = small_var()
    images = model.autoregressive_infer_cfg(2, label_B, 3)
    assert torch.equal(images, model.autoregressive_infer_cfg(2, torch.full((2,), wanted), 3))


def test_labels_are_drawn_first_and_from_the_generator():
    model = small_var()
    with recorded(model.class_emb) as embedded:
        images = model.autoregressive_infer_cfg(64, None, 3)
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(torch.full((NUM_CLASSES,), 1 / NUM_CLASSES), 64, replacement=True, generator=generator)
    assert torch.equal(embedded[0][:64], model.class_emb.weight[labels])
    assert torch.equal(embedded[0][64:], model.class_emb.weight[NUM_CLASSES].expand(64, -1))
    assert images.shape == (64, 3, 12, 12)


def test_seed_none_is_the_default_generator():
    model = small_var()
    torch.manual_seed(4)
    first, second = (model.autoregressive_infer_cfg(2, LABELS) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS), first)
    assert not torch.equal(first, second)


def test_caches_close_after_use_and_after_an_exception():
    model = small_var()
    before = model.autoregressive_infer_cfg(2, LABELS, 0)
    assert caches_closed(model)
    handle = model.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model.autoregressive_infer_cfg(2, LABELS, 0)
    handle.remove()
    assert caches_closed(model)
    assert torch.equal(model.autoregressive_infer_cfg(2, LABELS, 0), before)


def test_one_scale_needs_no_ramp():
    images = small_var((4,)).autoregressive_infer_cfg(2, LABELS, 0)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def test_the_method_has_the_published_signature():
    parameters = inspect.signature(VAR.autoregressive_infer_cfg).parameters
    assert list(parameters) == ["self", "B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth"]
    assert [p.default for p in parameters.values()][3:] == [None, 1.5, 0, 0.0, False]


def test_the_constructor_follows_depth_and_names_a_wrong_width():
    model = VAR(small_var().vae_proxy[0], depth=2, patch_nums=TINY_SIDES)
    assert (model.C, model.num_heads, model.num_classes) == (128, 2, 1000)
    with pytest.raises(ValueError, match=r"embed_dim must be a multiple of num_heads=3, got 32"):
        small_var(num_heads=3)


def test_the_schedule_must_be_the_vaes():
    for sides in ((1, 2, 3, 4), (1, 2, 3, 5, 6)):
        with pytest.raises(ValueError, match=r"patch_nums must be .*\(1, 2, 3, 4, 6\), got \(1, 2, 3, (4|5, 6)\)"):
            VAR(small_vae(), NUM_CLASSES, depth=2, embed_dim=32, patch_nums=sides)


def test_fresh_weights_are_finite_and_nearly_uniform():
    vae = small_var().vae_proxy[0]
    model = VAR(vae, NUM_CLASSES, depth=2, patch_nums=TINY_SIDES).eval()
    assert all(p.isfinite().all() for p in model.parameters())
    logits = model(LABELS, torch.randn(2, model.L - 1, model.Cvae))
    assert 0 < logits.std() < 0.1


def test_published_schedules():
    assert sum(s * s for s in PATCH_NUMS_256) == 680 and PATCH_NUMS_256[-1] == 16
    assert len(PATCH_NUMS_512) == 10 and PATCH_NUMS_512[-1] == 32
