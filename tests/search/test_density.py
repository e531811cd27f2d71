"""Density search: the rule against a slow plain form, its probabilities, its promises, and what is refused."""

from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import NUM_CLASSES, TINY_SIDES, caches_closed, idle, small_var
from tests.references import density_search as reference
from varkern import DensitySearch, generate, patch, patched, unpatch, use_backend
from varkern.ops.philox import PICKS, uniforms
from varkern.search import Candidates
from varkern.search.density import STRATEGIES, take_representatives
from varkern.spec import ModelSpec

LABELS = torch.tensor([3, 0, 5])
SPEC = ModelSpec(NUM_CLASSES, TINY_SIDES, (6, 6), 8, 64)
RULES = [(strategy, "released") for strategy in STRATEGIES] + [("hybrid", "paper")]
# On a grid, so that distances and their order are the same in float32 and float64.
CODEBOOK = torch.randint(-4, 5, (12, 3), generator=torch.Generator().manual_seed(0)) / 4
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def quick(quick_backend):
    with use_backend(quick_backend):
        yield


def offered(tokens, seeds=None, scale=1, codebook=CODEBOOK):
    """Candidates ``[B, M, l]``, or bits ``[B, M, l, d]`` for plus or minus 0.5; density asks for no features."""
    batch, count = tokens.shape[:2]
    seeds = torch.arange(batch, device=tokens.device) if seeds is None else seeds
    binary = tokens.dtype == torch.uint8
    return Candidates(
        scale,
        5,
        torch.zeros(batch, dtype=torch.int64, device=tokens.device),
        tokens,
        lambda *_, **__: pytest.fail("density search asked for features"),
        lambda draw=0: uniforms(seeds, count, draw + 1, scale, PICKS)[:, :, draw],
        None if binary else codebook.to(tokens.device),
        0.5 if binary else None,
    )


def random_tokens(batch, count, length=2, seed=0, device="cpu"):
    return torch.randint(0, 12, (batch, count, length), generator=torch.Generator().manual_seed(seed)).to(device)


def random_bits(batch, count, seed=0, device="cpu"):
    bits = torch.randint(0, 2, (batch, count, 2, 5), generator=torch.Generator().manual_seed(seed))
    return bits.to(device, torch.uint8)


def codes_of(candidates):
    """``[B, M, l, C]`` float64."""
    if candidates.codebook is None:
        codes = (2 * candidates.tokens.double() - 1) * candidates.code_scale
    else:
        codes = candidates.codebook.double()[candidates.tokens]
    return codes.cpu().numpy()


def taken_by(search, candidates):
    """The representatives of each image, in their order."""
    densities = search.densities(candidates)
    priorities = search.priorities(densities, candidates)
    places = take_representatives(priorities, search.representatives, search.near(candidates)).cpu()
    return [[int((row == place).nonzero()) for place in range(int(row.max()) + 1)] for row in places]


def wanted(search, candidates):
    """What the plain form takes and keeps of each image, given the same densities and uniform numbers."""
    densities = search.densities(candidates).cpu().double().numpy()
    draws = [candidates.uniforms(draw).cpu().double().numpy() for draw in (0, 1)]
    how = {"strategy": search.strategy, "count": search.representatives, "alpha": search.alpha}
    how |= {"threshold": search.threshold, "min_distance": search.min_distance}
    return [
        reference.choose(densities[image], draws[1][image], draws[0][image], maps.reshape(len(maps), -1), **how)
        for image, maps in enumerate(codes_of(candidates))
    ]


class Planted(DensitySearch):
    """A density search whose densities are given."""

    def __init__(self, planted, **options):
        super().__init__(planted.shape[1], **options)
        self.planted = planted

    def densities(self, candidates):
        return self.planted


# ---- The rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_tokens, random_bits], ids=["tokens", "bits"])
@pytest.mark.parametrize("strategy, threshold", RULES)
def test_the_rule(strategy, threshold, make, device):
    """Representatives and choices of 720 images a case; many pairs are exactly 2 apart, which is not too near."""
    batch, close, seen, short, dense = 60, 0, set(), 0, []
    for n, count in ((1, 3), (2, 1), (9, 4), (23, 10)):
        for min_distance in (0.0, 0.75, 2.0):
            alpha = 1.25 if make is random_bits else 1.4
            options = {"strategy": strategy, "threshold": threshold, "min_distance": min_distance}
            search = DensitySearch(n, count, alpha, **options)
            candidates = offered(make(batch, n, seed=n, device=device))
            choice, expected = search.choose(candidates), wanted(search, candidates)
            assert taken_by(search, candidates) == [taken for *_, taken in expected]
            for index, (best, lead, _) in zip(choice.index.tolist(), expected, strict=True):
                assert index == best or lead < 1e-5
                close += lead < 1e-5
            seen |= set(choice.index.tolist())
            short += sum(len(taken) < min(n, count) for *_, taken in expected)
            dense += search.dense(choice.scores).tolist() if n > 2 else []
            assert choice.index.dtype == torch.int64 and choice.scores.shape == (batch, n)
    assert close < 3 and len(seen) > 15 and short > 20
    assert strategy != "hybrid" or 0.1 < sum(dense) / len(dense) < 0.9


@pytest.mark.parametrize("strategy, threshold", RULES)
def test_the_rule_for_densities_of_any_size(strategy, threshold, device):
    """Ties, zeros, and densities from 1e-30 to 1e30, which no samples of ours would have."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 3, (200, 7), generator=generator).float()
    wide = 10 ** (60 * torch.rand(200, 7, generator=generator) - 30)
    for planted in (few, wide.float()):
        options = {"strategy": strategy, "threshold": threshold, "min_distance": 0.75}
        search = Planted(planted.to(device), representatives=3, alpha=1.8, **options)
        candidates = offered(random_tokens(200, 7, device=device))
        for index, (best, lead, _) in zip(
            search.choose(candidates).index.tolist(), wanted(search, candidates), strict=True
        ):
            assert index == best or lead < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_choice_where_no_density_is_left(strategy):
    """An image whose densities all vanish still keeps one of its representatives."""
    search = Planted(torch.zeros(100, 4), representatives=2, strategy=strategy, min_distance=0)
    candidates = offered(random_tokens(100, 4))
    index = search.choose(candidates).index.tolist()
    assert all(best in taken for best, taken in zip(index, taken_by(search, candidates), strict=True))
    if strategy == "top":
        assert set(index) == {0, 1}


def test_a_candidate_without_density_is_not_drawn_beside_others():
    planted = torch.tensor([[0.0, 1.0, 0.0, 2.0]]).expand(3000, -1)
    search = Planted(planted, representatives=4, strategy="random", min_distance=0)
    assert set(search.choose(offered(random_tokens(3000, 4))).index.tolist()) == {1, 3}


@pytest.mark.parametrize("min_distance", [0.0, 0.5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_codes_that_are_no_numbers_leave_a_choice(strategy, min_distance):
    codebook = CODEBOOK.clone()
    codebook[::2] = NAN
    search = DensitySearch(9, 3, strategy=strategy, min_distance=min_distance)
    choice = search.choose(offered(random_tokens(20, 9), codebook=codebook))
    assert choice.scores.isfinite().all() and choice.index.min() >= 0 and choice.index.max() < 9


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("bandwidth", ["image", "batch", 0.6])
@pytest.mark.parametrize("per", ["position", "map"])
def test_scores_are_the_densities(per, bandwidth, metric, device):
    codebook = CODEBOOK + 0.1  # no code of zeros, which has no direction
    candidates = offered(random_tokens(3, 13, device=device), codebook=codebook)
    search = DensitySearch(13, per=per, bandwidth=bandwidth, metric=metric)
    expected = reference.map_densities(codes_of(candidates), per, bandwidth, metric)
    np.testing.assert_allclose(search.choose(candidates).scores.cpu().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("bandwidth", ["image", "batch", 0.6])
@pytest.mark.parametrize("per", ["position", "map"])
def test_scores_of_binary_codes(per, bandwidth, device):
    candidates = offered(random_bits(3, 13, device=device))
    search = DensitySearch(13, per=per, bandwidth=bandwidth)
    expected = reference.map_densities(codes_of(candidates), per, bandwidth)
    np.testing.assert_allclose(search.choose(candidates).scores.cpu().numpy(), expected, rtol=1e-5)


def test_a_bandwidth_for_each_image():
    candidates, widths = offered(random_tokens(3, 13)), torch.tensor([0.3, 0.6, 1.2])
    scores = DensitySearch(13, bandwidth=widths).choose(candidates).scores
    for image, width in enumerate(widths.tolist()):
        alone = DensitySearch(13, bandwidth=width).choose(offered(candidates.tokens[image : image + 1])).scores
        torch.testing.assert_close(scores[image : image + 1], alone)


# ---- Probabilities -----------------------------------------------------------------------------------------------

FIVE = torch.tensor([[[0], [1], [0], [3], [4]]])  # the first and the third are the same


def probabilities(search):
    """Of each of ``FIVE``, by going through all orders in which random representatives could be asked."""
    candidates = offered(FIVE)
    densities, maps = reference.map_densities(codes_of(candidates))[0], codes_of(candidates)[0, :, 0]
    total, orders = np.zeros(5), list(permutations(range(5)))
    for permuted in orders:
        order = reference.in_order(densities, -np.argsort(permuted), search.strategy, search.alpha, search.threshold)
        taken = reference.representatives(order, maps, search.representatives, search.min_distance)
        total += reference.probabilities(taken, densities, search.strategy, search.representatives)
    return total / len(orders)


# Chi-square with at most 4 degrees of freedom: 40 is passed by chance less than 5 times in 1e8, in any of the cases
# less than 1 time in 1e6.
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "top", "representatives": 4, "min_distance": 0},
        {"strategy": "top", "representatives": 5, "min_distance": 0.5},
        {"strategy": "small", "representatives": 3, "min_distance": 0},
        {"strategy": "random", "representatives": 2, "min_distance": 0},
        {"strategy": "random", "representatives": 3, "min_distance": 0.5},
        {"strategy": "hybrid", "representatives": 2, "min_distance": 0, "alpha": 1.0},
        {"strategy": "hybrid", "representatives": 2, "min_distance": 0, "alpha": 5.0},
        {"strategy": "hybrid", "representatives": 2, "min_distance": 0, "alpha": 5.0, "threshold": "paper"},
        {"strategy": "rank", "representatives": 4, "min_distance": 0},
        {"strategy": "rank", "representatives": 9, "min_distance": 0.5},
        {"strategy": "top", "representatives": 1, "min_distance": 0},
    ],
    ids=str,
)
def test_the_final_choice_follows_the_densities(options):
    count, search = 20_000, DensitySearch(5, **options)
    counts = torch.bincount(search.choose(offered(FIVE.expand(count, -1, -1))).index, minlength=5).numpy()
    expected = probabilities(search) * count
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 40


def test_rank_weighs_from_the_number_of_representatives_down_to_one():
    assert np.allclose(reference.probabilities([3, 1, 0], np.ones(5), "rank", 3), [1 / 6, 2 / 6, 0, 3 / 6, 0])


# ---- Promises ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_tokens, random_bits], ids=["tokens", "bits"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_knows_nothing_of_its_batch(strategy, make, device):
    tokens, seeds = make(9, 13, device=device), torch.arange(100, 109, device=device)
    search = DensitySearch(13, 5, 1.3, strategy=strategy, min_distance=0.75)
    together = search.choose(offered(tokens, seeds))
    for part in (slice(4, 5), slice(2, 7), slice(0, 0)):
        alone = search.choose(offered(tokens[part], seeds[part]))
        assert torch.equal(alone.index, together.index[part]) and torch.equal(alone.scores, together.scores[part])


def test_the_batchs_bandwidth_makes_images_know_of_one_another():
    tokens = torch.cat((random_tokens(2, 13), random_tokens(1, 13) % 2))
    search = DensitySearch(13, compat="released")
    together, alone = (search.choose(offered(part)).scores for part in (tokens, tokens[:2]))
    assert not torch.allclose(together[:2], alone)
    torch.testing.assert_close(alone[:1], DensitySearch(13, bandwidth="batch").choose(offered(tokens[:2])).scores[:1])


def test_choices_depend_on_the_images_seed_and_scale():
    tokens, search = random_tokens(1, 13).expand(200, -1, -1), DensitySearch(13, min_distance=0, strategy="random")
    seeds = torch.arange(200)
    first = search.choose(offered(tokens, seeds, 1)).index
    assert len(set(first.tolist())) == 13
    assert torch.equal(search.choose(offered(tokens[:5], seeds[7:12], 1)).index, first[7:12])
    assert not torch.equal(search.choose(offered(tokens, seeds, 2)).index, first)


@pytest.mark.parametrize("min_distance", [0, 0.5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_candidates(strategy, min_distance):
    """Equal, finite densities; with a distance one of them is the only representative."""
    tokens = torch.full((500, 6, 2), 3)
    for bandwidth in ("image", "batch", 0.1):
        search = DensitySearch(6, strategy=strategy, bandwidth=bandwidth, min_distance=min_distance)
        candidates = offered(tokens)
        choice = search.choose(candidates)
        assert (choice.scores == choice.scores[0, 0]).all() and choice.scores.isfinite().all()
        assert {len(taken) for taken in taken_by(search, candidates)} == {1 if min_distance else 6}
        always_first = min_distance and strategy in ("top", "small", "rank")
        assert set(choice.index.tolist()) == ({0} if always_first else set(range(6)))


def test_equal_candidates_are_not_below_their_mean():
    for batch, n in ((1, 7), (2, 49), (3, 1000)):
        search = DensitySearch(n, alpha=1.0)
        assert search.dense(torch.full((batch, n), 4 * n / 3)).all()
        assert not DensitySearch(n, alpha=1.0 + 1e-9).dense(torch.full((batch, n), 4 * n / 3)).any()


@pytest.mark.parametrize("n", [1, 3])
def test_more_representatives_than_candidates_are_all_candidates(n):
    search, candidates = DensitySearch(n, 99, strategy="top", min_distance=0), offered(random_tokens(50, n))
    assert {len(taken) for taken in taken_by(search, candidates)} == {n}
    assert set(search.choose(candidates).index.tolist()) == set(range(n))


@pytest.mark.parametrize("make", [random_tokens, random_bits], ids=["tokens", "bits"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_choosing_never_looks_at_values(strategy, make):
    """Tensors without values pass through: nothing waits for the device and no shape depends on values."""
    search = DensitySearch(13, 4, strategy=strategy, bandwidth="batch")
    candidates = offered(make(3, 13))
    given = [candidates.tokens, candidates.uniforms(0), candidates.uniforms(1)]
    with FakeTensorMode() as mode:
        tokens, *draws = (mode.from_tensor(x) for x in given)
        codebook = None if candidates.codebook is None else mode.from_tensor(candidates.codebook)
        fake = replace(candidates, tokens=tokens, codebook=codebook, uniforms=lambda draw=0: draws[draw])
        choice = search.choose(fake)
    assert choice.index.shape == (3,) and choice.index.dtype == torch.int64 and choice.scores.shape == (3, 13)


@pytest.mark.parametrize("strategy", ["hybrid", "rank"])
def test_compiles_as_one_graph(strategy, device):
    search, tokens = DensitySearch(13, 4, 1.4, strategy=strategy, min_distance=0.75), random_tokens(20, 13)

    def choose(tokens, seeds):
        choice = search.choose(offered(tokens, seeds))
        return choice.index + 0, choice.scores

    given = tokens.to(device), torch.arange(20, device=device)
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")(*given)
    assert all(torch.equal(*pair) for pair in zip(compiled, choose(*given), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replays_in_a_cuda_graph(strategy):
    search, tokens = DensitySearch(13, 4, 1.4, strategy=strategy, min_distance=0.75), random_tokens(20, 13, seed=9)
    tokens, seeds = tokens.cuda(), torch.arange(20, device="cuda")
    search.choose(offered(tokens, seeds))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choice = search.choose(offered(tokens, seeds))
    for seed in range(2):
        tokens.copy_(random_tokens(20, 13, seed=seed))
        seeds.copy_(torch.arange(20) + 100 * seed)
        graph.replay()
        eager = search.choose(offered(tokens, seeds))
        assert torch.equal(choice.index, eager.index) and torch.equal(choice.scores, eager.scores)


# ---- Generation --------------------------------------------------------------------------------------------------


class Watched(DensitySearch):
    """Keeps the candidates that it saw."""

    def choose(self, candidates):
        self.seen = candidates
        return super().choose(candidates)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_generation_keeps_what_was_chosen(strategy):
    model, search = small_var(), Watched(12, 4, 1.5, scales=2, strategy=strategy)
    plain = generate(model, LABELS, seeds=0)
    told = generate(model, LABELS, seeds=0, search=search)
    assert [s is not None for s in told.scores] == [False, False, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(told.tokens[:2], plain.tokens[:2], strict=True))
    assert torch.equal(search.seen.tokens[:, 0], plain.tokens[2])
    assert torch.equal(told.tokens[2], search.seen.tokens[torch.arange(3), told.choices[2]])
    assert told.choices[2].tolist() == [best for best, *_ in wanted(search, search.seen)]
    codes = model.vae_quant_proxy[0].embedding.weight.double()[search.seen.tokens].numpy()
    np.testing.assert_allclose(told.scores[2].numpy(), reference.map_densities(codes), rtol=1e-5)


@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_through_patch(strategy, sampler):
    model = small_var()
    draw = partial(model.autoregressive_infer_cfg, B=3, label_B=LABELS, top_k=20, top_p=0.9)
    plain = draw(g_seed=4)
    patch(model, DensitySearch(12, 4, scales=(1, 3), strategy=strategy), sampler=sampler)
    images = [model.autoregressive_infer_cfg(3, LABELS, g_seed=seed, top_k=20, top_p=0.9) for seed in (4, 4, 5)]
    assert torch.equal(images[0], images[1]) or sampler == "multinomial"
    assert not torch.equal(images[0], images[2]) and not torch.equal(images[0], plain)
    assert caches_closed(model)
    assert torch.equal(unpatch(model).autoregressive_infer_cfg(3, LABELS, g_seed=4, top_k=20, top_p=0.9), plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_depend_on_their_own_seed_alone(strategy):
    model, seeds, search = small_var(), torch.arange(70, 73), DensitySearch(12, 4, 1.5, strategy=strategy)
    together = generate(model, LABELS, seeds=seeds, search=search)
    alone = generate(model, LABELS[1:2], seeds=seeds[1:2], search=search)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together.tokens, alone.tokens, strict=True))


def test_candidates_nest_but_densities_do_not():
    """The first candidates of a larger search are the smaller one's; a density, and so a choice, is relative to all."""
    model, few, many = small_var(), Watched(10), Watched(30)
    scores = [generate(model, LABELS, seeds=0, search=search).scores[1] for search in (few, many)]
    assert torch.equal(many.seen.tokens[:, :10], few.seen.tokens)
    assert not torch.allclose(scores[1][:, :10], scores[0])


def test_one_candidate_is_no_search(monkeypatch):
    model = small_var()
    monkeypatch.setattr(DensitySearch, "choose", lambda *given: pytest.fail("searched"))
    told = generate(model, LABELS, seeds=0, search=DensitySearch(1))
    assert torch.equal(told.images, generate(model, LABELS, seeds=0).images)


def test_every_scale_and_no_class():
    """It needs no scorer, so it searches images of no class and the first and last scale as well."""
    told = generate(small_var(), -1, batch_size=2, seeds=0, search=DensitySearch(6, scales=range(5), min_distance=0.5))
    assert [score.shape for score in told.scores] == [(2, 6)] * 5


# ---- Settings ----------------------------------------------------------------------------------------------------

DEFAULTS = {"per": "position", "bandwidth": "image", "min_distance": 1.8, "threshold": "released"}


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, {}),
        ({"compat": "paper"}, {"per": "map", "min_distance": 0, "threshold": "paper"}),
        ({"compat": "released"}, {"bandwidth": "batch"}),
        ({"compat": "released", "bandwidth": "image", "min_distance": 0}, {"min_distance": 0}),
        ({"compat": "paper", "threshold": "released", "per": "position", "min_distance": 1.8}, {}),
        (
            {"compat": "paper", "bandwidth": 0.5},
            {"per": "map", "min_distance": 0, "threshold": "paper", "bandwidth": 0.5},
        ),
    ],
    ids=str,
)
def test_compat(options, wanted):
    search = DensitySearch(**options)
    assert {name: getattr(search, name) for name in DEFAULTS} == DEFAULTS | wanted
    assert (search.n, search.representatives, search.alpha, search.scales) == (50, 10, 2.3, (1,))
    assert (search.strategy, search.metric) == ("hybrid", "euclidean")


def test_repr_tells_the_settings():
    assert repr(DensitySearch(20, scales=[3, 1])) == (
        "DensitySearch(n=20, representatives=10, alpha=2.3, scales=(1, 3), strategy='hybrid', metric='euclidean', "
        "per='position', bandwidth='image', min_distance=1.8, threshold='released')"
    )


def test_which_scales_are_searched():
    def counts(scales):
        search = DensitySearch(7, scales=scales)
        search.check(SPEC)
        return [search.num_candidates(k, 5) for k in range(5)]

    assert counts((1,)) == [1, 7, 1, 1, 1]
    assert counts(4) == [1, 1, 1, 1, 7]
    assert counts(range(5)) == [7] * 5
    assert counts(np.array([0, 3])) == [7, 1, 1, 7, 1]


def test_recommended_alpha():
    ranges = [DensitySearch.recommended_alpha(depth) for depth in (16, 20, 24, 30)]
    assert ranges == [(2.3, 2.9), (2.2, 2.8), (2.1, 2.7), (2.0, 2.6)]
    assert [found.middle for found in ranges] == [2.6, 2.5, 2.4, 2.3]
    assert DensitySearch.recommended_alpha(24, "FlexVAR") == (2.5, 2.8)


@pytest.mark.parametrize(
    "given, message",
    [
        ((36,), r"depth of VAR must be one of 16, 20, 24, 30, got 36"),
        ((30, "FlexVAR"), r"depth of FlexVAR must be one of 24, got 30"),
        ((24.0,), r"depth of VAR must be one of .*got 24.0"),
        ((2, "Infinity"), r"family must be one of 'VAR', 'FlexVAR', got 'Infinity'"),
    ],
    ids=str,
)
def test_no_alpha_is_recommended_for(given, message):
    with pytest.raises(ValueError, match=message):
        DensitySearch.recommended_alpha(*given)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, r"n must be an int >= 1, got 0"),
        ({"n": 2.0}, r"n must be an int >= 1, got 2.0"),
        ({"n": True}, r"n must be an int >= 1, got True"),
        ({"n": None}, r"n must be an int >= 1, got None"),
        ({"representatives": 0}, r"representatives must be an int >= 1, got 0"),
        ({"representatives": "all"}, r"representatives must be an int >= 1, got 'all'"),
        ({"alpha": 0}, r"alpha must be a finite number > 0, got 0"),
        ({"alpha": NAN}, r"alpha must be a finite number > 0, got nan"),
        ({"alpha": INF}, r"alpha must be a finite number > 0, got inf"),
        ({"alpha": "2.3"}, r"alpha must be a finite number > 0, got '2.3'"),
        ({"alpha": (2.0, 2.6)}, r"alpha must be a finite number > 0, got \(2.0, 2.6\)"),
        ({"scales": ()}, r"scales must be one or more different ints >= 0, got \(\)"),
        ({"scales": (1, 1)}, r"scales must be one or more different ints >= 0, got \(1, 1\)"),
        ({"scales": (-1,)}, r"scales must be one or more different ints >= 0, got \(-1,\)"),
        ({"scales": -1}, r"scales must be one or more different ints >= 0, got \(-1,\)"),
        ({"scales": (1, 2.0)}, r"scales must be one or more different ints >= 0, got \(1, 2.0\)"),
        ({"scales": "1"}, r"scales must be an int or several ints, got '1'"),
        ({"scales": None}, r"scales must be an int or several ints, got None"),
        ({"scales": 1.0}, r"scales must be an int or several ints, got 1.0"),
        ({"strategy": "best"}, r"strategy must be one of 'hybrid', 'top', 'random', 'small', 'rank', got 'best'"),
        ({"strategy": None}, r"strategy must be one of .*got None"),
        ({"metric": "manhattan"}, r"metric must be one of 'euclidean', 'cosine', got 'manhattan'"),
        ({"per": "token"}, r"per must be one of 'position', 'map', got 'token'"),
        ({"per": 1}, r"per must be one of 'position', 'map', got 1"),
        ({"bandwidth": "scott"}, r"bandwidth must be 'image', 'batch', a finite number > 0 or a tensor, got 'scott'"),
        ({"bandwidth": 0}, r"bandwidth must be .*, got 0"),
        ({"bandwidth": INF}, r"bandwidth must be .*, got inf"),
        ({"bandwidth": True}, r"bandwidth must be .*, got True"),
        ({"min_distance": -0.1}, r"min_distance must be a finite number >= 0, got -0.1"),
        ({"min_distance": NAN}, r"min_distance must be a finite number >= 0, got nan"),
        ({"min_distance": "1.8"}, r"min_distance must be a finite number >= 0, got '1.8'"),
        ({"threshold": "code"}, r"threshold must be one of 'released', 'paper', got 'code'"),
        ({"compat": "code"}, r"compat must be one of None, 'paper', 'released', got 'code'"),
        ({"compat": ["paper"]}, r"compat must be one of None, 'paper', 'released', got \['paper'\]"),
    ],
    ids=str,
)
def test_constructor_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DensitySearch(**options)


def test_scales_that_the_model_lacks_are_refused_before_any_work():
    model, search = small_var(), DensitySearch(scales=(1, 5))
    with idle(model):
        for refused in (partial(patch, model, search), partial(generate, model, LABELS, search=search)):
            with pytest.raises(ValueError, match=r"scales must be < 5, the model's scales, got 5"):
                refused()


def test_binary_codes_know_one_metric():
    with pytest.raises(ValueError, match=r"metric must be 'euclidean' for a model of binary codes, got 'cosine'"):
        DensitySearch(metric="cosine").check(replace(SPEC, vocabulary=None))
    DensitySearch().check(replace(SPEC, vocabulary=None))
    with pytest.raises(ValueError, match=r"metric must be 'euclidean'"):
        DensitySearch(13, metric="cosine").choose(offered(random_bits(2, 13)))


def test_a_bandwidth_of_a_wrong_shape_leaves_the_model_as_it_was():
    model = small_var()
    with patched(model, DensitySearch(bandwidth=torch.ones(7))), pytest.raises(ValueError, match="bandwidth must have"):
        model.autoregressive_infer_cfg(3, LABELS, g_seed=0)
    assert caches_closed(model)
