"""The loop's promises: an image is its own seed's, candidates nest, seeds mean what they say, nothing is lost."""

import pytest
import torch

from tests.helpers import (
    NUM_CLASSES,
    TINY_SIDES,
    caches_closed,
    on,
    random_states,
    recorded,
    relative_error,
    small_scorer,
    small_var,
)
from tests.references import var as reference
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern import BestOfM, generate, image_seeds, patched
from varkern.ops import use_backend
from varkern.ops.philox import LABELS as LABEL_STREAM
from varkern.ops.philox import PICKS, uniforms
from varkern.search import Choice

LABELS = torch.tensor([3, 0, 5, 5, 2])
SEEDS = torch.tensor([11, -4, 2**62, 11, 0])


class Recording:
    """Draws M candidates at every scale, keeps the first, and remembers all it was offered."""

    def __init__(self, m):
        self.m, self.offered = m, []

    def check(self, spec): ...

    def check_labels(self, highest, spec): ...

    def num_candidates(self, scale, num_scales):
        return self.m

    def choose(self, candidates):
        self.offered.append(candidates)
        index = torch.zeros_like(candidates.tokens[:, 0, 0])
        return Choice(index, candidates.uniforms())


def mean_feature(labels, features, scale):
    return (features * torch.arange(features.shape[2], device=features.device).view(-1, 1, 1)).mean((2, 3, 4)) * 10


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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_candidates_nest_given_the_same_earlier_scales(options):
    """A search that keeps candidate 0 makes every M share its earlier scales: then candidates 0..M-1 are those of
    any larger M, at every scale, and candidate 0 is what a generation without a search draws.

    A search that keeps another candidate changes what the model says of later scales, whose candidates then differ.
    """
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
    codebook = model.vae_quant_proxy[0].embedding.weight
    assert [c.scale for c in search.offered] == list(range(5))
    assert all(torch.equal(c.codebook, codebook) and not c.codebook.requires_grad for c in search.offered)
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


def test_an_integer_seed_is_a_row_of_image_seeds(device):
    model = on(small_var(), device)
    by_number = generate(model, LABELS, seeds=9)
    by_tensor = generate(model, LABELS, seeds=image_seeds(9, 5))
    assert torch.equal(by_number.images, by_tensor.images)
    other = generate(model, LABELS, seeds=10)
    assert not any(torch.equal(a, b) for a in by_number.images for b in other.images)


def test_no_seed_follows_pytorchs_default_generator(device):
    model = on(small_var(), device)
    torch.manual_seed(5)
    first, second = generate(model, LABELS).images, generate(model, LABELS).images
    torch.manual_seed(5)
    assert torch.equal(generate(model, LABELS).images, first)
    assert not torch.equal(first, second)


def test_a_seed_leaves_every_generator_alone(device):
    model = on(small_var(), device)
    states = random_states(model)
    generate(model, None, seeds=3, batch_size=2, more_smooth=True, search=SEARCHES["two best"])
    assert all(torch.equal(*pair) for pair in zip(random_states(model), states, strict=True))


@pytest.mark.parametrize("pick", ["best", 2, "resample"], ids=str)
def test_a_search_with_a_scorer_on_the_models_device(pick, device, quick_backend):
    """Kernels on a GPU: labels and seeds may be on the host or on the device, and an image is its own seed's."""
    model = on(small_var(), device)
    search = BestOfM(small_scorer(), m=4, pick=pick)
    with use_backend(quick_backend):
        told = generate(model, LABELS, seeds=SEEDS, search=search, top_k=30, top_p=0.9)
        for labels, seeds in ((LABELS.to(device), SEEDS), (LABELS, SEEDS.to(device)), (LABELS.tolist(), SEEDS)):
            again = generate(model, labels, seeds=seeds, search=search, top_k=30, top_p=0.9)
            assert torch.equal(again.images, told.images)
        part = generate(model, LABELS[[4, 1]], seeds=SEEDS[[4, 1]], search=search, top_k=30, top_p=0.9)
    plain = generate(model, LABELS, seeds=SEEDS, search=search, top_k=30, top_p=0.9)  # on the plain backend
    for scale, tokens in enumerate(told.tokens):
        assert tokens.device.type == device.type
        assert torch.equal(part.tokens[scale], tokens[[4, 1]]), f"scale {scale}"
        assert torch.equal(plain.tokens[scale], tokens), f"scale {scale}"
    assert torch.allclose(plain.images, told.images, atol=1e-4)


@pytest.mark.parametrize("pick", ["best", 2, "resample"], ids=str)
def test_inference_mode_changes_nothing(pick):
    model, search = small_var(), BestOfM(small_scorer(), m=4, pick=pick, maps_at_once=7)
    plain = generate(model, LABELS, seeds=SEEDS, search=search, more_smooth=True)
    with torch.inference_mode():
        inside = generate(model, LABELS, seeds=SEEDS, search=search, more_smooth=True)
    assert torch.equal(inside.images, plain.images)
    assert all(torch.equal(a, b) for a, b in zip(inside.scores[1:], plain.scores[1:], strict=True))
    again = generate(model, LABELS, seeds=SEEDS, search=search, more_smooth=True)  # nothing of the mode stays behind
    assert torch.equal(again.images, plain.images)


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


FLEX_OPTIONS = {"infer_patch_nums": list(FLEX_SIDES), "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
@pytest.mark.parametrize("search", [None, SEARCHES["best"], SEARCHES["two best"]], ids=["none", "best", "two best"])
@pytest.mark.parametrize("family", ["VAR", "FlexVAR"])
def test_without_images_all_else_is_the_same(family, search, sampler):
    """The decoder does not run, and the caches are closed."""
    if family == "VAR":
        model, options = small_var(), {"cfg": 2.0, "top_k": 30, "more_smooth": True}
        vae = model.vae_proxy[0]
    else:
        model, vae = small_flexvar()
        options = {**FLEX_OPTIONS, "vqvae": vae}
    asked = {"seeds": 6, "search": search, "sampler": sampler, **options}
    wanted = generate(model, LABELS, **asked)
    with recorded(vae.decoder) as decoded:
        told = generate(model, LABELS, decode=False, **asked)
    assert told.images is None and not decoded
    assert len(wanted.seconds) == 6 and len(told.seconds) == 5 and all(s > 0 for s in told.seconds)
    assert all(torch.equal(a, b) for a, b in zip(told.tokens, wanted.tokens, strict=True))
    for a, b in zip(told.scores + told.choices, wanted.scores + wanted.choices, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert caches_closed(model)


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


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_no_images(sampler):
    model = small_var()
    for search in (None, SEARCHES["best"], SEARCHES["two best"]):
        told = generate(model, torch.zeros(0, dtype=torch.int64), seeds=0, search=search, sampler=sampler)
        assert told.images.shape == (0, 3, 12, 12)
        assert generate(model, [], search=search, sampler=sampler).images.shape == (0, 3, 12, 12)
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
