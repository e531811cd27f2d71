"""The Infinity family: what it recognises and refuses, and its sessions against float64 and the published way."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.families.looking import idle, lacking, session_of, without
from tests.helpers import relative_error
from tests.references.density_search import map_densities
from tests.standins.cases import CASES, LENGTHS, seeds_at
from tests.standins.models import NUM_BITS, SCHEDULE, small_infinity, texts
from varkern import BestOfM, DensitySearch, Scorer, ScorerConfig, UnsupportedModelError, generate, patch, patched
from varkern.families import recognise
from varkern.families.infinity import MODEL_ATTRIBUTES

KINDS = {name: CASES[f"Infinity{name}"] for name in ("", ", patchify", ", levels at every chunk")}
EVERY = pytest.mark.parametrize("case", KINDS.values(), ids=[name[2:] or "bits" for name in KINDS])


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


@pytest.mark.parametrize("name", MODEL_ATTRIBUTES)
def test_a_missing_attribute_is_named(name):
    model, _ = small_infinity()
    assert name in lacking(without(model, name), "Infinity")


def test_missing_parts_are_named():
    model, _ = small_infinity()
    model.unregistered_blocks[2] = torch.nn.Identity()
    assert lacking(model, "Infinity") == ["unregistered_blocks[2].sa.kv_caching"]
    model.unregistered_blocks = None
    assert lacking(model, "Infinity") == ["unregistered_blocks (as a list)"]


@pytest.mark.parametrize(
    "case, sides, channels, vocabulary",
    [
        ("Infinity", [(1, 1), (2, 2), (3, 2), (4, 3), (6, 4)], 5, None),
        ("Infinity, patchify", [(2, 2), (4, 4), (6, 4), (8, 6), (12, 8)], 5, None),
    ],
)
def test_its_sizes_are_the_requests(case, sides, channels, vocabulary):
    case = CASES[case]
    model = case.build()
    family = recognise(model)
    assert family.spec(model) is None
    for trunk in (1000, 3):
        spec = family.spec(model, family.request(case.arguments([0, 1]) | {"trunk_scale": trunk}))
        assert (spec.num_classes, spec.channels, spec.vocabulary) == (None, channels, vocabulary)
        assert (spec.sides, spec.size, spec.device) == (tuple(sides[:trunk]), sides[-1], torch.device("cpu"))


MAP = torch.zeros(2, 1, 1, 1, 5, dtype=torch.int64)
BAD = {
    "no schedule": (
        {"scale_schedule": None},
        r"scale_schedule must be a sequence with \(1, height, width\) .* got None",
    ),
    "no scales": ({"scale_schedule": []}, "scale_schedule must be .*"),
    "two frames": ({"scale_schedule": [(2, 1, 1)]}, "scale_schedule must be .*"),
    "sides": ({"scale_schedule": [1, 2, 3]}, "scale_schedule must be .*"),
    "no texts": ({"label_B_or_BLT": None}, r"label_B_or_BLT must be \(features, lengths, .* got NoneType"),
    "three texts": ({"label_B_or_BLT": texts((1, 2, 3))}, r"label_B_or_BLT must be of B=2 texts, got 3 and sums \[4\]"),
    "words": (
        {"label_B_or_BLT": ("a dog", 1, 2, 3)},
        "label_B_or_BLT must be .*, the first and third tensors, got str",
    ),
    "lost words": (
        {"label_B_or_BLT": (torch.zeros(4, 12), [2, 3], torch.tensor([0, 2, 5]), 3)},
        "label_B_or_BLT must have features of 5 words in all, got 4",
    ),
    "one negative text": ({"negative_label_B_or_BLT": texts((4,))}, "negative_label_B_or_BLT must be of B=2 texts"),
    "short cfg": ({"cfg_list": [3.0]}, "cfg_list must be a list with a number for each of 5 scales, got 1"),
    "cfg of two": ({"cfg_list": [torch.ones(2)] * 5}, r"cfg_list must hold finite numbers, got .*tensor\(\[1., 1."),
    "cfg by image": ({"cfg_list": [torch.ones(2, 1, 1)] * 5}, "cfg_list must hold finite numbers, got .*"),
    "tau by image of a doubled batch": (
        {"tau_list": [torch.ones(2, 1, 1)] * 5},
        r"tau_list must hold .* one per image, \[2, 1, 1\], only where there is no guidance on logits, got .*scale 0",
    ),
    "tau 0 in a tensor": ({"tau_list": [torch.tensor(0.0)] * 5}, r"tau_list must not contain 0, got .*"),
    "tau NaN in a tensor": ({"tau_list": [torch.tensor(math.nan)] * 5}, "tau_list must hold finite numbers, got .*"),
    "cfg a number": ({"cfg_list": 3}, "cfg_list must be a list with a number for each of 5 scales, got 3"),
    "cfg NaN": ({"cfg_list": [math.nan] * 5}, "cfg_list must hold finite numbers, got .*nan"),
    "short tau": ({"tau_list": []}, "tau_list must be a list with a number for each of 5 scales, got 0"),
    "tau 0": ({"tau_list": [1, 0, 1, 1, 1]}, r"tau_list must not contain 0, got \[1, 0, 1, 1, 1\]"),
    "layer 2": ({"cfg_insertion_layer": [2]}, r"cfg_insertion_layer must be a list of ints in -3..1, got \[2\]"),
    "layer -4": ({"cfg_insertion_layer": [0, -4]}, r"cfg_insertion_layer must be .* in -3..1, got \[0, -4\]"),
    "a layer": ({"cfg_insertion_layer": 0}, "cfg_insertion_layer must be a list of ints in -3..1, got 0"),
    "no vae": (
        {"vae": None},
        "vae must have .*, but it has no vae.quantizer.lfq and no vae.quantizer.z_interplote_up and no va",
    ),
    "indices of bits": ({"vae_type": 0}, "vae_type must not be 0, which asks for indices"),
    "no codes": ({"returns_vemb": 0}, "returns_vemb must be 1 where vae_type is not 0, got 0"),
    "trunk": ({"trunk_scale": 0}, "trunk_scale must be an int >= 1, got 0"),
    "leak": ({"gt_leak": 0.5}, "gt_leak must be an int, got 0.5"),
    "no maps": ({"gt_leak": 2}, "gt_ls_Bl must have a map for each of gt_leak=2 scales, got 0"),
    "one map": ({"gt_leak": 2, "gt_ls_Bl": [MAP]}, "gt_ls_Bl must have a map for each of gt_leak=2 scales, got 1"),
    "map": (
        {"gt_leak": 1, "gt_ls_Bl": [MAP[:1]]},
        r"gt_ls_Bl\[0\] must be integers of shape \[2, 1, 1, 1, 5\], got .*",
    ),
    "soft map": ({"gt_leak": 1, "gt_ls_Bl": [MAP.float()]}, r"gt_ls_Bl\[0\] must be integers .*, got torch.float32"),
    "batch": ({"B": -1}, r"batch size \(B\) must be an int >= 0, got -1"),
    "top_p": ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
    "seeds": ({"g_seed": torch.zeros(3).long()}, r"seed \(g_seed, seeds\) "),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_what_is_wrong_is_named_before_any_work(options, message, sampler):
    case = CASES["Infinity"]
    model = patch(case.build(), BestOfM(mean_feature, m=3), sampler=sampler)
    with idle(model), pytest.raises(ValueError, match=message):
        case.call(model, **({"seed": 0, "places": (0, 1)} | renamed(options)))


def renamed(options):
    return {"seed" if name == "g_seed" else name: value for name, value in options.items()}


def test_a_model_of_index_labels_is_refused():
    model, _ = small_infinity()
    model.use_bit_label = 0
    with idle(model), pytest.raises(UnsupportedModelError, match=r"use_bit_label=1 \(labels that are bits\)"):
        patch(model)


def test_a_scorer_of_classes_is_refused():
    case = CASES["Infinity"]
    scorer = Scorer(ScorerConfig(num_classes=7, num_scales=5, channels=5, size=6, widths=(8, 8)))
    model = patch(case.build(), BestOfM(scorer, m=2))
    with idle(model), pytest.raises(ValueError, match=r"scorer was made for num_classes=7, .* num_classes=None"):
        case.call(model, 0)


def test_generate_names_patch():
    model, _ = small_infinity()
    with (
        idle(model),
        pytest.raises(UnsupportedModelError, match=r"use varkern.patch\(model, search\) and call the model's auto"),
    ):
        generate(model, None, batch_size=2)


def random_maps(case, seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, (count, *shape), generator=generator).to(torch.uint8) for shape in case.shapes]


@EVERY
@pytest.mark.parametrize(
    "options",
    [{}, {"cfg_list": [1, 2.5, 1, 0.2, 3]}, {"cfg_insertion_layer": [-2, 0]}, {"cfg_list": [1] * 5}],
    ids=["logits", "by scale", "layer and logits", "none"],
)
def test_both_ways_of_a_session_agree(case, options):
    """Guided logits and images for given maps: the fused way against the published one."""
    model = case.build()
    ours, draws = session_of(model, "philox", case.arguments([0, 1]), **options)
    seen = []
    for scale, tokens in enumerate(random_maps(case, 0)):
        said = ours.logits(scale)
        seen.append(said.guided())
        ours.commit(scale, tokens, said, draws, hard=True)
    decoded = case.images(ours.decode())
    ours.close()
    published, draws = session_of(model, "multinomial", case.arguments([0, 1]), **options)
    for scale, tokens in enumerate(random_maps(case, 0)):
        said = published.logits(scale)
        assert said.uncond is None and relative_error(seen[scale], said.guided()) < 1e-4, f"scale {scale}"
        published.commit(scale, tokens, said, draws, hard=True)
    assert (decoded.int() - case.images(published.decode()).int()).abs().max() <= 1
    published.close()


@EVERY
def test_features_are_the_sum_of_all_codes_in_float64(case):
    model = case.build()
    session, draws = session_of(model, "philox", case.arguments([0, 1]))
    summed = 0.0
    maps, others = random_maps(case, 0), random_maps(case, 1)
    for scale, tokens in enumerate(maps):
        _, h, w = SCHEDULE[scale]

        def resized(tokens, h=case.patch * h, w=case.patch * w):
            codes = (2.0 * tokens.double() - 1) / math.sqrt(NUM_BITS)
            codes = codes.transpose(1, 2).reshape(2, NUM_BITS, h, w)
            return F.interpolate(codes, size=case.size[1:], mode="bilinear")

        candidates = torch.stack([others[scale], tokens], dim=1)
        fused = session.fuse(scale, candidates)
        assert relative_error(fused[:, 0], summed + resized(others[scale])) < 1e-5
        assert relative_error(fused[:, 1], summed + resized(tokens)) < 1e-5
        assert relative_error(session.fuse(scale, candidates[:, 1:]), fused[:, 1:]) < 1e-6
        assert torch.equal(session.fuse(scale, candidates), fused)  # and nothing was changed
        summed = summed + resized(tokens)
        session.commit(scale, tokens, session.logits(scale), draws, hard=True)
    session.close()


def test_a_patch_of_the_transformer_is_four_positions_of_the_vae():
    case = CASES["Infinity, patchify"]
    session, _ = session_of(case.build(), "philox", case.arguments([0, 1]))
    drawn = torch.randint(2, (2, 3, 6 * 4 * NUM_BITS * 4), generator=torch.Generator().manual_seed(0))
    wanted = F.pixel_shuffle(drawn.view(6, 6, 4, 4 * NUM_BITS).permute(0, 3, 1, 2), 2)  # [B * M, d, 12, 8]
    wanted = wanted.flatten(2).transpose(1, 2).reshape(2, 3, 96, NUM_BITS)
    maps = session.maps(4, drawn)
    assert maps.dtype == torch.uint8 and torch.equal(maps, wanted.to(torch.uint8))
    session.close()


@pytest.mark.parametrize("loop", ["fused", "own"])
@pytest.mark.parametrize("bandwidth", ["image", "batch"])
def test_density_is_judged_by_positions_of_the_transformer(bandwidth, loop):
    """As VAR-Scaling's code does it: one sample is the 4 * d bits that the transformer gives at one position."""
    case, seen = CASES["Infinity, patchify"], []

    class Seen(DensitySearch):
        def choose(self, candidates):
            seen.append((candidates.tokens, super().choose(candidates)))
            return seen[-1][1]

    search = Seen(9, scales=(2,), strategy="rank", min_distance=0, bandwidth=bandwidth)
    with patched(case.build(), search, loop=loop) as model:
        case.call(model, seeds_at([0, 1]), [0, 1])
    ((bits, choice),) = seen
    assert bits.shape == (2, 9, 4 * 6, NUM_BITS)  # candidates themselves stay maps of the VAE
    drawn = F.pixel_unshuffle(bits.view(18, 6, 4, NUM_BITS).permute(0, 3, 1, 2), 2)  # [B * M, 4 * d, 3, 2]
    codes = (2.0 * drawn.double().flatten(2).transpose(1, 2) - 1) / math.sqrt(NUM_BITS)
    wanted = map_densities(codes.reshape(2, 9, 6, 4 * NUM_BITS).numpy(), bandwidth=bandwidth)
    assert relative_error(choice.scores, torch.from_numpy(wanted)) < 1e-5
    by_vae = map_densities((2.0 * bits.double().numpy() - 1) / math.sqrt(NUM_BITS), bandwidth=bandwidth)
    assert relative_error(choice.scores, torch.from_numpy(by_vae)) > 1e-2


@EVERY
def test_given_maps_are_kept_and_left_alone_by_searches(case):
    model, searched = case.build(), []

    def scorer(text, features, scale):
        searched.append(scale)
        return features.mean((2, 3, 4))

    maps = case.published["three maps given"]["gt_ls_Bl"]
    given = {"gt_leak": 3, "gt_ls_Bl": maps}
    with patched(model, BestOfM(scorer, m=2, first_scale=0)):
        case.call(model, 0, **given)
    assert searched == [3, 4]
    with patched(model):
        other = case.images(case.call(model, 1, **given))
        whole = [case.images(case.call(model, seed, gt_leak=5, gt_ls_Bl=maps)) for seed in (0, 1)]
    assert torch.equal(*whole) and not torch.equal(other, whole[0])


def test_the_sampled_bits_follow_guidance_and_temperature():
    """Bits drawn at the last scale by the fused way, against the published probabilities in float64.

    The sum of (bit - p) over its deviation is about standard normal; 5.5 is passed by chance once in 2e7.
    """
    case = CASES["Infinity"]
    model, told = case.build(), []
    model.head.register_forward_hook(lambda _, __, logits: told.append(logits.double()))
    places = [0] * 40

    class Keeping(BestOfM):
        def choose(self, candidates):
            tokens.append(candidates.tokens.double())
            return super().choose(candidates)

    tokens = []
    with patched(model, Keeping(mean_feature, m=25, first_scale=0, last_scale=1)):
        case.call(model, 1, places, cfg_list=[2.5] * 5, tau_list=[1.6] * 5, top_k=0, top_p=0.0)
    for logits, bits in zip(told, tokens, strict=False):
        guided = (2.5 * logits[:40] - 1.5 * logits[40:]) / 1.6
        p = guided.unflatten(2, (NUM_BITS, 2)).softmax(-1)[..., 1].unsqueeze(1)  # [B, 1, l, d]
        z = (bits - p).sum() / (p * (1 - p) * 25).sum().sqrt()
        assert abs(z) < 5.5
        assert (bits.mean((0, 1)) - p.mean((0, 1))).abs().max() < 5.5 * 0.5 / math.sqrt(1000)


def test_a_scorer_of_the_decoded_image():
    """README's example, with the mean of the red channel in place of a reward model."""
    case = CASES["Infinity"]
    model, rewards = case.build(), []
    vae, prompts = case.vae, ["a red bird"] * 5

    def reward_model(images, owners):
        assert images.shape == (40, 3, 12, 8) and len(owners) == 40 and 0 <= images.min() and images.max() <= 1
        rewards.append(images[:, 0].mean((1, 2)))
        return rewards[-1]

    def reward(text, features, scale):
        candidates = features.shape[1]
        images = vae.decode(features.flatten(0, 1)).add(1).div(2)  # [B * M, 3, H, W], RGB in [0, 1]
        owners = [prompt for prompt in prompts for _ in range(candidates)]
        return reward_model(images, owners).view(-1, candidates)

    with patched(model):
        plain = case.images(case.call(model, 0))
    with patched(model, BestOfM(reward, m=8, first_scale=4)):
        best = case.images(case.call(model, 0))
    red, plain_red = (images[..., 2].double().mean((1, 2)) for images in (best, plain))  # the last of BGR
    assert len(rewards) == 1
    assert (red - rewards[0].view(5, 8).amax(1) * 255).abs().max() <= 1  # uint8 cuts off
    assert (plain_red - rewards[0].view(5, 8)[:, 0] * 255).abs().max() <= 1
    assert (red > plain_red + 1).sum() >= 3


def test_a_text_is_the_same_in_any_company():
    case = CASES["Infinity"]
    heard = []

    def scorer(text, features, scale):
        heard.append(text)
        return features.mean((2, 3, 4))

    with patched(case.build(), BestOfM(scorer, m=2, last_scale=1)) as model:
        case.call(model, seeds_at([4, 1]), [4, 1])
    features, lengths, sums, longest = heard[0]
    assert len(heard) == 1 and lengths == [LENGTHS[4], LENGTHS[1]] and longest == 5
    assert sums.tolist() == [0, 4, 9] and torch.equal(features, texts(lengths)[0])


def test_where_the_blocks_are_looked_for_changes_nothing():
    case = CASES["Infinity"]
    with patched(case.build(), sampler="multinomial") as model:
        wanted = case.images(case.call(model, 0))
        assert torch.equal(case.images(case.call(model, 0, inference_mode=False)), wanted)
        with torch.inference_mode():
            assert torch.equal(case.images(case.call(model, 0)), wanted)


def test_levels_are_added_as_the_model_adds_them():
    model, _ = small_infinity()
    x = torch.randn(2, 6, 32)
    wanted = model.add_lvl_embeding(x.clone(), 2, SCHEDULE)
    assert torch.equal(x.add(model.lvl_embed.weight[2]), wanted)
