"""Best of M: which candidate is kept, how many maps exist at once, and what is refused before any work."""

from functools import partial

import pytest
import torch

from tests.helpers import NUM_CLASSES, TINY_SIDES, caches_closed, idle, relative_error, small_scorer, small_var
from tests.references import vqvae
from varkern import BestOfM, DensitySearch, PublishedScorer, Scorer, generate, patch
from varkern.ops.philox import PICKS, uniforms
from varkern.search import Candidates
from varkern.spec import ModelSpec

LABELS = torch.tensor([3, 0, 5])
SPEC = ModelSpec(NUM_CLASSES, TINY_SIDES, (6, 6), 8, 64)


def offered(scores, seeds=None, scale=1):
    """Candidates whose fused feature is their score, and a scorer that reads it."""
    batch, count = scores.shape
    seeds = torch.arange(batch) if seeds is None else seeds
    return Candidates(
        scale,
        5,
        torch.zeros(batch, dtype=torch.int64),
        torch.zeros(batch, count, 4, dtype=torch.int64),
        lambda start, stop, dtype=None, channels_last=False: scores[:, start:stop, None, None, None],
        lambda draw=0: uniforms(seeds, count, draw + 1, scale, PICKS)[:, :, draw],
        torch.zeros(64, 8),
    )


def read_score(labels, features, scale):
    return features[:, :, 0, 0, 0]


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


def chosen(scores, **options):
    return BestOfM(read_score, m=scores.shape[1], **options).choose(offered(scores)).index


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "scores, wanted",
    [
        ([0.0, 3.0, 1.0], 1),
        ([2.0, 5.0, 5.0, 5.0], 1),
        ([1.0, 1.0, 1.0], 0),
        ([NAN, -7.0, NAN], 1),
        ([NAN, -INF, -1e30], 2),
        ([NAN, NAN], 0),
        ([-INF, -INF], 0),
        ([0.0, INF, INF], 1),
    ],
    ids=str,
)
def test_best(scores, wanted):
    choice = BestOfM(read_score, m=len(scores)).choose(offered(torch.tensor([scores, scores])))
    assert choice.index.tolist() == [wanted, wanted] and choice.index.dtype == torch.int64
    assert not choice.scores.isnan().any()


# Chi-square with at most 5 degrees of freedom: 40 is passed by chance less than twice in 1e7.
@pytest.mark.parametrize(
    "options, weights",
    [
        ({"pick": "resample"}, [0.0, 1.0, 2.0, -1.0, 0.5, 1.5]),
        ({"pick": "resample", "temperature": 2.5}, [0.0, 0.4, 0.8, -0.4, 0.2, 0.6]),
        ({"pick": "resample", "temperature": 0.5}, [0.0, 2.0, 4.0, -2.0, 1.0, 3.0]),
        ({"pick": 3}, [-INF, 1.0, 2.0, -INF, -INF, 1.5]),
        ({"pick": 2, "temperature": 0.5}, [-INF, -INF, 4.0, -INF, -INF, 3.0]),
        ({"pick": 6}, [0.0, 1.0, 2.0, -1.0, 0.5, 1.5]),
        ({"pick": 99}, [0.0, 1.0, 2.0, -1.0, 0.5, 1.5]),
    ],
    ids=str,
)
def test_picks_follow_the_softmax_of_scores(options, weights):
    count = 20_000
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5]).expand(count, -1)
    index = chosen(scores, **options)
    expected = torch.tensor(weights, dtype=torch.float64).softmax(-1) * count
    counts = torch.bincount(index, minlength=6).double()
    assert (counts[expected == 0] == 0).all()
    inside = expected > 0
    assert ((counts - expected).square() / expected)[inside].sum() < 40


def test_pick_one_is_best():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(scores, pick=1), scores.argmax(-1))
    assert not torch.equal(chosen(scores, pick=2), scores.argmax(-1))


def test_a_low_temperature_is_best():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(scores, pick="resample", temperature=1e-6), scores.argmax(-1))


@pytest.mark.parametrize("pick", ["resample", 2, 3])
def test_nan_is_never_drawn_beside_a_number(pick):
    scores = torch.tensor([NAN, 0.0, NAN, 0.5]).expand(2000, -1)
    assert set(chosen(scores, pick=pick).tolist()) == {1, 3}
    for hopeless in ([NAN] * 4, [-INF] * 4, [INF] * 4):
        index = chosen(torch.tensor([hopeless]), pick=pick)
        assert 0 <= index.item() < 4


@pytest.mark.parametrize("pick", ["resample", 2])
def test_the_ends_of_the_uniform_numbers(pick):
    ends = torch.tensor([[0.0, 1 - 2.0**-24, 0.5], [1 - 2.0**-24] * 3])
    scores = torch.tensor([[0.0, -40.0, 1.0], [-INF, 2.0, 1.0]])
    candidates = Candidates(**{**vars(offered(scores)), "uniforms": lambda: ends})
    # Noise is at most 17 or so: it lifts neither a score 40 below the best, nor one at minus infinity.
    assert BestOfM(read_score, m=3, pick=pick).choose(candidates).index.tolist() == [2, 1]


def test_picks_depend_on_the_images_seed_and_scale():
    scores, search = torch.zeros(200, 4), BestOfM(read_score, pick="resample")
    seeds = torch.arange(200)
    first = search.choose(offered(scores, seeds, 1)).index
    assert torch.equal(search.choose(offered(scores[:5], seeds[7:12], 1)).index, first[7:12])
    assert not torch.equal(search.choose(offered(scores, seeds, 2)).index, first)


@pytest.mark.parametrize("pick", ["best", 2, "resample"], ids=str)
@pytest.mark.parametrize("maps_at_once", [1, 3, 7, 1000])
def test_chunks_change_nothing(maps_at_once, pick):
    scores = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    whole = BestOfM(read_score, m=11, pick=pick).choose(offered(scores))
    parts = BestOfM(read_score, m=11, pick=pick, maps_at_once=maps_at_once).choose(offered(scores))
    assert torch.equal(parts.index, whole.index) and torch.equal(parts.scores, whole.scores)


@pytest.mark.parametrize("maps_at_once, batch", [(64, 2), (1024, 1), (2, 3)], ids=str)
def test_a_thousand_candidates_never_exist_at_once(maps_at_once, batch):
    model, sizes = small_var(), []

    def scorer(labels, features, scale):
        sizes.append((features.shape[0] * features.shape[1], features.shape[1]))
        return mean_feature(labels, features, scale)

    search = BestOfM(scorer, m=(1, 1024, 1, 1, 8), maps_at_once=maps_at_once)
    told = generate(model, LABELS[:batch], seeds=0, search=search)
    assert max(size for size, _ in sizes) <= max(maps_at_once, batch)
    assert sum(count for _, count in sizes) == 1024 + 8
    assert told.scores[1].shape == (batch, 1024)
    whole = generate(model, LABELS[:batch], seeds=0, search=BestOfM(mean_feature, m=search.m, maps_at_once=10**6))
    assert torch.equal(told.choices[1], whole.choices[1])
    assert torch.allclose(told.scores[1], whole.scores[1], atol=1e-5)


def test_greedy_keeps_the_highest_score_of_every_image():
    told = generate(small_var(), LABELS, seeds=0, search=BestOfM(small_scorer(), m=6))
    for scores, choice in list(zip(told.scores, told.choices, strict=True))[1:]:
        assert torch.equal(choice, scores.argmax(-1))
    assert len({c for choice in told.choices[1:] for c in choice.tolist()}) > 2


@pytest.mark.parametrize("pick", [2, "resample"])
def test_other_picks_through_a_generation(pick):
    search = BestOfM(mean_feature, m=6, pick=pick, first_scale=0, temperature=0.1)
    told = generate(small_var(), LABELS.repeat(20), seeds=0, search=search)
    greedy = [torch.equal(c, s.argmax(-1)) for s, c in zip(told.scores, told.choices, strict=True)]
    assert not all(greedy)
    if pick == 2:
        for scores, choice in zip(told.scores, told.choices, strict=True):
            rank = (scores > scores.gather(1, choice[:, None])).sum(-1)
            assert rank.max() == 1


def test_the_scorer_sees_what_the_scale_would_become():
    """Its features are F of every scale kept so far with the candidate fused in, beside labels and the scale."""
    model, seen = small_var(), []

    def scorer(labels, features, scale):
        seen.append((labels, features, scale))
        return mean_feature(labels, features, scale)

    told = generate(model, LABELS, seeds=0, search=BestOfM(scorer, m=3, first_scale=0, maps_at_once=10**6))
    weights, f_hat = vqvae.weights_of(model.vae_proxy[0]), 0.0
    for k, (labels, features, scale) in enumerate(seen):
        assert scale == k and torch.equal(labels, LABELS) and features.shape == (3, 3, 8, 6, 6)
        codes = weights["quantize.embedding.weight"][told.tokens[k]]
        f_hat = f_hat + vqvae.fused(weights, codes, k, TINY_SIDES)
        kept = features[torch.arange(3), told.choices[k]]
        assert relative_error(kept, f_hat) < 1e-5
        assert torch.equal(told.scores[k], mean_feature(labels, features, scale))


class Reading:
    """A scorer that tells what features it wants, and remembers what it got."""

    def __init__(self, **wishes):
        self.__dict__.update(wishes)
        self.got = []

    def __call__(self, labels, features, scale):
        last = features.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        self.got.append((features.dtype, "NHWC" if last and not features.is_contiguous() else "NCHW"))
        return mean_feature(labels, features, scale)


@pytest.mark.parametrize(
    "wishes, wanted",
    [
        ({}, (torch.float32, "NCHW")),
        ({"input_dtype": torch.bfloat16}, (torch.bfloat16, "NCHW")),
        ({"channels_last": True}, (torch.float32, "NHWC")),
        ({"input_dtype": torch.float16, "channels_last": True}, (torch.float16, "NHWC")),
        ({"input_dtype": None, "channels_last": False}, (torch.float32, "NCHW")),
    ],
    ids=["nothing", "bfloat16", "channels_last", "float16 channels_last", "none"],
)
def test_a_scorer_gets_the_features_it_asks_for(wishes, wanted):
    scorer = Reading(**wishes)
    told = generate(small_var(), LABELS, seeds=0, search=BestOfM(scorer, m=3, maps_at_once=4))
    assert set(scorer.got) == {wanted} and len(scorer.got) == 4 * 3
    plain = generate(small_var(), LABELS, seeds=0, search=BestOfM(mean_feature, m=3))
    assert torch.allclose(told.scores[1], plain.scores[1], atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_our_scorer_is_read_from_without_a_copy(dtype):
    scorer, read = small_scorer().to(dtype), []
    scorer.register_forward_pre_hook(lambda _, given: read.append(given[1]))
    told = generate(small_var(), LABELS, seeds=0, search=BestOfM(scorer, m=4))
    assert {features.dtype for features in read} == {torch.float32 if dtype == torch.float64 else dtype}
    assert all(features.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) for features in read)
    assert told.scores[1].dtype == torch.float32


def test_which_scales_are_searched():
    def counts(**options):
        search = BestOfM(mean_feature, **options)
        search.check(SPEC)
        return [search.num_candidates(k, 5) for k in range(5)]

    assert counts() == [1, 4, 4, 4, 4]
    assert counts(m=7, first_scale=0) == [7] * 5
    assert counts(m=3, first_scale=2, last_scale=3) == [1, 1, 3, 3, 1]
    assert counts(m=3, first_scale=4, last_scale=4) == [1, 1, 1, 1, 3]
    assert counts(m=[1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]


def test_unsearched_scales_are_drawn_as_without_a_search():
    model, scored = small_var(), []

    def scorer(labels, features, scale):
        scored.append(scale)
        return mean_feature(labels, features, scale)

    told = generate(model, LABELS, seeds=0, search=BestOfM(scorer, m=3, first_scale=2, last_scale=2))
    plain = generate(model, LABELS, seeds=0)
    assert scored == [2] and [s is not None for s in told.scores] == [False, False, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(told.tokens[:2], plain.tokens[:2], strict=True))


def test_m_one_is_no_search():
    model = small_var()
    with pytest.MonkeyPatch.context() as patch_scores:
        patch_scores.setattr(BestOfM, "choose", lambda *given: pytest.fail("searched"))
        told = generate(model, LABELS, seeds=0, search=BestOfM(mean_feature, m=1))
    assert torch.equal(told.images, generate(model, LABELS, seeds=0).images)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"scorer": 3}, TypeError, r"scorer must be callable, got int"),
        ({"m": 0}, ValueError, r"m must be >= 1, got 0"),
        ({"m": -2}, ValueError, r"m must be >= 1, got -2"),
        ({"m": (1, 0, 4)}, ValueError, r"m must be >= 1, got 0"),
        ({"m": (1, 2.0)}, (ValueError, TypeError), r"m must be .*got 2.0"),
        ({"m": 2.0}, (ValueError, TypeError), r"m must be .*got 2.0"),
        ({"m": True}, (ValueError, TypeError), r"m must be .*got True"),
        ({"m": None}, (ValueError, TypeError), r"m must be .*got None"),
        (
            {"m": (1, 4), "first_scale": 0},
            ValueError,
            r"first_scale and last_scale cannot be combined with a per-scale m",
        ),
        (
            {"m": (1, 4), "last_scale": 1},
            ValueError,
            r"first_scale and last_scale cannot be combined with a per-scale m",
        ),
        ({"first_scale": -1}, ValueError, r"first_scale must be an int >= 0, got -1"),
        ({"first_scale": 1.0}, ValueError, r"first_scale must be an int >= 0, got 1.0"),
        ({"first_scale": 3, "last_scale": 2}, ValueError, r"last_scale must be an int >= first_scale=3, got 2"),
        ({"pick": "worst"}, ValueError, r"pick must be 'best', 'resample' or an int >= 1, got 'worst'"),
        ({"pick": 0}, ValueError, r"pick must be 'best', 'resample' or an int >= 1, got 0"),
        ({"pick": True}, ValueError, r"pick must be 'best', 'resample' or an int >= 1, got True"),
        ({"pick": 1.5}, ValueError, r"pick must be 'best', 'resample' or an int >= 1, got 1.5"),
        ({"temperature": 0}, ValueError, r"temperature must be .*> 0, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature must be .*> 0, got -1.0"),
        ({"temperature": NAN}, ValueError, r"temperature must be .*> 0, got nan"),
        ({"temperature": INF}, ValueError, r"temperature must be .*> 0.*, got inf"),
        ({"temperature": "1"}, (TypeError, ValueError), r"temperature must be .*, got '1'"),
        ({"temperature": None}, (TypeError, ValueError), r"temperature must be .*, got None"),
        ({"maps_at_once": 0}, ValueError, r"maps_at_once must be .*>= 1, got 0"),
        ({"maps_at_once": 2.5}, (TypeError, ValueError), r"maps_at_once must be .*, got 2.5"),
        ({"pick": None}, (TypeError, ValueError), r"pick must be 'best', 'resample' or an int >= 1, got None"),
    ],
    ids=str,
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        BestOfM(**({"scorer": mean_feature} | options))


@pytest.mark.parametrize(
    "search, message",
    [
        (lambda: BestOfM(mean_feature, m=(1, 2)), r"m must have one number for each of 5 scales, got 2"),
        (lambda: BestOfM(mean_feature, first_scale=5), r"first_scale must be < 5, the model's scales, got 5"),
        (lambda: BestOfM(mean_feature, last_scale=9), r"last_scale must be < 5, the model's scales, got 9"),
        (
            lambda: BestOfM(small_scorer(num_classes=9)),
            r"scorer was made for num_classes=9, but the model has num_cl.*=7",
        ),
        (
            lambda: BestOfM(small_scorer(num_scales=4)),
            r"scorer was made for num_scales=4, but the model has num_sc.*=5",
        ),
        (lambda: BestOfM(small_scorer(channels=16)), r"scorer was made for channels=16, but the model has channels=8"),
        (lambda: BestOfM(small_scorer(size=8)), r"scorer was made for size=8, but the model has size=6"),
        (lambda: BestOfM(Scorer()), r"scorer was made for num_classes=1000, but the model has num_classes=7"),
    ],
    ids=["m", "first_scale", "last_scale", "classes", "scales", "channels", "size", "ImageNet"],
)
def test_a_search_that_does_not_fit_is_refused_before_any_work(search, message):
    model, search = small_var(), search()
    with idle(model):
        with pytest.raises(ValueError, match=message):
            patch(model, search)
        with pytest.raises(ValueError, match=message):
            generate(model, LABELS, search=search)


def test_a_scorer_is_moved_to_the_candidates_device_when_it_is_used():
    """Its dtype stays. A check and a patch move nothing; a scorer that is not a module has nothing to move."""
    scorer = small_scorer().bfloat16()
    model = patch(small_var().to("meta"), BestOfM(scorer, m=2))
    assert {p.device.type for p in scorer.parameters()} == {"cpu"}
    tokens, labels = torch.zeros(3, 2, 4, dtype=torch.int64, device="meta"), torch.zeros(3, device="meta").long()
    size = (model.vae_proxy[0].Cvae, 6, 6)

    def fuse(start, stop, dtype=None, channels_last=False):
        return torch.zeros(3, stop - start, *size, dtype=dtype, device="meta")

    candidates = Candidates(1, 5, labels, tokens, fuse, lambda draw=0: torch.zeros(3, 2, device="meta"), None)
    for search in (BestOfM(scorer, m=2), BestOfM(mean_feature, m=2)):
        assert search.choose(candidates).index.device.type == "meta"
    assert {p.device.type for p in scorer.parameters()} == {"meta"}
    assert {p.dtype for p in scorer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([1, 7, 2]), r"must be in 0..6, the scorer's classes, got 7.*no class"),
        (-1, r"must be in 0..6, the scorer's classes, got 7.*no class"),
        (7, r"must be in 0..6, the scorer's classes, got 7.*no class"),
        (torch.tensor([8]), r"must be in 0..7, got 8"),
    ],
    ids=["tensor", "negative", "int", "out of range"],
)
def test_labels_that_the_scorer_does_not_know(labels, message):
    model, search = small_var(), BestOfM(small_scorer())
    with idle(model), pytest.raises(ValueError, match=r"label \(label_B, labels\) " + message):
        generate(model, labels, search=search)
    if not isinstance(labels, torch.Tensor):  # a callable of the user's own may know "no class"
        generate(model, labels, search=BestOfM(mean_feature))


@pytest.mark.parametrize("m", [1, (1, 1, 1, 1, 1)], ids=["one", "one per scale"])
@pytest.mark.parametrize("labels", [-1, torch.tensor([7, 2])], ids=["negative", "tensor"])
def test_a_search_that_scores_nothing_refuses_no_label(labels, m):
    model, search = small_var(), BestOfM(small_scorer(), m=m)
    wanted = generate(model, labels, seeds=3).images
    for given in (search, [DensitySearch(1), search]):
        assert torch.equal(generate(model, labels, seeds=3, search=given).images, wanted)
    with pytest.raises(ValueError, match="no class"):
        generate(model, labels, search=BestOfM(small_scorer(), m=(1, 1, 1, 1, 2)))
    with pytest.raises(ValueError, match=r"must be in 0..7, got 8"):
        generate(model, 8, search=search)


@pytest.mark.parametrize(
    "returned, came",
    [
        (lambda f: f.mean((2, 3, 4))[:, :1], r"\[3, 1\]"),
        (lambda f: f.mean((1, 2, 3, 4)), r"\[3\]"),
        (lambda f: f.mean((3, 4)), r"\[3, 4, 8\]"),
        (lambda f: f.mean((2, 3, 4)).T, r"\[4, 3\]"),
        (lambda f: f.mean(), r"\[\]"),
    ],
    ids=["one", "no candidates", "too many axes", "transposed", "a number"],
)
def test_scores_of_a_wrong_shape(returned, came):
    model = small_var()
    with pytest.raises(ValueError, match=rf"scorer must return scores of shape \[3, 4\], got {came}"):
        generate(model, LABELS, search=BestOfM(lambda labels, features, scale: returned(features)))
    assert caches_closed(model)


def test_scores_that_are_no_tensor():
    with pytest.raises(TypeError, match="scorer must return a tensor, got list"):
        generate(small_var(), LABELS, search=BestOfM(lambda labels, features, scale: [0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_scores_of_any_number_type(dtype):
    search = BestOfM(lambda labels, features, scale: (read_score(labels, features, scale) * 4).to(dtype), m=3)
    choice = search.choose(offered(torch.tensor([[0.0, 1.0, 0.5]])))
    assert choice.scores.dtype == torch.float32 and choice.index.tolist() == [1]


class Judge(torch.nn.Module):
    def forward(self, labels, features, scale):
        return features.mean((2, 3, 4))


@pytest.mark.parametrize(
    "search, wanted",
    [
        (BestOfM(mean_feature, m=8), "mean_feature, m=8, first_scale=1, last_scale=None, pick='best'"),
        (BestOfM(Judge(), 8, 0, 3), "Judge, m=8, first_scale=0, last_scale=3, pick='best'"),
        (BestOfM(Judge(), pick=2), "Judge, m=4, first_scale=1, last_scale=None, pick=2, temperature=1.0"),
        (BestOfM(Judge(), (1, 2), pick="resample", temperature=2), "Judge, m=(1, 2), pick='resample', temperature=2"),
        (BestOfM(PublishedScorer(Judge()), (1, 2), temperature=0.5), "PublishedScorer(Judge), m=(1, 2), pick='best'"),
        (BestOfM(partial(mean_feature), (1, 2)), "partial, m=(1, 2), pick='best'"),
    ],
    ids=str,
)
def test_repr_shows_what_decides_the_choice(search, wanted):
    """The temperature is shown where it has an effect, and the scales where a single m does not give them."""
    assert repr(search) == f"BestOfM({wanted})"
