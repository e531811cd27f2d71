"""Block resampling of a toy of three tokens, against every probability enumerated, and against the distribution that
it is to leave unchanged."""

import itertools

import numpy as np
import pytest
import torch

from tests.references import block_resampling as reference
from varkern import BlockResample
from varkern.draws import PhiloxDraws
from varkern.ops import image_seeds
from varkern.ops.keeping import Kept
from varkern.search import Candidates
from varkern.spec import Logits

WHOLE, SINGLE = ((0, 1, 2),), ((0,), (1,), (2,))
SHIFTED = [((0,), (1, 2)), ((0, 1), (2,))]  # blocks of two tokens: the edge lies before or after the second
FALSE_ALARM = 1e-7


class Toy:
    """Tokens of ``values`` values, with their marginals under the model, and the scores of all maps."""

    def __init__(self, values=4, seed=0, spread=1.0):
        generator = np.random.default_rng(seed)
        self.values, self.maps = values, values**3
        self.marginals = generator.dirichlet(np.full(values, 2.0), 3)
        self.model = reference.probabilities(self.marginals)
        self.scores = generator.normal(0, spread, self.maps)

    def weights(self, temperature=1.0):
        return np.exp(self.scores / temperature)

    def target(self, temperature=1.0):
        unnormalised = self.model * self.weights(temperature)
        return unnormalised / unnormalised.sum()

    def scorer(self, labels, features, scale):
        return torch.from_numpy(self.scores).float()[features[:, :, 0, 0, 0].long()]

    def number(self, maps):
        """Of every map ``[..., 3]``."""
        return (maps * torch.tensor([self.values**2, self.values, 1])).sum(-1)

    def offered(self, tokens, draws, scale=2):
        """Candidates whose only feature is the number of the map."""

        def fuse_maps(maps, dtype=None, channels_last=False):
            return self.number(maps)[..., None, None, None].double()

        batch, count = tokens.shape[:2]
        return Candidates(
            scale,
            5,
            torch.zeros(batch, dtype=torch.int64),
            tokens,
            lambda start, stop, **wanted: fuse_maps(tokens[:, start:stop]),
            lambda draw=0: draws.picks(scale, count, draw),
            torch.zeros(self.values, 1),
            fuse_maps=fuse_maps,
            grid=(1, 3),
            step_uniforms=lambda count, steps: draws.steps(scale, count, steps),
        )

    def chosen(self, search, count, seed=0):
        """How often each map is kept, in ``count`` images whose tokens are drawn as in any generation."""
        found = torch.zeros(self.maps, dtype=torch.int64)
        logits = torch.from_numpy(self.marginals).log()
        for part, seeds in enumerate(image_seeds(seed, count).split(10_000)):
            draws = PhiloxDraws(seeds)
            of_all = Logits(logits.expand(len(seeds), -1, -1), None, 0.0)
            tokens = draws.tokens(of_all, 2, search.num_candidates(2, 5))
            choice = search.choose(self.offered(tokens, draws))
            assert part or choice.index.max() < search.m
            found += torch.bincount(self.number(choice.tokens), minlength=self.maps)
        return found


def p_value(counts, expected):
    """Of Pearson's chi-square; expected counts below 10 are joined."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    few = expected < 10
    if few.any():
        counts = np.append(counts[~few], counts[few].sum())
        expected = np.append(expected[~few], expected[few].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), torch.tensor(statistic / 2)).item()


# ---- The method, by enumeration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", [1, 2, 3])
@pytest.mark.parametrize("block", [(0,), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_step_is_reversible(block, proposals, temperature):
    toy = Toy(values=3 if len(block) > 1 else 4)
    pi, matrix = (
        toy.target(temperature),
        reference.step(toy.marginals, toy.weights(temperature), block, proposals),
    )
    flow = pi[:, None] * matrix
    assert np.abs(matrix.sum(1) - 1).max() < 1e-13
    assert np.abs(flow - flow.T).max() < 1e-16
    assert (matrix > 0).sum() == toy.maps * toy.values ** len(block)


def test_one_proposal_is_barkers_rule():
    toy = Toy()
    weights, matrix = toy.weights(), reference.step(toy.marginals, toy.weights(), (1,), 1)
    for x, y in itertools.permutations(range(toy.maps), 2):
        first, second = (np.unravel_index(i, (4, 4, 4)) for i in (x, y))
        differ = first[0] == second[0] and first[2] == second[2]
        wanted = toy.marginals[1, second[1]] * weights[y] / (weights[x] + weights[y]) if differ else 0.0
        assert matrix[x, y] == pytest.approx(wanted, abs=1e-15)


# ---- The search, by enumeration ------------------------------------------------------------------------------------


class Forced(BlockResample):
    """Keeps at each choice what it is told to, and remembers with what probability it would have."""

    def picked(self, scale, scores, uniforms):
        return self.force(scores, uniforms(), self.temperature)

    def keep(self, kept, score, maps, scores, noise, temperature):
        scores = torch.cat((score[:, None], scores), 1)
        forced, images = self.force(scores, noise, temperature), torch.arange(len(scores))
        return Kept(torch.cat((kept[:, None], maps), 1)[images, forced], scores[images, forced], forced)

    def force(self, scores, noise, temperature):
        assert noise.shape == scores.shape and len(scores) == self.count
        forced = self.forced.pop(0)
        weights = (scores.double() / temperature).softmax(1)
        self.chance = self.chance * weights.gather(1, forced[:, None])[:, 0]
        return forced


def kernel_of(toy, proposals, sweeps, blocks, partitions, temperature=1.0):
    """``[maps, maps]``: the kernel of the search itself, from the map of its first candidate to what it keeps.

    Every first map, every map of the other candidates and every pick is enumerated; a search whose picks are forced
    says how probable each pick is, and the candidates are as probable as the model says.
    """
    others, steps = proposals * sweeps, sweeps * len(partitions[0])
    search = Forced(toy.scorer, 1, proposals, blocks, sweeps, temperature=temperature)
    maps = torch.tensor(reference.all_maps(3, toy.values))
    grids = [torch.arange(toy.maps)] * (1 + others) + [torch.arange(proposals + 1)] * steps
    numbers = torch.cartesian_prod(*grids)
    search.count, search.chance = len(numbers), torch.ones(len(numbers), dtype=torch.float64)
    search.forced = [torch.zeros(len(numbers), dtype=torch.int64), *numbers[:, 1 + others :].T]
    candidates = toy.offered(maps[numbers[:, : 1 + others]], PhiloxDraws(torch.arange(len(numbers))))
    choice = search.choose(candidates)
    assert choice.scores.shape == (len(numbers), 1 + steps * proposals)
    chance = search.chance * torch.from_numpy(toy.model)[numbers[:, 1 : 1 + others]].prod(1)
    kernel = torch.zeros(toy.maps, toy.maps, dtype=torch.float64)
    kernel.index_put_((numbers[:, 0], toy.number(choice.tokens)), chance, accumulate=True)
    return kernel.numpy()


@pytest.mark.parametrize(
    "values, proposals, sweeps, blocks, partitions",
    [
        (4, 1, 1, 1, [SINGLE]),
        (4, 1, 1, 3, [WHOLE]),
        (4, 1, 1, 99, [WHOLE]),
        (3, 2, 1, 3, [WHOLE]),
        (2, 2, 1, 1, [SINGLE]),
        (2, 3, 1, 3, [WHOLE]),
        (2, 1, 2, 1, [SINGLE]),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_kernel_of_the_search(values, proposals, sweeps, blocks, partitions, temperature):
    """Entry by entry that of the enumerated steps, to the rounding of scores in float32."""
    toy = Toy(values)
    wanted = reference.sweep(toy.marginals, toy.weights(temperature), partitions, proposals)
    wanted = np.linalg.matrix_power(wanted, sweeps)
    found = kernel_of(toy, proposals, sweeps, blocks, partitions, temperature)
    assert np.abs(found - wanted).max() < 1e-6
    pi = toy.target(temperature)
    assert np.abs(pi @ found - pi).max() < 1e-6


def test_the_kernel_with_edges_that_move():
    """Given where the edge is, the kernel is that of the partition; one image in two has either."""
    toy, count = Toy(2), 4000
    kernels = [reference.sweep(toy.marginals, toy.weights(), [blocks], 1) for blocks in SHIFTED]
    maps = torch.tensor(reference.all_maps(3, 2))
    seen = {}
    for seed in range(30):  # one seed for all maps and picks at a time
        numbers = torch.cartesian_prod(*[torch.arange(8)] * 2, *[torch.arange(2)] * 2)
        search = Forced(toy.scorer, 1, 1, 2)
        search.count, search.chance = len(numbers), torch.ones(len(numbers), dtype=torch.float64)
        search.forced = [torch.zeros(len(numbers), dtype=torch.int64), *numbers[:, 2:].T]
        choice = search.choose(toy.offered(maps[numbers[:, :2]], PhiloxDraws(torch.full((len(numbers),), seed))))
        chance = search.chance * torch.from_numpy(toy.model)[numbers[:, 1]]
        kernel = torch.zeros(8, 8, dtype=torch.float64)
        kernel.index_put_((numbers[:, 0], toy.number(choice.tokens)), chance, accumulate=True)
        fits = [np.abs(kernel.numpy() - wanted).max() < 1e-6 for wanted in kernels]
        assert sum(fits) == 1
        seen[seed] = fits[0]
    assert set(seen.values()) == {True, False}
    # The mixture, by draws: 8 starts of 4,000 images each.
    start = maps.repeat_interleave(count, 0).unsqueeze(1)
    draws = PhiloxDraws(image_seeds(5, 8 * count))
    of_all = Logits(torch.from_numpy(toy.marginals).log().expand(8 * count, -1, -1), None, 0.0)
    tokens = torch.cat((start, draws.tokens(of_all, 2, 1)), 1)
    kept = toy.number(BlockResample(toy.scorer, 1, 1, 2).choose(toy.offered(tokens, draws)).tokens).view(8, count)
    wanted = reference.sweep(toy.marginals, toy.weights(), SHIFTED, 1)
    for row, expected in zip(kept, wanted * count, strict=True):
        assert p_value(torch.bincount(row, minlength=8), expected) > FALSE_ALARM / 8


# ---- Distributions of whole searches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "m, proposals, blocks, partitions, temperature",
    [
        (2, 2, 1, [SINGLE], 1.0),
        (1, 1, 2, SHIFTED, 1.0),
        (1, 3, 1, [SINGLE], 0.7),
        (2, 2, 3, [WHOLE], 1.0),
    ],
    ids=str,
)
def test_the_distribution_after_every_number_of_sweeps(m, proposals, blocks, partitions, temperature):
    """8,000 images against the enumerated distribution; chance fails one of these tests in 10 million runs."""
    toy, count = Toy(3 if partitions == [WHOLE] else 4), 8_000
    weights, target = toy.weights(temperature), toy.target(temperature)
    matrix = reference.sweep(toy.marginals, weights, partitions, proposals)
    wanted, distances = reference.chosen_of(toy.marginals, weights, m), []
    for sweeps in (1, 2, 10):
        search = BlockResample(toy.scorer, m, proposals, blocks, sweeps, temperature=temperature)
        exact = wanted @ np.linalg.matrix_power(matrix, sweeps)
        counts = toy.chosen(search, count, seed=sweeps)
        assert p_value(counts, exact * count) > FALSE_ALARM / 20
        distances.append(np.abs(exact - target).sum() / 2)
    assert p_value(counts, target * count) > FALSE_ALARM / 20  # after ten sweeps
    assert p_value(counts, toy.model * count) < 1e-12
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-2


@pytest.mark.parametrize("wrong", [False, True], ids=["exact scorer", "wrong scorer"])
def test_it_tends_to_real_maps_as_far_as_the_scorer_knows_them(wrong):
    """With the exact ratio to the distribution of real maps; a wrong scorer gives p_model * exp(S) instead."""
    toy, count = Toy(seed=3), 12_000
    real = toy.model * np.exp(np.random.default_rng(4).normal(0, 0.7, toy.maps))
    real /= real.sum()
    toy.scores = np.log(real / toy.model) + 7.0  # a constant has no effect
    if wrong:
        toy.scores = toy.scores + np.random.default_rng(5).normal(0, 0.5, toy.maps)
    counts = toy.chosen(BlockResample(toy.scorer, 2, 3, 1, 8), count)
    assert p_value(counts, toy.target() * count) > FALSE_ALARM
    assert (p_value(counts, real * count) > FALSE_ALARM) == (not wrong)


def test_best_never_falls_and_ends_where_no_block_is_better():
    toy, count = Toy(), 5_000
    draws = PhiloxDraws(image_seeds(1, count))
    of_all = Logits(torch.from_numpy(toy.marginals).log().expand(count, -1, -1), None, 0.0)
    scores = torch.from_numpy(toy.scores)
    before = torch.full((count,), -np.inf)
    for sweeps in (1, 2, 3, 9):
        search = BlockResample(toy.scorer, 2, 4, 1, sweeps, pick="best")
        choice = search.choose(toy.offered(draws.tokens(of_all, 2, search.num_candidates(2, 5)), draws))
        kept = scores[toy.number(choice.tokens)]
        assert (kept >= before).all()
        before = kept
        assert torch.equal(choice.scores.amax(1).double(), kept.float().double())
    table = scores.view(4, 4, 4)
    tops = torch.stack([table == table.amax(axis, keepdim=True) for axis in range(3)]).all(0).flatten()
    assert tops[toy.number(choice.tokens)].float().mean() > 0.99
