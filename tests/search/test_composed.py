"""A search may keep a map that it composed of several candidates, in every family, loop and sampler."""

import math

import pytest
import torch

from tests.helpers import small_var
from tests.standins.cases import CASES, SEEDS, caches_closed, same, seeds_at
from varkern import Combined, generate, patched
from varkern.draws import MultinomialDraws, PhiloxDraws
from varkern.search import Choice

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LOOPS = pytest.mark.parametrize("loop", ["fused", "own"])
SAMPLERS = pytest.mark.parametrize("sampler", ["philox", "multinomial"])


class Kept:
    """Keeps candidate 2, by its number or as a map of its own, and remembers what it was offered."""

    def __init__(self, as_map):
        self.as_map, self.offered = as_map, []

    def num_candidates(self, scale, num_scales):
        return 3 if scale != 1 else 1

    def choose(self, candidates):
        self.offered.append(candidates)
        scores = candidates.tokens.flatten(2).float().mean(2)
        index = torch.full((len(scores),), 2)
        return Choice(index, scores, candidates.tokens[:, 2].clone() if self.as_map else None)


class Halves(Kept):
    """Every second position of candidate 1 in candidate 2; positions are the transformer's."""

    def __init__(self):
        super().__init__(True)
        self.features = []

    def choose(self, candidates):
        choice = super().choose(candidates)
        h, w = candidates.grid
        patch = math.isqrt(candidates.tokens.shape[2] // (h * w))
        chequers = (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 1
        mask = chequers.repeat_interleave(patch, 0).repeat_interleave(patch, 1).flatten()
        mask = mask.view(1, -1, *(1,) * (candidates.tokens.dim() - 3))
        maps = torch.where(mask, candidates.tokens[:, 1], candidates.tokens[:, 2])
        self.features.append(candidates.fuse_maps(maps.unsqueeze(1))[:, 0])
        return choice._replace(tokens=maps)


@EVERY
@LOOPS
@SAMPLERS
def test_a_candidate_given_as_a_map_is_the_candidate(case, loop, sampler):
    model, found = case.build(), []
    for as_map in (False, True):
        with patched(model, Kept(as_map), loop=loop, sampler=sampler):
            torch.manual_seed(3)
            found.append(case.call(model, 3))
    assert same(*found) and caches_closed(case, model)
    with patched(model, loop=loop, sampler=sampler):
        assert not same(case.call(model, 3), found[0])


@EVERY
def test_features_of_given_maps_are_those_of_the_candidates(case):
    model, search = case.build(), Kept(False)
    checked = []

    def choose(candidates):
        for wishes in ({}, {"dtype": torch.bfloat16, "channels_last": True}):
            given = candidates.fuse_maps(candidates.tokens[:, 1:], **wishes)
            wanted = candidates.fuse(1, 3, **wishes)
            assert torch.equal(given, wanted) and given.stride() == wanted.stride()
        h, w = candidates.grid
        assert candidates.by_position().shape[2] == h * w
        checked.append(candidates.scale)
        return Kept.choose(search, candidates)

    search.choose = choose
    with patched(model, search):
        case.call(model, SEEDS)
    assert checked == [0, 2, 3, 4]


@EVERY
@LOOPS
def test_the_composed_maps_are_the_image(case, loop):
    """The features of the last composed map, decoded, are what the method returns."""
    model, search = case.build(), Halves()
    with patched(model, search, loop=loop):
        images = case.images(case.call(model, 7))
    decoded = case.decoded(model, search.features[-1])
    if images.dtype == torch.uint8:
        assert (decoded.int() - images.int()).abs().max() <= 1
    else:
        assert torch.allclose(decoded, images, atol=1e-4)
    last = search.offered[-1].tokens
    assert not torch.equal(last[:, 1], last[:, 2])


@EVERY
def test_both_loops_compose_the_same(case):
    model, found = case.build(), {}
    for loop in ("fused", "own"):
        search = Halves()
        with patched(model, [search], loop=loop):
            found[loop] = case.images(case.call(model, SEEDS)).float(), search
    (fused, one), (own, other) = found["fused"], found["own"]
    for ours, theirs in zip(one.offered, other.offered, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and ours.grid == theirs.grid
        assert torch.equal(ours.step_uniforms(3, 4), theirs.step_uniforms(3, 4))
    difference = (fused - own).abs()
    assert difference.max() <= (1 if difference.max() >= 1 else 2e-5)


def test_a_composed_map_is_told():
    labels = torch.tensor([3, 0, 5])
    search = Halves()
    told = generate(small_var(), labels, seeds=0, search=Combined(search))
    assert [c if c is None else c.tolist() for c in told.choices] == [[2] * 3, None, [2] * 3, [2] * 3, [2] * 3]
    assert [s if s is None else s.shape[1] for s in told.scores] == [3, None, 3, 3, 3]
    for tokens, candidates in zip((told.tokens[k] for k in (0, 2, 3, 4)), search.offered, strict=True):
        even, odd = candidates.tokens[:, 2], candidates.tokens[:, 1]
        side = candidates.grid[0]
        mask = (torch.arange(side)[:, None] + torch.arange(side)).flatten() % 2 == 1
        assert torch.equal(tokens[:, mask], odd[:, mask]) and torch.equal(tokens[:, ~mask], even[:, ~mask])


@LOOPS
@pytest.mark.parametrize(
    "wrong, came",
    [
        (lambda tokens: tokens[:, :1], r"\[5, 1, 4\] and torch.int64"),
        (lambda tokens: tokens[:2, 0], r"\[2, 4\] and torch.int64"),
        (lambda tokens: tokens[:, 0].int(), r"\[5, 4\] and torch.int32"),
    ],
    ids=["candidates", "images", "dtype"],
)
def test_maps_of_a_wrong_shape(wrong, came, loop):
    case = CASES["VAR"]
    model, search = case.build(), Kept(False)
    search.num_candidates = lambda scale, num_scales: 2 if scale == 1 else 1
    search.choose = lambda c: Choice(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 2), wrong(c.tokens))
    wanted = r"a search must return tokens of shape \[5, 4\] and torch.int64, as one candidate of each image, got "
    with patched(model, search, loop=loop), pytest.raises(ValueError, match=wanted + came):
        case.call(model, SEEDS)
    assert caches_closed(case, model)


def test_numbers_for_many_draws():
    """They are a function of seed, scale, draw and number alone, and no other purpose has them."""
    draws = PhiloxDraws(SEEDS)
    few, many = draws.steps(3, 2, 4), draws.steps(3, 5, 9)
    assert torch.equal(many[:, :2, :4], few) and many.dtype == torch.float32
    assert torch.equal(PhiloxDraws(seeds_at([4, 1])).steps(3, 5, 9), many[[4, 1]])
    assert many.unique().numel() == many.numel() and 0 <= many.min() and many.max() < 1
    others = torch.cat([draws.picks(3, 5, draw).flatten() for draw in range(9)] + [draws.steps(2, 5, 9).flatten()])
    assert not torch.isin(many, others).any()
    generator = torch.Generator().manual_seed(0)
    assert MultinomialDraws(generator, 5, SEEDS.device).steps(3, 5, 9).shape == (5, 5, 9)
