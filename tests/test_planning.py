"""Choosing M under a budget: gains, costs and the choice against plain forms, and whole plans on small models."""

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from tests.helpers import (
    NUM_CLASSES,
    caches_closed,
    forked,
    idle,
    on,
    random_states,
    small_scorer,
    small_var,
)
from tests.standins.models import small_flexvar, small_infinity
from tests.standins.waits import Waits
from varkern import BestOfM, UnsupportedModelError, generate, image_seeds, patch, plan, planning
from varkern.ops.philox import PICKS, uniforms
from varkern.search import Candidates, Choice

CHOICES = (1, 2, 3, 8)
SMALL = {"batch_size": 4, "images": 6, "choices": CHOICES, "cfg": 2.0, "top_k": 30}


def scores_of(batch, count, seed=0, ties=False):
    scores = np.random.default_rng(seed).normal(size=(batch, count)) * 2
    return scores.round() if ties else scores


# Gains


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("m", range(1, 8))
def test_expected_maximum_is_the_mean_over_all_subsets(m, ties):
    scores = scores_of(5, 7, ties=ties)
    wanted = [statistics.fmean(max(subset) for subset in itertools.combinations(row, m)) for row in scores.tolist()]
    assert planning.expected_maximum(scores, m) == pytest.approx(wanted, abs=1e-12)


def test_expected_maximum_of_many():
    """Of N >= m independent uniform numbers m / (m + 1), whatever N: the mean of 40,000 errs by less than 7 sigma."""
    scores = np.random.default_rng(1).random((40_000, 129))
    for m in (1, 2, 77, 128, 129):
        spread = math.sqrt(m / (m + 2)) / (m + 1) / math.sqrt(40_000)
        assert planning.expected_maximum(scores, m).mean() == pytest.approx(m / (m + 1), abs=7 * spread)


def picked_by_loops(row, m, pick, temperature):
    """The mean over disjoint groups of the softmax-weighted score, in plain Python."""
    means = []
    for start in range(0, len(row) - m + 1, m):
        group = sorted(row[start : start + m], reverse=True)[: m if pick == "resample" else pick]
        weights = [math.exp((score - group[0]) / temperature) for score in group]
        means.append(math.fsum(w * s for w, s in zip(weights, group, strict=True)) / math.fsum(weights))
    return statistics.fmean(means)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("pick", ["resample", 2, 3, 99], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 11, 12])
def test_expected_pick_is_the_mean_over_groups(m, pick, temperature):
    scores = scores_of(4, 12)
    wanted = [picked_by_loops(row, m, pick, temperature) for row in scores.tolist()]
    assert planning.expected_pick(scores, m, pick, temperature) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("pick", ["best", 1], ids=str)
def test_the_best_of_one_is_the_best(pick):
    scores = scores_of(4, 12)
    assert np.array_equal(planning.expected_pick(scores, 5, pick, 0.7), planning.expected_maximum(scores, 5))


def test_temperatures_that_overflow_are_harmless():
    scores = scores_of(4, 12) * 1e4
    wanted = scores.reshape(4, 3, 4).max(-1).mean(-1)
    assert planning.expected_pick(scores, 4, "resample", 1e-3) == pytest.approx(wanted)


@pytest.mark.parametrize("options", [{"pick": "resample", "temperature": 1.7}, {"pick": 2}, {}], ids=str)
def test_the_search_itself_picks_what_is_expected(options):
    """Scores that BestOfM keeps, of 20,000 images with one law of scores; wrong by 6 standard errors: 2e-9 of runs."""
    scores = torch.from_numpy(scores_of(20_000, 6)).float()
    offered = Candidates(
        1,
        5,
        torch.zeros(len(scores), dtype=torch.int64),
        torch.zeros(len(scores), 6, 4, dtype=torch.int64),
        lambda start, stop, dtype=None, channels_last=False: scores[:, start:stop, None, None, None],
        lambda draw=0: uniforms(torch.arange(len(scores)), 6, draw + 1, 1, PICKS)[:, :, draw],
        None,
    )
    index = BestOfM(lambda labels, features, scale: features[:, :, 0, 0, 0], 6, **options).choose(offered).index
    kept = scores.gather(1, index[:, None])[:, 0].double().numpy()
    pick, temperature = options.get("pick", "best"), options.get("temperature", 1.0)
    error = kept - planning.expected_pick(scores.double().numpy(), 6, pick, temperature)
    assert abs(error.mean()) <= 6 * error.std() / math.sqrt(len(error)) + 1e-9


def test_gains_are_means_over_images_with_their_errors():
    first, second = torch.from_numpy(scores_of(3, 8)), torch.from_numpy(scores_of(2, 8, seed=1))
    gains = planning.measure_gains([[None, first], [None, second]], CHOICES, "best", 1.0)
    assert gains.means.shape == gains.errors.shape == (2, 4)
    assert gains.means[0, 0] == gains.errors[0, 0] == 0 and np.isnan(gains.means[0, 1:]).all()
    for place, m in enumerate(CHOICES):
        by_image = [
            statistics.fmean(map(max, itertools.combinations(row, m))) - statistics.fmean(row)
            for row in [*first.tolist(), *second.tolist()]
        ]
        assert gains.means[1, place] == pytest.approx(statistics.fmean(by_image), abs=1e-12)
        assert gains.errors[1, place] == pytest.approx(statistics.stdev(by_image) / math.sqrt(5), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="scorer must give finite scores to be planned with, but some at scale 1 are"):
        planning.measure_gains([[None, scores]], CHOICES, "best", 1.0)


# Costs


def test_costs_are_measured_in_turn_and_the_first_round_is_left_out():
    asked = []

    def seconds_of(m):
        asked.append(m)
        return [float(len(asked)), 10.0 * m, 0.5]

    times = planning.measure_costs(seconds_of, (1, 4, 9), 2)
    assert asked == [1, 4, 1, 9] * 3
    assert times.shape == (2, 2, 2, 3)
    assert times[:, :, :, 0].ravel().tolist() == list(range(5, 13))
    assert (times[:, :, 0, 1] == 10).all() and (times[:, :, 1, 1] == [40, 90]).all()


def test_the_line_is_the_nonnegative_least_squares_one():
    """Against SciPy, over lines that rise, fall, start below 0, and noise alone."""
    rng, edges = np.random.default_rng(0), Counter()
    for _ in range(600):
        x = np.sort(rng.choice(200, rng.integers(2, 8), replace=False)).astype(float)
        y = rng.normal() + rng.normal() * 0.05 * x + rng.normal(size=len(x)) * rng.choice([0.0, 0.1, 1.0])
        level = rng.random(len(x)) + 0.1
        (a, b), _ = nnls(np.stack([1 / level, x / level], 1), y / level)
        assert planning.fit_line(x, y, level) == pytest.approx(a + b * x, abs=1e-9)
        edges[a > 0, b > 0] += 1
    assert min(edges[case] for case in itertools.product((False, True), repeat=2)) >= 20


def times_of(start, each, choices=CHOICES, repeats=3, base=(1.0, 2.0, 3.0), decoding=4.0):
    """Times ``[repeats, C - 1, 2, K + 1]`` of a machine on which M candidates cost ``start + each * (M - 1)`` more."""
    alone = np.array([*base, decoding])
    pairs = [[alone, alone + [*(a + b * (m - 1) for a, b in zip(start, each, strict=True)), 0]] for m in choices[1:]]
    return np.array([pairs] * repeats)


START, EACH = (0.0, 0.5, 0.2), (0.0, 0.25, 0.0)


def test_costs_of_a_machine_without_noise_are_exact():
    base_seconds, costs = planning.fit_costs(times_of(START, EACH), CHOICES)
    assert base_seconds == 10.0
    assert costs == pytest.approx(np.array([[0] * 4, [0, 0.75, 1.0, 2.25], [0, 0.2, 0.2, 0.2]]), abs=1e-12)


def test_costs_mind_neither_one_slow_generation_nor_a_machine_that_slows_down():
    exact = planning.fit_costs(times_of(START, EACH), CHOICES)[1]
    slow = times_of(START, EACH)
    slow[1, 2, 1] += 50.0
    slow[0, 0, 0] += 50.0
    assert planning.fit_costs(slow, CHOICES)[1] == pytest.approx(exact, abs=1e-12)
    slower = times_of(START, EACH) + np.arange(3)[:, None, None, None]  # a second a scale more in every round
    base_seconds, costs = planning.fit_costs(slower, CHOICES)
    assert base_seconds == 14.0 and costs[:2] == pytest.approx(exact[:2], abs=1e-12)


def test_a_search_that_measures_faster_costs_nothing():
    assert not planning.fit_costs(times_of((-0.1,) * 3, (0.0,) * 3), CHOICES)[1].any()


def test_no_choice_is_cheap_by_its_noise_alone():
    """One choice that measured 5% too fast stays dearer than the one before it and cheaper than the one after."""
    choices = (1, 2, 4, 8, 16, 32)
    times = times_of((0.1,), (0.01,), choices, base=(1.0,))
    times[:, 2, 1] *= 0.95
    costs = planning.fit_costs(times, choices)[1][0]
    assert (np.diff(costs) > 0).all() and costs[3] > 0.1


# The choice


def brute_force(gains, costs, budget):
    """The largest gain, and its least cost, over all combinations."""
    best = (-math.inf, 0.0)
    for combination in itertools.product(*(np.flatnonzero(~np.isnan(row)) for row in gains)):
        cost = gain = 0.0
        for scale, place in enumerate(combination):
            cost, gain = cost + costs[scale, place], gain + gains[scale, place]
        if cost <= budget:
            best = max(best, (gain, -cost))
    return best[0], -best[1]


@pytest.mark.parametrize("kind", ["rising", "any", "ties", "free", "not searched"])
def test_the_choice_is_the_best_of_all(kind):
    rng = np.random.default_rng(0)
    for number in range(80):
        shape = (int(rng.integers(1, 5)), int(rng.integers(2, 6)))
        gains, costs = rng.normal(size=shape), rng.random(shape)
        if kind == "rising":
            gains, costs = np.abs(gains).cumsum(1), costs.cumsum(1)
        if kind == "ties":
            gains, costs = rng.integers(-1, 3, shape).astype(float), rng.integers(0, 3, shape).astype(float)
        if kind == "free":
            costs[rng.random(shape) < 0.5] = 0
        gains[:, 0] = costs[:, 0] = 0
        if kind == "not searched":
            gains[rng.integers(shape[0]), 1:] = np.nan
            costs[np.isnan(gains)] = np.nan
        for budget in (0.0, float(rng.random() * 3), float(rng.integers(0, 5)), 1e308):
            chosen = planning.choose(gains, costs, budget)
            rows = range(len(chosen))
            cost = sum(costs[scale, chosen[scale]] for scale in rows)
            gain = sum(gains[scale, chosen[scale]] for scale in rows)
            assert (gain, cost) == pytest.approx(brute_force(gains, costs, budget), abs=1e-12), (number, budget)
            assert cost <= budget


def test_without_a_budget_only_what_is_free_is_chosen():
    gains, costs = np.array([[0.0, 1, 2], [0, 3, 2], [0, -1, 0]]), np.array([[0.0, 0, 1e-9], [0, 0, 0], [0, 0, 0]])
    assert planning.choose(gains, costs, 0.0) == [1, 1, 0]
    assert planning.choose(gains, costs + [0, 1, 1], 0.0) == [0, 0, 0]
    assert planning.choose(gains, costs, 1e308) == [2, 1, 0]


def test_ten_scales_of_eight_choices_are_chosen_among_at_once():
    """Against the greedy choice by gain over cost, which for concave gains is the best within its own cost."""
    gains = np.log2(planning.CHOICES) * np.linspace(0.2, 2, 10)[:, None]
    costs = (np.array(planning.CHOICES) - 1.0) * np.linspace(1, 3, 10)[:, None]
    steps = sorted(
        ((gains[k, c] - gains[k, c - 1]) / (costs[k, c] - costs[k, c - 1]), k) for k in range(10) for c in range(1, 8)
    )
    greedy = [0] * 10
    for _, scale in steps[:-31:-1]:
        greedy[scale] += 1
    budget = sum(costs[k, greedy[k]] for k in range(10))
    assert planning.choose(gains, costs, budget * (1 + 1e-12)) == greedy


# Whole plans


def mean_feature(labels, features, scale):
    return (features * torch.arange(features.shape[2], device=features.device).view(-1, 1, 1)).mean((2, 3, 4)) * 10


def each_class_its_own(labels, features, scale):
    return mean_feature(labels, features, scale) * (labels + 1)[:, None]


class Everything:
    """Draws M candidates at every scale and keeps the first, remembering their fused features."""

    def __init__(self, m):
        self.m, self.features = m, {}

    def check(self, spec): ...

    def check_labels(self, highest, spec): ...

    def num_candidates(self, scale, num_scales):
        return self.m

    def choose(self, candidates):
        self.features[candidates.scale] = candidates.fuse(0, self.m)
        return Choice(candidates.tokens[:, 0, 0] * 0, candidates.uniforms())


@pytest.fixture
def timed(monkeypatch):
    """Costs of a machine on which every scale has its price, in place of times; remembers how it was asked."""

    def measure_costs(seconds_of, choices, repeats):
        told = seconds_of(1), seconds_of(choices[-1])
        assert len(told[0]) == len(told[1]) and min(told[0] + told[1]) >= 0
        scales = range(1, len(told[0]))
        return times_of(
            [0.05 * k for k in scales], [0.01 * k for k in scales], choices, repeats, [1.0] * len(scales), 2.0
        )

    monkeypatch.setattr(planning, "measure_costs", measure_costs)


@pytest.mark.parametrize("pick", ["best", "resample", 2], ids=str)
@pytest.mark.parametrize("options", [{}, {"first_scale": 0, "last_scale": 2}, {"first_scale": 4}], ids=str)
def test_gains_are_those_of_candidates_on_the_models_own_trajectory(timed, options, pick):
    model = small_var()
    result = plan(model, each_class_its_own, labels=[2, 5, 1], seeds=9, pick=pick, temperature=1.5, **SMALL, **options)
    everything, classes = Everything(8), torch.tensor([2, 5, 1, 2, 5, 1])
    generate(model, classes, search=everything, seeds=image_seeds(9, 6), cfg=2.0, top_k=30, top_p=0.96)
    searched = range(options.get("first_scale", 1), options.get("last_scale", 4) + 1)
    for scale in range(5):
        if scale not in searched:
            assert result.gains[scale][0] == result.costs[scale][0] == 0 and result.m[scale] == 1
            assert np.isnan([*result.gains[scale][1:], *result.costs[scale][1:]]).all()
            continue
        scores = each_class_its_own(classes, everything.features[scale], scale).double().numpy()
        for place, m in enumerate(CHOICES):
            by_image = planning.expected_pick(scores, m, pick, 1.5) - scores.mean(1)
            assert result.gains[scale][place] == pytest.approx(by_image.mean(), abs=1e-4)
            error = by_image.std(ddof=1) / math.sqrt(6)
            assert result.gain_errors[scale][place] == pytest.approx(error, abs=1e-4)
    rows = np.arange(5)
    assert result.base_seconds == 7.0 and result.choices == CHOICES and result.sides == (1, 2, 3, 4, 6)
    places = [CHOICES.index(m) for m in result.m]
    assert result.gain == pytest.approx(np.array(result.gains)[rows, places].sum())
    assert result.overhead == pytest.approx(np.array(result.costs)[rows, places].sum() / 7)


def test_the_plan_is_the_best_within_its_budget_and_more_money_buys_more(timed):
    model = small_var()
    broke = plan(model, mean_feature, 0.0, **SMALL)
    assert broke.m == (1,) * 5 and broke.gain == broke.overhead == 0
    plans = [broke.within(overhead) for overhead in (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)]
    for overhead, found in zip((0.01, 0.02, 0.05, 0.1, 0.3, 1.0), plans, strict=True):
        assert found.overhead <= overhead * (1 + 1e-12)
        gains, costs = np.array(found.gains), np.array(found.costs)
        assert found.gain == pytest.approx(brute_force(gains, costs, overhead * 7)[0], abs=1e-12)
    assert all(a.gain <= b.gain for a, b in itertools.pairwise(plans)) and len({found.m for found in plans}) > 3
    assert broke.within(1e9).m == (1, *(CHOICES[int(np.argmax(row))] for row in broke.gains[1:]))
    assert plan(model, mean_feature, 0.3, **SMALL).m == plans[4].m
    generate(model, None, batch_size=2, search=BestOfM(mean_feature, m=plans[4].m))


def test_batches_change_no_gain(timed):
    model = small_var()
    one, other = (
        plan(model, mean_feature, **{**SMALL, "batch_size": batch_size, "images": 5}, maps_at_once=maps)
        for batch_size, maps in ((2, 1024), (8, 3))
    )
    assert np.array(one.gains) == pytest.approx(np.array(other.gains), abs=1e-4, nan_ok=True)


def test_costs_are_measured_at_the_batch_size_asked_for(monkeypatch, timed):
    asked = []

    def spied(model, labels, **options):
        asked.append((labels.tolist(), options["seeds"].tolist(), options["search"].m, options.get("decode", True)))
        return generate(model, labels, **options)

    monkeypatch.setattr(planning, "generate", spied)
    plan(small_var(), mean_feature, labels=[4, 6], seeds=3, **{**SMALL, "images": 3})
    seeds = image_seeds(3, 4).tolist()
    assert asked == [
        ([4, 6, 4], seeds[:3], 8, False),
        ([4, 6, 4, 6], seeds, 1, True),
        ([4, 6, 4, 6], seeds, 8, True),
    ]


@pytest.mark.parametrize(
    "labels, wanted",
    [
        (4, [4] * 6),
        (-1, [NUM_CLASSES] * 6),
        ((3, 0), [3, 0] * 3),
        (np.array([3, 0, 1, 2]), [3, 0, 1, 2, 3, 0]),
        (torch.tensor([6, 1, 1, 0, 2, 3, 5], dtype=torch.uint8), [6, 1, 1, 0, 2, 3]),
    ],
    ids=["one", "no class", "tuple", "array", "more than images"],
)
def test_images_take_the_labels_in_turn(timed, labels, wanted):
    seen = []

    def scorer(labels, features, scale):
        seen.append(labels.tolist())
        return mean_feature(labels, features, scale)

    plan(small_var(), scorer, labels=labels, **{**SMALL, "batch_size": 6})
    assert seen[0] == wanted


def test_drawn_labels_are_even_and_go_by_the_seed(timed):
    def drawn(seeds):
        seen = []

        def scorer(labels, features, scale):
            seen.extend(labels.tolist() if scale == 1 else [])
            return mean_feature(labels, features, scale)

        plan(small_var(), scorer, seeds=seeds, **{**SMALL, "images": 21, "batch_size": 21})
        return seen[:21]

    assert Counter(drawn(0)) == dict.fromkeys(range(NUM_CLASSES), 3)
    assert drawn(0) == drawn(0) != drawn(1)


def test_a_patch_changes_no_plan_and_stays(timed):
    model = small_var()
    plain = plan(model, mean_feature, 0.3, **SMALL)
    patch(model, BestOfM(mean_feature, m=7))
    method, weights = vars(model)["autoregressive_infer_cfg"], {k: v.clone() for k, v in model.state_dict().items()}
    before = random_states(model)
    found = plan(model, mean_feature, 0.3, **SMALL)
    assert repr(found) == repr(plain)  # NaN is not equal to itself
    assert vars(model)["autoregressive_infer_cfg"] is method
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert caches_closed(model)
    assert all(torch.equal(*states) for states in zip(before, random_states(model), strict=True))


def test_a_fork_and_a_trained_scorer_under_autocast(timed, device):
    """The scorer sees autocast's dtype and its own memory format."""
    model, scorer, seen = on(forked(), device), small_scorer().to(device), []
    scorer.register_forward_pre_hook(lambda _, given: seen.append((given[1].dtype, given[1].shape[1])))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        found = plan(model, scorer, 0.5, maps_at_once=12, **SMALL)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16} and max(count for _, count in seen) == 6
    assert found.gain > 0 and found.m[0] == 1


def test_flexvar_and_its_greedy_scales(timed):
    model, vae = small_flexvar()
    options = {"vqvae": vae, "infer_patch_nums": (1, 2, 7, 4), "max_pn": 16}
    found = plan(model, mean_feature, 1.0, **SMALL, **options)
    assert found.sides == (1, 2, 7, 4) and found.m[0] == found.m[2] == 1  # a side of 7 is sampled greedily
    assert np.isnan(found.gains[2][1:]).all() and found.m[1] > 1 and found.m[3] > 1


def test_no_wait_while_candidates_are_scored():
    search = planning.Trajectory(mean_feature, 8)
    features = torch.randn(3, 8, 8, 6, 6)
    offered = Candidates(
        1, 5, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 8, 4), lambda a, b, **_: features[:, a:b], None, None
    )
    with Waits() as waits:
        choice = search.choose(offered)
    assert waits.count == 0 and choice.index.tolist() == [0, 0, 0] and choice.index.dtype == torch.int64
    assert torch.equal(choice.scores, mean_feature(None, features, 1))


def test_real_times_make_a_plan():
    found = plan(small_var(), mean_feature, 0.5, **SMALL, repeats=1)
    costs = np.array(found.costs)[1:]
    assert found.base_seconds > 0 and np.isfinite(costs).all() and (costs >= 0).all() and (costs[:, 0] == 0).all()
    assert (np.diff(costs[:, 1:]) >= 0).all() and found.overhead <= 0.5 * (1 + 1e-12)


def test_the_table(timed):
    text = str(plan(small_var(), mean_feature, 0.3, **SMALL))
    lines = text.splitlines()
    assert lines[0].split() == ["scale", "side", "m", "gain", "±", "error", "cost"]
    assert [line.split()[:2] for line in lines[1:6]] == [[str(k), f"{s}x{s}"] for k, s in enumerate((1, 2, 3, 4, 6))]
    assert len({len(line) for line in lines[:7]}) == 1
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:7]]
    assert sum(shares[:5]) == pytest.approx(shares[5], abs=0.05) and 0 < shares[5] <= 30
    assert lines[7] == "cost: share of 7 s, a generation with one candidate a scale"
    assert "nan" not in text


# Bad input

BAD = {
    "overhead below 0": ({"overhead": -0.1}, r"overhead must be a finite number >= 0, got -0.1"),
    "overhead infinite": ({"overhead": math.inf}, r"overhead must be a finite number >= 0, got inf"),
    "overhead NaN": ({"overhead": math.nan}, r"overhead must be a finite number >= 0, got nan"),
    "overhead a text": ({"overhead": "1%"}, r"overhead must be a finite number >= 0, got '1%'"),
    "batch size 0": ({"batch_size": 0}, r"batch_size must be an int >= 1, got 0"),
    "one image": ({"images": 1}, r"images must be an int >= 2, got 1"),
    "no repeats": ({"repeats": 0}, r"repeats must be an int >= 1, got 0"),
    "choices without 1": ({"choices": (2, 4)}, r"choices must be increasing ints from 1, .*, got \(2, 4\)"),
    "choices not increasing": ({"choices": (1, 4, 4)}, r"choices must be increasing ints from 1, .*, got \(1, 4, 4\)"),
    "nothing to choose": ({"choices": (1,)}, r"choices must be increasing ints from 1, .*, got \(1,\)"),
    "choices of fractions": ({"choices": (1, 2.5)}, r"choices must be increasing ints from 1, .*, got \(1, 2.5\)"),
    "choices an int": ({"choices": 8}, r"choices must be increasing ints from 1, .*, got 8"),
    "pick": ({"pick": "worst"}, r"pick must be 'best', 'resample' or an int >= 1, got 'worst'"),
    "temperature": ({"temperature": 0}, r"temperature must be a finite number > 0, got 0"),
    "maps at once": ({"maps_at_once": 0}, r"maps_at_once must be an int >= 1, got 0"),
    "first scale beyond": ({"first_scale": 5}, r"first_scale must be < 5, the model's scales, got 5"),
    "last before first": ({"last_scale": 0}, r"last_scale must be an int >= first_scale=1, got 0"),
    "last scale beyond": ({"last_scale": 5}, r"last_scale must be < 5, the model's scales, got 5"),
    "scorer no callable": ({"scorer": 3}, r"scorer must be callable, got int"),
    "scorer of other classes": (
        {"scorer": small_scorer(num_classes=8)},
        r"scorer was made for num_classes=8, but the model has num_classes=7",
    ),
    "scorer without no class": (
        {"scorer": small_scorer(), "labels": -1},
        r"in 0..6, the scorer's classes, got 7, which means 'no class'",
    ),
    "label too large": ({"labels": [0, 9]}, r"must be in 0..7, got 0..9"),
    "label below 0": ({"labels": [0, -1]}, r"must be in 0..7, got -1..0"),
    "no labels": ({"labels": []}, r"labels must name at least one class, in one dimension, got shape \[0\]"),
    "labels in rows": ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels must name .*, got shape \[2, 2\]"),
    "labels of fractions": ({"labels": torch.zeros(3)}, r"labels must be integers, got torch.float32"),
    "labels of words": ({"labels": ["cat"]}, r"labels must be an int, several ints, a tensor or None, got \['cat'\]"),
    "labels a word": ({"labels": "cat"}, r"labels must be an int, several ints, a tensor or None, got 'cat'"),
    "labels a number": ({"labels": 1.5}, r"labels must be an int, several ints, a tensor or None, got 1.5"),
    "seeds a tensor": ({"seeds": torch.arange(4)}, r"seeds must be an int, got Tensor"),
    "seeds too large": ({"seeds": 2**64}, r"g_seed must be < 2\*\*64, got 18446744073709551616"),
    "cfg by image": ({"cfg": torch.ones(4, 1, 1)}, r"cfg must be one strength for all images, got shape \[4, 1, 1\]"),
    "cfg infinite": ({"cfg": math.inf}, r"cfg must be a finite number"),
    "top_k": ({"top_k": -1}, r"top_k must be an int >= 0, got -1"),
    "top_p": ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
    "unknown option": ({"sampler": "philox"}, r"a VAR model has no option 'sampler'"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_before_any_work(changes, message):
    model = small_var()
    arguments = {"scorer": mean_feature, **SMALL, **changes}
    with idle(model), pytest.raises((ValueError, TypeError), match=message):
        plan(model, **arguments)


def test_a_budget_is_checked_again(timed):
    found = plan(small_var(), mean_feature, **SMALL)
    with pytest.raises(ValueError, match="overhead must be a finite number >= 0, got -1"):
        found.within(-1)


def test_models_of_other_kinds_are_refused():
    with pytest.raises(UnsupportedModelError, match="plan serves models of classes, and Infinity is an Infinity model"):
        plan(small_infinity()[0], mean_feature)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        plan(torch.nn.Linear(2, 2), mean_feature)
    with pytest.raises(ValueError, match="infer_patch_nums must be a sequence of sides"):
        plan(small_flexvar()[0], mean_feature)
