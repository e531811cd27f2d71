"""The loop's promises: an image is its own seed's, candidates nest, seeds mean what they say, nothing is lost."""

import math

import pytest
import torch

from tests.helpers import NUM_CLASSES, TINY_SIDES, caches_closed, idle, recorded, relative_error, small_var
from tests.references import var as reference
from varkern import BestOfM, generate, image_seeds, patched
from varkern.draws import MultinomialDraws, PhiloxDraws
from varkern.ops import sample_tokens
from varkern.ops.philox import LABELS as LABEL_STREAM
from varkern.ops.philox import NOISE, PICKS, uniforms
from varkern.search import Choice
from varkern.spec import Logits, Request

LABELS = torch.tensor([3, 0, 5, 5, 2])
SEEDS = torch.tensor([11, -4, 2**62, 11, 0])


class Recording:
    """Draws M candidates at every scale, keeps the first, and remembers all it was offered."""

    def __init__(self, m):
        self.m, self.offered = m, []

    def check(self, spec): ...

    def check_labels(self, labels, spec): ...

    def num_candidates(self, scale, num_scales):
        return self.m

    def choose(self, candidates):
        self.offered.append(candidates)
        index = torch.zeros(candidates.tokens.shape[0], dtype=torch.int64)
        return Choice(index, candidates.uniforms())


def mean_feature(labels, features, scale):
    return (features * torch.arange(features.shape[2]).view(-1, 1, 1)).mean((2, 3, 4)) * 10


SEARCHES = {
    "none": None,
    "best": BestOfM(mean_feature, m=5),
    "resample from the first": BestOfM(mean_feature, m=3, first_scale=0, pick="resample"),
    "two best": BestOfM(mean_feature, m=4, pick=2, maps_at_once=3),
}
OPTIONS = {
    "plain": {"cfg": 0},
    "guided, filtered": {"cfg": 2.0, "top_k": 30, "top_p": 0.9},
    "smooth": {"cfg": 1.5, "more_smooth": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_an_image_depends_on_its_own_seed_alone(search, options):
    model = small_var()
    whole = generate(model, LABELS, seeds=SEEDS, search=search, **options)
    for places in ([4, 1], [2], [0, 0, 3, 2, 1, 4, 4]):
        part = generate(model, LABELS[places], seeds=SEEDS[places], search=search, **options)
        for scale, (tokens, all_tokens) in enumerate(zip(part.tokens, whole.tokens, strict=True)):
            assert torch.equal(tokens, all_tokens[places]), f"places {places}, scale {scale}"
        assert torch.allclose(part.images, whole.images[places], atol=1e-4)
    assert len({tuple(tokens) for tokens in whole.tokens[-1].tolist()}) == 5


def test_drawn_labels_depend_on_the_images_seed_alone():
    model = small_var()
    seeds = image_seeds(3, 40)
    with recorded(model.class_emb) as embedded:
        generate(model, None, seeds=seeds, cfg=0)
        generate(model, None, seeds=seeds[7:9], cfg=0)
    assert torch.equal(embedded[0][7:9], embedded[1])
    wanted = (uniforms(seeds, 1, 1, 0, LABEL_STREAM)[:, 0, 0].double() * NUM_CLASSES).floor().long()
    assert torch.equal(embedded[0], model.class_emb.weight[wanted])
    assert wanted.unique().numel() == NUM_CLASSES


def test_drawn_labels_are_even():
    labels = PhiloxDraws(image_seeds(1, 70_000)).labels(NUM_CLASSES)
    # Chi-square with 6 degrees of freedom: 45 is passed by chance once in 2e7.
    counts = torch.bincount(labels, minlength=NUM_CLASSES).double()
    assert ((counts - 10_000).square() / 10_000).sum() < 45


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_candidates_nest(options):
    model = small_var()
    searches = {m: Recording(m) for m in (2, 4, 8)}
    for search in searches.values():
        generate(model, LABELS, seeds=SEEDS, search=search, **{**options, "more_smooth": False})
    single = generate(model, LABELS, seeds=SEEDS, **{**options, "more_smooth": False})
    for scale, tokens in enumerate(single.tokens):
        eight = searches[8].offered[scale].tokens
        assert torch.equal(eight[:, 0], tokens)
        for m in (2, 4):
            assert torch.equal(searches[m].offered[scale].tokens, eight[:, :m])
        if scale > 1:
            assert not torch.equal(eight[:, 0], eight[:, 1])


def test_what_a_search_is_offered():
    model = small_var()
    search = Recording(3)
    generate(model, LABELS, seeds=SEEDS, search=search)
    assert [c.scale for c in search.offered] == list(range(5))
    for candidates in search.offered:
        assert torch.equal(candidates.labels, LABELS)
        assert candidates.tokens.shape == (5, 3, TINY_SIDES[candidates.scale] ** 2)
        assert torch.equal(candidates.uniforms(), uniforms(SEEDS, 3, 1, candidates.scale, PICKS)[:, :, 0])


def test_a_search_may_ask_for_any_part_of_the_features():
    model = small_var()
    parts = []

    class Asking(Recording):
        def choose(self, candidates):
            whole = candidates.fuse(0, 4)
            parts.append(torch.cat([candidates.fuse(0, 1), candidates.fuse(1, 4)], dim=1) - whole)
            assert whole.shape == (5, 4, 8, 6, 6) and whole.dtype == torch.float32
            assert candidates.fuse(2, 3, torch.bfloat16, channels_last=True).dtype == torch.bfloat16
            return super().choose(candidates)

    plain = generate(model, LABELS, seeds=SEEDS)
    asked = generate(model, LABELS, seeds=SEEDS, search=Asking(4))
    assert torch.equal(asked.images, plain.images)  # fusing changes nothing
    assert max(part.abs().max() for part in parts) < 1e-5


def test_an_integer_seed_is_a_row_of_image_seeds():
    model = small_var()
    by_number = generate(model, LABELS, seeds=9)
    by_tensor = generate(model, LABELS, seeds=image_seeds(9, 5))
    assert torch.equal(by_number.images, by_tensor.images)
    other = generate(model, LABELS, seeds=10)
    assert not any(torch.equal(a, b) for a in by_number.images for b in other.images)


def test_no_seed_follows_pytorchs_default_generator():
    model = small_var()
    torch.manual_seed(5)
    first, second = generate(model, LABELS).images, generate(model, LABELS).images
    torch.manual_seed(5)
    assert torch.equal(generate(model, LABELS).images, first)
    assert not torch.equal(first, second)


def test_a_seed_leaves_the_default_generator_alone():
    model = small_var()
    state = torch.get_rng_state()
    generate(model, None, seeds=3, batch_size=2, more_smooth=True, search=SEARCHES["two best"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
@pytest.mark.parametrize("search", [None, SEARCHES["best"], SEARCHES["two best"]], ids=["none", "best", "two best"])
@pytest.mark.parametrize("label", [LABELS, 4, -1, None], ids=["tensor", "int", "no class", "drawn"])
def test_generate_equals_the_patched_method(sampler, search, label):
    model = small_var()
    options = {"cfg": 2.0, "top_k": 30, "top_p": 0.9}
    told = generate(model, label, seeds=6, batch_size=5, search=search, sampler=sampler, **options)
    with patched(model, search, sampler=sampler):
        images = model.autoregressive_infer_cfg(5, label, 6, **options)
        # A patched model's own search stays out of generate.
        again = generate(model, label, seeds=6, batch_size=5, search=search, sampler=sampler, **options)
    assert torch.equal(told.images, images) and torch.equal(again.images, images)
    assert "autoregressive_infer_cfg" not in vars(model)


def test_generate_with_multinomial_equals_the_published_method():
    model = small_var()
    told = generate(model, LABELS, seeds=6, sampler="multinomial", top_k=20)
    assert torch.equal(told.images, model.autoregressive_infer_cfg(5, LABELS, 6, top_k=20))


def test_what_generate_tells():
    model = small_var()
    search = BestOfM(mean_feature, m=(1, 3, 1, 2, 4))
    told = generate(model, LABELS.tolist(), seeds=2, search=search)
    assert told.images.shape == (5, 3, 12, 12) and 0 <= told.images.min() and told.images.max() <= 1
    assert [t.shape for t in told.tokens] == [(5, s * s) for s in TINY_SIDES]
    assert all(t.dtype == torch.int64 for t in told.tokens)
    assert [None if s is None else tuple(s.shape) for s in told.scores] == [None, (5, 3), None, (5, 2), (5, 4)]
    assert [None if c is None else tuple(c.shape) for c in told.choices] == [None, (5,), None, (5,), (5,)]
    assert len(told.seconds) == 6 and all(s > 0 for s in told.seconds)
    rebuilt = model.vae_proxy[0].idxBl_to_img(told.tokens, last_one=True)
    assert relative_error(told.images, (rebuilt + 1) / 2) < 1e-4


def test_kept_tokens_are_the_chosen_candidates():
    model = small_var()
    offered = []

    class Last(Recording):
        def choose(self, candidates):
            offered.append(candidates.tokens)
            index = torch.tensor([0, 1, 2, 1, 0])
            return Choice(index, torch.zeros(5, 3))

    told = generate(model, LABELS, seeds=2, search=Last(3))
    for kept, tokens, choice in zip(told.tokens, offered, told.choices, strict=True):
        assert torch.equal(kept, tokens[torch.arange(5), choice])


@pytest.mark.parametrize("filters", [(0, 0.0), (20, 0.0), (0, 0.8), (30, 0.9)], ids=str)
def test_one_candidate_has_the_models_own_distribution(filters):
    """Under the model's filtered probabilities, computed here in float64, the drawn tokens have no surprise.

    The sum over tokens of -log p, less its mean, over its deviation is about standard normal for 300 images: 5.5
    is passed by chance once in 2e7, over five scales once in 5e6.
    """
    model, count = small_var(), 300
    with recorded(model.head) as outputs:
        told = generate(model, torch.arange(count) % NUM_CLASSES, seeds=1, cfg=1.5, top_k=filters[0], top_p=filters[1])
    for scale, (both, tokens) in enumerate(zip(outputs, told.tokens, strict=True)):
        strength = 1.5 * scale / 4
        guided = (1 + strength) * both[:count].double() - strength * both[count:].double()
        p = reference.filtered(guided, *filters).softmax(-1)
        surprise = -torch.where(p > 0, p, 1.0).log()
        drawn = p.gather(2, tokens.unsqueeze(2)).squeeze(2)
        assert (drawn > 0).all(), f"scale {scale}: a token that the filter drops"
        mean = (p * surprise).sum(-1)
        variance = (p * surprise.square()).sum(-1) - mean.square()
        z = ((-drawn.log() - mean).sum() / variance.sum().sqrt()).item()
        assert abs(z) < 5.5, f"scale {scale}: {z}"


def test_first_tokens_are_drawn_by_probability():
    # Chi-square over the 64 tokens of the first scale, expected counts below 20 joined; false alarms below 1e-7.
    model, count = small_var(), 20_000
    draws = PhiloxDraws(image_seeds(8, count))
    with recorded(model.head) as outputs:
        generate(model, 2, seeds=0, cfg=0)
    logits = outputs[0].expand(count, -1, -1)
    tokens = draws.tokens(Logits(logits, None, 0.0), Request(count, None), 0, 1)
    wanted = outputs[0][0, 0].double().softmax(-1) * count
    counts = torch.bincount(tokens.flatten(), minlength=64).double()
    rare = wanted < 20
    observed = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([wanted[~rare], wanted[rare].sum().view(1)])
    freedom = len(expected) - 1
    chi2 = ((observed - expected).square() / expected).sum().item()
    assert freedom > 5 and abs(chi2 - freedom) < 5.5 * math.sqrt(2 * freedom) + 15


def test_tokens_are_drawn_at_the_address_of_their_scale():
    logits = torch.randn(5, 9, 64, generator=torch.Generator().manual_seed(0))
    draws, request = PhiloxDraws(SEEDS), Request(5, None, top_k=20, top_p=0.9)
    for scale in (0, 3):
        wanted = sample_tokens(logits, 2, top_k=20, top_p=0.9, seeds=SEEDS, scale=scale)
        assert torch.equal(draws.tokens(Logits(logits, None, 0.0), request, scale, 2), wanted)
    assert not torch.equal(draws.tokens(Logits(logits, None, 0.0), request, 0, 2), wanted)


def test_smoothed_weights_equal_float64():
    logits = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0)) * 2
    request, seeds = Request(2, None, top_k=20, top_p=0.9), torch.tensor([5, 6])
    weights = PhiloxDraws(seeds).smoothed(Logits(logits, None, 0.0), request, 3, sharpen=1.5, temperature=0.1)
    u = uniforms(seeds, 33, 9, 3, NOISE).transpose(1, 2).double()
    noise = -(-(u + 2.0**-25).log()).log()
    wanted = ((reference.filtered(logits.double(), 20, 0.9) * 1.5 + noise) / 0.1).softmax(-1)
    assert torch.allclose(weights.double(), wanted, atol=1e-4)


def test_gumbel_noise_is_finite_at_both_ends():
    from varkern.draws import gumbel

    noise = gumbel(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert noise.isfinite().all() and noise[0] < noise[1] < noise[2]
    assert noise[1].item() == pytest.approx(-math.log(math.log(2)), abs=1e-6)


def test_multinomial_candidates_are_independent_draws():
    # 20,000 rows of one distribution, 3 draws each: every pair agrees with probability sum p^2; 5.5 deviations.
    p = torch.tensor([0.5, 0.3, 0.2])
    draws = MultinomialDraws(torch.Generator().manual_seed(0), 1, torch.device("cpu"))
    tokens = draws.tokens(Logits(p.log().expand(1, 20_000, 3), None, 0.0), Request(1, None), 0, 3)
    assert tokens.shape == (1, 3, 20_000)
    agree = p.square().sum().item()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        share = (tokens[0, a] == tokens[0, b]).double().mean().item()
        assert abs(share - agree) < 5.5 * math.sqrt(agree * (1 - agree) / 20_000)


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_no_images(sampler):
    model = small_var()
    for search in (None, SEARCHES["best"], SEARCHES["two best"]):
        told = generate(model, torch.zeros(0, dtype=torch.int64), seeds=0, search=search, sampler=sampler)
        assert told.images.shape == (0, 3, 12, 12)
        assert [t.shape for t in told.tokens] == [(0, s * s) for s in TINY_SIDES]


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([[3, 0], [1, 2]])[:, 0], torch.tensor([3, 1]).int(), torch.tensor([3, 1], dtype=torch.uint8)],
)
def test_any_integer_labels(labels):
    model = small_var()
    wanted = generate(model, [3, 1], seeds=0).images
    assert torch.equal(generate(model, labels, seeds=0).images, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("search", [None, SEARCHES["two best"]], ids=["none", "search"])
def test_half_precision(dtype, search):
    model = small_var()
    with torch.autocast("cpu", dtype):
        told = generate(model, LABELS, seeds=0, search=search)
    assert told.images.isfinite().all()
    weights = small_var()
    weights.vae_proxy[0].to(dtype), weights.to(dtype)
    assert generate(weights, LABELS, seeds=0, search=search).images.isfinite().all()


def test_guidance_by_image():
    model = small_var()
    both = generate(model, LABELS[:2], seeds=SEEDS[:2], cfg=torch.tensor([0.5, 4.0]).view(2, 1, 1))
    for i, cfg in enumerate((0.5, 4.0)):
        alone = generate(model, LABELS[i : i + 1], seeds=SEEDS[i : i + 1], cfg=cfg)
        assert torch.allclose(both.images[i], alone.images[0], atol=1e-4)
    same = generate(model, LABELS[:2], seeds=SEEDS[:2], cfg=torch.tensor(4.0))
    assert torch.equal(same.tokens[-1], generate(model, LABELS[:2], seeds=SEEDS[:2], cfg=4.0).tokens[-1])


def test_one_scale():
    model = small_var((4,))
    told = generate(model, LABELS, seeds=0, search=BestOfM(mean_feature, m=3, first_scale=0))
    assert told.images.shape == (5, 3, 8, 8)


def test_gradients_are_not_kept():
    model = small_var().requires_grad_(True)
    assert not generate(model, LABELS, seeds=0, search=SEARCHES["best"]).images.requires_grad


@pytest.mark.parametrize(
    "labels, options, error, message",
    [
        (LABELS, {"seeds": SEEDS[:2]}, ValueError, r"labels, seeds and batch_size must agree .* got \[2, 5\]"),
        (LABELS, {"batch_size": 3}, ValueError, r"labels, seeds and batch_size must agree .* got \[3, 5\]"),
        (None, {}, ValueError, r"batch_size must be given when labels is None and seeds is no tensor"),
        (LABELS, {"colour": 1}, ValueError, r"a VAR model has no option 'colour': it takes cfg, more_smooth"),
        (LABELS, {"sampler": "sobol"}, ValueError, r"sampler must be one of 'philox', 'multinomial', got 'sobol'"),
        ([0.5], {}, ValueError, r"labels must be integers of shape \[1\], got torch.float32"),
        ([99], {}, ValueError, r"labels must be in 0..7, got 99..99"),
        (99, {}, ValueError, r"labels must be <= 7, got 99"),
        (LABELS, {"seeds": [1, 2, 3, 4, 5]}, TypeError, r"seed must be an int, .* got list"),
        (
            LABELS,
            {"seeds": SEEDS.int()},
            ValueError,
            r"seed as a tensor must be int64 of shape \[5\], got torch.int32",
        ),
        (LABELS, {"seeds": True}, TypeError, r"seed must be an int, .* got bool"),
        (LABELS, {"seeds": -(2**63) - 1}, ValueError, r"seed must be >= "),
        (LABELS, {"search": BestOfM(mean_feature, first_scale=5)}, ValueError, r"first_scale must be < 5, .* got 5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_any_work(labels, options, error, message):
    model = small_var()
    with idle(model), pytest.raises(error, match=message):
        generate(model, labels, **options)
    assert caches_closed(model)
