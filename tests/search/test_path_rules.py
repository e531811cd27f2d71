"""The rules of a search over paths against plain forms of them, against all outcomes, and their distributions."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.references import path_rules as reference
from varkern.draws import PhiloxDraws
from varkern.ops import image_seeds, philox
from varkern.search import Cluster, Paths, Resample, Top
from varkern.search.path_rules import k_means, squared_distances

from .test_block_resample_exactly import p_value

FALSE_ALARM = 1e-7
KINDS = ("value", "maximum", "sum", "difference")


def offered(rewards, kept, history=(), features=None, seeds=None, scale=2, uniforms=None):
    """Paths of B images with these rewards ``[B, n]``."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    draws = PhiloxDraws(image_seeds(0, len(rewards)) if seeds is None else seeds)

    def given(count):
        return uniforms if uniforms is not None else draws.selections(scale, count)

    return Paths(
        scale,
        5,
        rewards.shape[1],
        kept,
        torch.zeros(rewards.numel(), dtype=torch.int64),
        lambda: rewards,
        tuple(torch.as_tensor(h, dtype=torch.float64) for h in history),
        lambda: features,
        given,
    )


def logarithms(weights):
    return [-math.inf if weight == 0 else math.log(weight) for weight in weights]


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
def test_resampling_is_the_plain_form_for_all_small_weights(kept):
    weights = [w for n in (1, 2, 3, 4) for w in itertools.product((0, 1, 2, 5), repeat=n) if any(w)]
    for u in (0, 2**-24, 0.25, 1 / 3, 0.5, 1 - 2**-24):
        u = torch.tensor(u, dtype=torch.float32)
        for row in weights:
            paths = offered([logarithms(row)], kept, uniforms=u.view(1, 1))
            found = Resample(strength=1.0)(paths)[0].tolist()
            assert found == reference.systematic(row, kept, u.item() + 2**-25), (row, u)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_potentials_count_the_rewards_of_a_path(kind, length):
    generator = np.random.default_rng(length)
    rewards = generator.normal(size=(length, 40, 3))
    *history, now = rewards
    u = torch.full((40, 1), 0.375)
    for strength in (10.0, -2.5):
        found = Resample(strength, kind)(offered(now, 4, history, uniforms=u))
        for image in range(40):
            weights = [
                math.exp(strength * reference.potentials(list(rewards[:, image, path]), kind)) for path in range(3)
            ]
            assert found[image].tolist() == reference.systematic(weights, 4, 0.375 + 2**-25)
    order = Top(kind)(offered(now, 2, history))
    for image in range(40):
        values = [reference.potentials(list(rewards[:, image, path]), kind) for path in range(3)]
        assert order[image].tolist() == sorted(sorted(range(3), key=lambda path: -values[path])[:2])


def test_copies_are_the_weights_rounded_up_or_down():
    rewards = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1))
    found = Resample(2.0)(offered(rewards, 7))
    assert torch.equal(found, found.sort(1).values)
    copies = (found.unsqueeze(2) == torch.arange(5)).sum(1)
    expected = 7 * (2.0 * rewards.double()).softmax(1)
    assert ((copies - expected).abs() < 1 + 1e-9).all()
    assert copies.min() == 0 and (copies > expected).any()


@pytest.mark.parametrize("weights, kept", [((3, 1, 2), 1), ((0.2, 0.5, 0.1, 0.9), 2), ((1, 1, 5), 3), ((5, 0, 2), 4)])
def test_the_distribution_of_survivors(weights, kept):
    """30,000 images against the probability of every outcome; chance fails one of these in 10 million runs."""
    count = 30_000
    found = Resample(1.0)(offered([logarithms(weights)] * count, kept))
    wanted = reference.outcomes(weights, kept)
    assert sum(wanted.values()) == pytest.approx(1)
    numbers = {outcome: i for i, outcome in enumerate(wanted)}
    counts = np.bincount([numbers[tuple(row)] for row in found.tolist()], minlength=len(wanted))
    expected = np.array(list(wanted.values())) * count
    assert len(wanted) == 1 or p_value(counts, expected) > FALSE_ALARM / 4
    assert len(wanted) == 1 or p_value(counts[::-1], expected) < 1e-12


def test_equal_weights_keep_every_path():
    for n in (1, 2, 3, 5, 7, 8, 16, 31):
        found = Resample()(offered(torch.full((500, n), -3.3), n))
        assert torch.equal(found, torch.arange(n).expand(500, -1))


@pytest.mark.parametrize(
    "rewards, wanted",
    [
        ([-math.inf] * 3, [0, 1, 2]),
        ([math.inf, 0.0, math.inf], [0, 2, 2]),
        ([-math.inf, 1e308, -1e308], [1, 1, 1]),
        ([math.inf] * 3, [0, 1, 2]),
    ],
    ids=str,
)
def test_rewards_that_are_not_finite(rewards, wanted):
    assert Resample()(offered([rewards], 3, uniforms=torch.full((1, 1), 0.75)))[0].tolist() == wanted
    values = [(-reward, path) for path, reward in enumerate(rewards)]
    assert Top()(offered([rewards], 2))[0].tolist() == sorted(path for _, path in sorted(values)[:2])
    late = Resample(1.0, "difference")(offered([rewards], 3, history=[[rewards]], uniforms=torch.full((1, 1), 0.5)))
    assert 0 <= late.min() and late.max() <= 2


def test_of_equal_rewards_the_first_paths_stay():
    assert Top()(offered([[1.0, 3.0, 1.0, 3.0, 1.0]], 4))[0].tolist() == [0, 1, 2, 3]


# ---- Clusters ------------------------------------------------------------------------------------------------------


def clustered(points, kept):
    """What the rule keeps of sets of points ``[B, n, D]``."""
    points = torch.as_tensor(points, dtype=torch.float64)
    return Cluster()(offered(torch.zeros(points.shape[:2]), kept, features=points)).tolist()


@pytest.mark.parametrize("num_paths, kept", [(2, 1), (3, 2), (5, 2), (6, 3), (6, 4), (8, 6), (4, 4), (1, 1), (14, 3)])
@pytest.mark.parametrize("width", [1, 7])
def test_clusters_are_those_of_the_plain_form(num_paths, kept, width):
    points = np.random.default_rng(num_paths * 10 + kept).normal(size=(12, num_paths, width))
    points[::4, -1] = points[::5, 0]  # some paths are equal
    found = clustered(points, kept)
    assert found == [reference.cluster(row, kept) for row in points]
    assert all(len(set(row)) == kept and row == sorted(row) for row in found)


@pytest.mark.parametrize("kept", [2, 3])
def test_clusters_are_the_best_ones_where_these_are_clear(kept):
    generator = np.random.default_rng(kept)
    for _ in range(12):
        centres = generator.normal(size=(kept, 3)) * 20
        of = generator.permutation([*range(kept), *generator.integers(kept, size=7 - kept)])
        points = centres[of] + generator.normal(size=(7, 3)) * 0.2
        labels = k_means(squared_distances(torch.from_numpy(points)[None]), kept, 20)[0]
        assert reference.inertia(points, labels, kept) <= reference.best_inertia(points, kept) * (1 + 1e-9)
        kept_paths = clustered(points[None], kept)[0]
        assert sorted(of[kept_paths]) == sorted(set(of.tolist()))


def test_clusters_are_seldom_worse_than_the_best_of_all_divisions():
    """k-means finds a local minimum; with a start at every path it is the best one in 9 of 10 sets without clusters."""
    points = np.random.default_rng(3).normal(size=(60, 6, 2))
    labels = k_means(squared_distances(torch.from_numpy(points)), 3, 20)
    ratios = np.array(
        [
            reference.inertia(p, row, 3) / reference.best_inertia(p, 3)
            for p, row in zip(points, labels.numpy(), strict=True)
        ]
    )
    assert (ratios > 1 - 1e-9).all() and (ratios < 1 + 1e-9).mean() > 0.9


def test_fewer_different_paths_than_clusters():
    points = np.array([[[0.0], [0.0], [0.0], [5.0], [5.0]], [[1.0]] * 5])
    assert clustered(points, 3) == [[0, 1, 3], [0, 1, 2]]
    assert clustered(points, 5) == [[0, 1, 2, 3, 4]] * 2


def test_an_image_has_the_same_clusters_in_any_batch():
    points = torch.randn(50, 8, 40, generator=torch.Generator().manual_seed(0))
    whole = clustered(points, 3)
    assert [clustered(row[None], 3)[0] for row in points] == whole
    assert clustered(points * 1e-12, 3) == whole
    assert clustered(points[:0], 3) == []


# ---- Random numbers ------------------------------------------------------------------------------------------------


def test_numbers_of_selections_are_their_own():
    seeds = torch.tensor([5, -1, 2**62])
    draws = PhiloxDraws(seeds)
    few, many = draws.selections(3, 1), draws.selections(3, 4)
    assert torch.equal(many[:, :1], few) and many.shape == (3, 4)
    others = torch.cat([draws.picks(3, 4).flatten(), draws.steps(3, 4, 1).flatten(), draws.selections(2, 4).flatten()])
    assert not torch.isin(many, others).any()
    draws.keep(torch.tensor([[0, 0], [1, 1], [2, 2]]), 4)
    assert torch.equal(draws.selections(3, 4), many)  # an image's, whatever its paths are


def test_seeds_of_paths():
    """Path 0 has the image's seed, a path keeps its seed, and every copy has one of its own."""
    seeds = torch.tensor([5, -1, 2**62])
    draws = PhiloxDraws(seeds)
    draws.keep(torch.arange(3).unsqueeze(1).expand(-1, 4), 0)
    first = draws.seeds.view(3, 4)
    assert torch.equal(first[:, 0], seeds) and first.unique().numel() == 12
    fewer = PhiloxDraws(seeds[1:])
    fewer.keep(torch.arange(2).unsqueeze(1).expand(-1, 2), 0)
    assert torch.equal(fewer.seeds.view(2, 2), first[1:, :2])
    rows = torch.tensor([[3, 1, 3], [4, 4, 4], [8, 9, 11]])
    draws.keep(rows, 2)
    second = draws.seeds.view(3, 3)
    assert torch.equal(second[0, :2], first[0, [3, 1]]) and torch.equal(second[2], first[2, [0, 1, 3]])
    assert second[1, 0] == first[1, 0] and second.unique().numel() == 9
    made = [second[0, 2].item(), *second[1, 1:].tolist()]
    assert not set(made) & set(first.flatten().tolist())
    for seed, copy, found in [(first[0, 3], 1, made[0]), (first[1, 0], 1, made[1]), (first[1, 0], 2, made[2])]:
        low, high, *_ = philox.philox(
            seed.item() & 0xFFFFFFFF, seed.item() >> 32 & 0xFFFFFFFF, copy, 0, 2, philox.PATHS
        )
        assert found % 2**64 == high << 32 | low


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Resample(math.inf), "strength must be a finite number, got inf"),
        (lambda: Resample("10"), "strength must be a finite number, got '10'"),
        (lambda: Resample(potential="product"), "potential must be one of 'value', 'maximum'.*, got 'product'"),
        (lambda: Top("best"), "potential must be one of .*, got 'best'"),
        (lambda: Cluster(0), "iterations must be an int >= 1, got 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
