"""The VAR family: what it recognises, and one session's logits, features and running sum against a float64 form."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import (
    NUM_CLASSES,
    TINY_SIDES,
    caches_closed,
    on,
    recorded,
    relative_error,
    small_vae,
    small_var,
    ten_scale_var,
)
from tests.references import var as reference
from tests.references import vqvae
from varkern.draws import MultinomialDraws, PhiloxDraws
from varkern.errors import UnsupportedModelError
from varkern.families import recognise
from varkern.families.var import MODEL_ATTRIBUTES, QUANTIZER_ATTRIBUTES, VARFamily
from varkern.models import VAR, VQVAE
from varkern.ops import image_seeds, use_backend
from varkern.spec import Request

LABELS = torch.tensor([3, 0])


def stub(**changes):
    """An object of no class of ours, with all that a VAR model has."""
    model = small_var()
    quantizer = SimpleNamespace(**{name: getattr(model.vae_quant_proxy[0], name) for name in QUANTIZER_ATTRIBUTES})
    vae = SimpleNamespace(fhat_to_img=model.vae_proxy[0].fhat_to_img)
    parts = {name: getattr(model, name) for name in MODEL_ATTRIBUTES}
    return SimpleNamespace(**(parts | {"vae_proxy": (vae,), "vae_quant_proxy": (quantizer,)} | changes))


def lacks(model):
    """The error for an unsupported model, as far as it is about VAR, which is told first."""
    with pytest.raises(UnsupportedModelError) as caught:
        recognise(model)
    return str(caught.value).split("; ")[0]


def test_models_are_recognised_by_structure():
    class Fork(VAR):
        pass

    fork = small_var()
    fork.__class__ = Fork
    for model in (small_var(), fork, stub()):
        assert recognise(model).name == "VAR"


@pytest.mark.parametrize("name", MODEL_ATTRIBUTES)
def test_a_missing_attribute_is_named(name):
    model = stub()
    delattr(model, name)
    assert lacks(model).startswith(f"SimpleNamespace fits no family of models: VAR needs {name}")


@pytest.mark.parametrize("name", QUANTIZER_ATTRIBUTES)
def test_a_missing_attribute_of_the_quantizer_is_named(name):
    model = stub()
    delattr(model.vae_quant_proxy[0], name)
    assert lacks(model).endswith(f"VAR needs vae_quant_proxy[0].{name}")


def test_other_missing_parts_are_named():
    assert lacks(stub(vae_proxy=(SimpleNamespace(),))).endswith("VAR needs vae_proxy[0].fhat_to_img")
    assert lacks(stub(blocks=[SimpleNamespace()])).endswith("VAR needs blocks[0].attn.kv_caching")
    assert lacks(stub(vae_quant_proxy=())).endswith("VAR needs vae_quant_proxy[0]")
    assert lacks(stub(vae_proxy=None)).endswith("VAR needs vae_proxy[0]")
    assert "VAR needs blocks" in lacks(stub(blocks=3)) and "VAR needs blocks" in lacks(stub(blocks=None))


@pytest.mark.parametrize("sharing", [0, 1, 3], ids=["a layer a scale", "one layer", "three layers"])
def test_a_phi_layer_without_its_blend_is_named(sharing):
    model = small_var(vae=small_vae(share_quant_resi=sharing))
    layers = [module for module in model.vae_quant_proxy[0].modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(layers) == (sharing or 5) and recognise(model).name == "VAR"
    for layer in layers:
        del layer.resi_ratio
    assert re.search(r"VAR needs vae_quant_proxy\[0\]\.quant_resi\S*resi_ratio$", lacks(model))


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), VAR, "d16", None], ids=["module", "class", "name", "None"])
def test_other_things_are_unsupported(thing):
    text = lacks(thing)
    assert re.match(rf"{type(thing).__name__} fits no family of models: (Flex)?VAR needs", text)
    assert "pos_1LC" in text and "blocks" in text and len(text) < 360  # three lines


def test_spec():
    spec = recognise(small_var()).spec(small_var())
    assert spec.device == torch.device("cpu") and VARFamily().spec(small_var().to("meta")).device.type == "meta"
    assert (spec.num_classes, spec.sides, spec.size, spec.channels, spec.vocabulary) == (7, TINY_SIDES, (6, 6), 8, 64)


def draws_named(name):
    return PhiloxDraws(image_seeds(0, 2)) if name == "philox" else MultinomialDraws(None, 2, torch.device("cpu"))


def session_of(model, draws, **options):
    return recognise(model).open(model, LABELS, Request(2, LABELS, None, options=options), draws)


def random_maps(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.V, (2, side * side), generator=generator) for side in model.patch_nums]


@pytest.mark.parametrize("build", [small_var, ten_scale_var], ids=["5 scales", "10 scales"])
@pytest.mark.parametrize("draws", ["philox", "multinomial"])
def test_a_session_equals_float64(build, draws):
    """Logits, guidance, every candidate's features, the running sum and the image, for given token maps."""
    model, draws = build(), draws_named(draws)
    weights, vae_weights = vqvae.weights_of(model), vqvae.weights_of(model.vae_proxy[0])
    maps, others = random_maps(model), random_maps(model, 1)
    wanted = reference.generate(
        weights, vae_weights, LABELS, model.patch_nums, model.num_heads, lambda k, _: maps[k], cfg=2.0
    )
    session, before = session_of(model, draws, cfg=2.0), 0.0
    assert torch.equal(session.codebook, model.vae_quant_proxy[0].embedding.weight)
    for k, tokens in enumerate(maps):
        logits = session.logits(k)
        assert relative_error(logits.cond, wanted.cond[k]) < 1e-4
        assert relative_error(logits.uncond, wanted.uncond[k]) < 1e-4
        strength = 2.0 * k / (len(maps) - 1)
        assert logits.guidance == pytest.approx(strength)
        assert relative_error(logits.guided(), (1 + strength) * wanted.cond[k] - strength * wanted.uncond[k]) < 1e-4
        fused = session.fuse(k, torch.stack([others[k], tokens], dim=1))
        codes = vae_weights["quantize.embedding.weight"][others[k]]
        assert relative_error(fused[:, 0], before + vqvae.fused(vae_weights, codes, k, model.patch_nums)) < 1e-4
        assert relative_error(fused[:, 1], wanted.f_hats[k]) < 1e-4
        session.commit(k, tokens, logits, draws, hard=True)
        assert session.f_hat.dtype == torch.float32
        assert relative_error(session.f_hat, wanted.f_hats[k]) < 1e-5
        before = wanted.f_hats[k]
    assert relative_error(session.decode(), wanted.images) < 1e-4
    session.close()
    assert caches_closed(model)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_features_in_other_precisions_and_formats(dtype, bound):
    model, draws = small_var(), draws_named("philox")
    session = session_of(model, draws)
    session.commit(0, random_maps(model)[0], session.logits(0), draws, hard=True)
    tokens = torch.stack(random_maps(model, 1)[1:2] * 3, dim=1)
    plain, other = session.fuse(1, tokens), session.fuse(1, tokens, dtype, channels_last=True)
    session.close()
    assert other.dtype == dtype and other.shape == plain.shape == (2, 3, 8, 6, 6)
    assert other.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(other, plain) < bound


@pytest.mark.parametrize(
    "draws, cfg, rows",
    [("philox", 0, 2), ("philox", 1.5, 4), ("philox", torch.zeros(2, 1, 1), 4), ("multinomial", 0, 4)],
    ids=["philox, off", "philox, on", "philox, tensor", "multinomial, off"],
)
def test_without_guidance_half_the_batch_is_saved(draws, cfg, rows):
    model = small_var()
    with recorded(model.blocks[0]) as outputs:
        session = session_of(model, draws_named(draws), cfg=cfg)
        session.logits(0)
        session.close()
    assert outputs[0].shape[0] == rows


def test_without_guidance_the_logits_are_the_guided_runs_cond():
    model = small_var()
    plain, guided = session_of(model, draws_named("philox"), cfg=0), None
    logits = plain.logits(0).cond
    plain.close()
    guided = session_of(model, draws_named("philox"), cfg=1.5)
    assert relative_error(logits, guided.logits(0).cond) < 1e-5
    guided.close()


def test_smoothed_codes_stay_out_of_a_searched_scale():
    model, draws = small_var(), draws_named("philox")
    sums = {}
    for hard in (False, True):
        session = session_of(model, draws, more_smooth=True)
        session.commit(0, torch.zeros(2, 1, dtype=torch.int64), session.logits(0), draws, hard)
        sums[hard] = session.f_hat
        session.close()
    plain = session_of(model, draws)
    plain.commit(0, torch.zeros(2, 1, dtype=torch.int64), plain.logits(0), draws, hard=False)
    plain.close()
    assert torch.equal(sums[True], plain.f_hat)
    assert not torch.allclose(sums[False], plain.f_hat, atol=1e-2)


def test_identity_phi_layers():
    model = small_var(vae=None)
    vae = VQVAE(64, 8, 8, ch_mult=(1, 2), norm_groups=4, quant_resi=0.0, v_patch_nums=TINY_SIDES)
    model.vae_proxy, model.vae_quant_proxy = (vae,), (vae.quantize,)
    tokens, sums = random_maps(model), []
    for name in ("philox", "multinomial"):
        draws = draws_named(name)
        session = session_of(model, draws)
        for k in range(len(tokens)):
            session.commit(k, tokens[k], session.logits(k), draws, hard=True)
        sums.append(session.f_hat)
        session.close()
    assert relative_error(*sums) < 1e-6


def test_the_generator_is_reseeded_as_published():
    model = small_var()
    family = recognise(model)
    assert family.generator(model, None) is None
    generator = family.generator(model, 5)
    assert generator is model.rng and generator.initial_seed() == 5


def test_kernels_give_the_running_sum_of_the_published_chain(device):
    """The fused ops through Triton's interpreter, or on the GPU if there is one, at every scale."""
    model = on(small_var(), device)
    maps = [tokens.to(device) for tokens in random_maps(model)]
    family, sums = recognise(model), {"philox": [], "multinomial": []}
    for name, collected in sums.items():
        draws = PhiloxDraws(image_seeds(0, 2, device)) if name == "philox" else MultinomialDraws(None, 2, device)
        session = family.open(model, LABELS.to(device), Request(2, LABELS, None), draws)
        for k, tokens in enumerate(maps):
            logits = session.logits(k)
            with use_backend("triton"):
                session.commit(k, tokens, logits, draws, hard=True)
            collected.append(session.f_hat.clone())
        session.close()
    for k, (fused, chain) in enumerate(zip(*sums.values(), strict=True)):
        assert relative_error(fused, chain) < 1e-5, f"scale {k}"


def test_no_class_is_the_last_row():
    model = small_var()
    with recorded(model.class_emb) as embedded:
        session_of(model, draws_named("multinomial")).close()
    assert torch.equal(embedded[0][2:], model.class_emb.weight[NUM_CLASSES].expand(2, -1))
