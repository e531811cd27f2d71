"""The FlexVAR family: what it recognises and refuses, and its session against float64 and the published way."""

import pytest
import torch
from torch.nn import functional as F

from tests.families.looking import idle, lacking, session_of, without
from tests.helpers import relative_error, small_var
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern import BestOfM, Scorer, ScorerConfig, generate, image_seeds, patch, patched
from varkern.families import recognise
from varkern.families.flexvar import MODEL_ATTRIBUTES

LABELS = torch.tensor([3, 0])


def call(model, vae, **options):
    given = {"vqvae": vae, "B": 2, "label_B": LABELS, "infer_patch_nums": FLEX_SIDES, "g_seed": 0} | options
    return model.autoregressive_infer_cfg(**given)


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


@pytest.mark.parametrize("name", MODEL_ATTRIBUTES)
def test_a_missing_attribute_is_named(name):
    model, _ = small_flexvar()
    assert name in lacking(without(model, name), "FlexVAR")


def test_var_is_not_taken_for_it():
    model = small_var()
    del model.vae_proxy
    assert lacking(model, "FlexVAR") == ["pos_1LC of shape [1, C, h, w]"]
    model, _ = small_flexvar()
    del model.blocks[1].attn
    assert lacking(model, "FlexVAR") == ["blocks[1].attn.kv_caching"]


def test_its_sizes_are_the_requests():
    model, vae = small_flexvar()
    family = recognise(model)
    assert family.spec(model) is None
    for sides in ([1, 2, 5], (1, 3, 17), torch.tensor([1, 2, 5]).tolist()):
        request = family.request({"vqvae": vae, "B": 2, "label_B": None, "infer_patch_nums": sides})
        spec = family.spec(model, request)
        assert (spec.num_classes, spec.sides, spec.size) == (7, tuple(sides), (sides[-1],) * 2)
        assert (spec.channels, spec.vocabulary, spec.device) == (32, 64, torch.device("cpu"))


BAD = {
    "more_smooth": ({"more_smooth": True}, "more_smooth must be False for a FlexVAR model"),
    "no sides": ({"infer_patch_nums": ()}, r"infer_patch_nums must be a sequence of sides >= 1, got \(\)"),
    "side 0": ({"infer_patch_nums": (1, 0)}, r"infer_patch_nums must be .*, got \(1, 0\)"),
    "sides a number": ({"infer_patch_nums": 16}, "infer_patch_nums must be .*, got 16"),
    "a first side of 2": (
        {"infer_patch_nums": (2, 3)},
        "infer_patch_nums must begin with a side of 1 tokens, .* got 2",
    ),
    "no vqvae": ({"vqvae": None}, "vqvae must have decode_code and quantize.embedding, got NoneType"),
    "other vqvae": ({"vqvae": small_flexvar(60)[1]}, "vqvae must have the model's 64 codes of width 32, got 60 of 32"),
    "cfg": ({"cfg": torch.zeros(3)}, r"cfg must be a finite number or .*, got shape \[3\]"),
    "max_pn": ({"max_pn": "16"}, "max_pn must be a number, got '16'"),
    "invalid id": ({"invalid_ids": [64]}, r"invalid_ids must be token ids in 0..63, or a mask of shape \[64\]"),
    "invalid mask": ({"invalid_ids": torch.zeros(3, dtype=torch.bool)}, "invalid_ids must be .*, got torch.bool"),
    "invalid words": ({"invalid_ids": "none"}, "invalid_ids must be token ids or a mask of the vocabulary, got 'none'"),
    "invalid floats": ({"invalid_ids": torch.ones(2)}, "invalid_ids must be .*, got torch.float32"),
    "label": ({"label_B": torch.tensor([1, 9])}, r"label \(label_B, labels\) must be in 0..7, got 1..9"),
    "batch": ({"B": -1}, r"batch size \(B\) must be an int >= 0, got -1"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_what_is_wrong_is_named_before_any_work(options, message, sampler):
    model, vae = small_flexvar()
    patch(model, BestOfM(mean_feature, m=3), sampler=sampler)
    with idle(model), pytest.raises(ValueError, match=message):
        call(model, vae, **options)


def test_a_search_is_held_to_the_requests_sizes():
    model, vae = small_flexvar()
    scorer = Scorer(ScorerConfig(num_classes=7, num_scales=5, channels=32, size=6, widths=(8, 8)))
    patch(model, BestOfM(scorer, m=2))  # nothing to hold it to yet
    assert call(model, vae).shape == (2, 3, 12, 12)
    with (
        idle(model),
        pytest.raises(ValueError, match="scorer was made for num_scales=5, but the model has num_scales=3"),
    ):
        call(model, vae, infer_patch_nums=(1, 2, 6))
    with idle(model), pytest.raises(ValueError, match="scorer was made for size=6, but the model has size=5"):
        call(model, vae, infer_patch_nums=(1, 2, 3, 4, 5))
    patch(model, BestOfM(mean_feature, first_scale=4, m=2))
    assert call(model, vae).shape == (2, 3, 12, 12)
    with idle(model), pytest.raises(ValueError, match="first_scale must be < 3"):
        call(model, vae, infer_patch_nums=(1, 2, 6))
    with pytest.raises(ValueError, match="scorer's classes, got 7, which means 'no class'"):
        call(patch(model, BestOfM(scorer)), vae, label_B=-1)


def random_maps(seed, sides=FLEX_SIDES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (2, side * side), generator=generator) for side in sides]


SESSIONS = {
    "ramped": {"cfg": 2.0},
    "balanced": {"cfg": 3.0, "used_llamagen_cfg": True},
    "by image": {"cfg": torch.tensor([0.5, 3.0]).view(2, 1, 1)},
    "balanced by image": {"cfg": torch.tensor([0.5, 3.0]).view(2, 1, 1), "used_llamagen_cfg": True},
    "forbidden ids": {"invalid_ids": [0, 5, -1]},
    "forbidden mask": {"invalid_ids": torch.arange(64) > 40},
    "all beyond": {"max_pn": 0, "cfg": 2.5},
    "off": {"cfg": 0},
    "balanced off": {"cfg": 1, "used_llamagen_cfg": True},
}


@pytest.mark.parametrize("options", SESSIONS.values(), ids=SESSIONS)
def test_both_ways_of_a_session_agree(options):
    """Guided logits and images for given maps: the fused way against the published one, in float64."""
    model, vae = small_flexvar()
    double, double_vae = (module.double() for module in small_flexvar())
    given = {"B": 2, "label_B": LABELS, "infer_patch_nums": FLEX_SIDES}
    if isinstance(options.get("cfg"), torch.Tensor):
        doubled = options | {"cfg": options["cfg"].double()}
    else:
        doubled = options
    ours, draws = session_of(model, "philox", {"vqvae": vae} | given, **options)
    published, other_draws = session_of(double, "multinomial", {"vqvae": double_vae} | given, **doubled)
    for scale, tokens in enumerate(random_maps(0)):
        said, wanted = ours.logits(scale), published.logits(scale)
        assert relative_error(said.guided(), wanted.guided()) < 1e-4, f"scale {scale}"
        assert (said.top_k, said.free) == (wanted.top_k, wanted.free)
        ours.commit(scale, tokens, said, draws, hard=True)
        published.commit(scale, tokens, wanted, other_draws, hard=True)
    assert relative_error(ours.decode(), published.decode()) < 1e-5
    ours.close(), published.close()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_features_are_the_maps_own_codes_at_the_last_side(dtype, bound):
    model, vae = small_flexvar()
    given = {"vqvae": vae, "B": 2, "label_B": LABELS, "infer_patch_nums": FLEX_SIDES}
    session, draws = session_of(model, "philox", given)
    for scale, side in enumerate(FLEX_SIDES):
        maps, others = random_maps(0)[scale], random_maps(1)[scale]
        features = session.fuse(scale, torch.stack([others, maps], dim=1), dtype)
        codes = vae.quantize.embedding.weight.double()
        codes = (codes / codes.square().sum(-1, keepdim=True).sqrt())[maps].transpose(1, 2).reshape(2, 32, side, side)
        wanted = F.interpolate(codes, size=(6, 6), mode="bicubic")
        assert features.dtype == dtype and relative_error(features[:, 1], wanted) < bound
        session.commit(scale, maps, session.logits(scale), draws, hard=True)  # and nothing is summed
    session.close()


def test_greedy_scales_are_left_alone_by_searches():
    model, vae = small_flexvar()
    searched = []

    def scorer(labels, features, scale):
        searched.append(scale)
        return features.mean((2, 3, 4))

    patch(model, BestOfM(scorer, m=3, first_scale=0))
    call(model, vae, infer_patch_nums=(1, 2, 7, 4, 9), max_pn=4)
    assert searched == [0, 1, 3]  # not a side of 7, which is unknown, nor one of 9, beyond max_pn
    told = generate(model, LABELS, seeds=0, vqvae=vae, infer_patch_nums=(1, 2, 7), search=BestOfM(scorer, m=3))
    assert [None if s is None else s.shape for s in told.scores] == [None, (2, 3), None]


def test_a_forbidden_id_is_not_drawn():
    model, vae = small_flexvar()
    for ids in (torch.arange(32), [*range(32)], torch.arange(64) < 32):
        told = generate(model, LABELS, seeds=0, cfg=0, vqvae=vae, infer_patch_nums=FLEX_SIDES, invalid_ids=ids)
        assert min(tokens.min() for tokens in told.tokens) >= 32


def test_where_the_published_method_fails():
    model, vae = small_flexvar()
    for options, error in (
        ({"label_B": 3}, AttributeError),
        ({"infer_patch_nums": (1,)}, ZeroDivisionError),
        ({"more_smooth": True}, AssertionError),
    ):
        with pytest.raises(error):
            call(model, vae, **options)
        for block in model.blocks:
            block.attn.kv_caching(False)
    with patched(model, sampler="multinomial"):
        by_number = call(model, vae, label_B=3)
        assert torch.equal(by_number, call(model, vae, label_B=torch.tensor([3, 3])))
        assert call(model, vae, label_B=-1).shape == by_number.shape
        assert call(model, vae, infer_patch_nums=(1,)).shape == (2, 3, 2, 2)


def test_generate_equals_the_patched_method():
    model, vae = small_flexvar()
    search, options = (
        BestOfM(mean_feature, m=3),
        {"cfg": 2.5, "top_k": 30, "top_p": 0.9, "infer_patch_nums": FLEX_SIDES},
    )
    told = generate(model, LABELS, seeds=6, vqvae=vae, search=search, **options)
    with patched(model, search):
        images = call(model, vae, g_seed=6, **options)
    assert torch.equal(told.images, ((images + 1) / 2).clamp(0, 1)) and images.min() < -1
    assert [tuple(tokens.shape) for tokens in told.tokens] == [(2, side * side) for side in FLEX_SIDES]
    assert torch.equal(
        generate(model, LABELS, seeds=image_seeds(6, 2), vqvae=vae, search=search, **options).images, told.images
    )
    with idle(model), pytest.raises(ValueError, match="a FlexVAR model has no option 'colour'"):
        generate(model, LABELS, vqvae=vae, infer_patch_nums=FLEX_SIDES, colour=3)
    with idle(model), pytest.raises(ValueError, match="infer_patch_nums must be a sequence"):
        generate(model, LABELS, vqvae=vae)


def test_without_guidance_half_the_batch_is_saved():
    model, vae = small_flexvar()
    rows = []
    model.head.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    patch(model)
    for options in ({"cfg": 0}, {"cfg": 1, "used_llamagen_cfg": True}, {"cfg": 1}):
        rows.clear()
        call(model, vae, **options)
        assert set(rows) == ({4} if options == {"cfg": 1} else {2})
