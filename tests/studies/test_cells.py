"""Cells: those that are the same search are one, names tell all others apart, each builds the search it names."""

import json

import pytest

from varkern.search import BestOfM, BlockResample, Combined, DensitySearch
from varkern.studies.cells import MEDIAN, Cell, from_json, grid, unique
from varkern.studies.models import Models
from varkern.studies.presets import PRESETS


def scorer(labels, features, scale):
    return features.mean((2, 3, 4))


@pytest.mark.parametrize(
    "one, other",
    [
        (Cell(m=1, first_scale=3, pick="resample", scorer="x"), Cell()),
        (Cell(m=(1, 1, 1)), Cell()),
        (Cell(m=[1, 1, 4]), Cell(m=(1, 1, 4))),
        (Cell(m=(1, 4, 2), first_scale=2, last_scale=2), Cell(m=(1, 4, 2))),
        (Cell(m=4, temperature=2.0), Cell(m=4)),
        (Cell(m=4, sweeps=3), Cell(m=4)),
        (Cell(sweeps=3, pick="resample"), Cell()),
        (Cell(n=1, scale=3, alpha=2.0, metric="cosine"), Cell()),
        (Cell(n=5, min_distance=0, alpha=2, cfg=1), Cell(n=5, min_distance=0.0, alpha=2.0, cfg=1.0)),
        (Cell(n=5, strategy="top", alpha=2.0, threshold="paper"), Cell(n=5, strategy="top")),
    ],
)
def test_what_does_not_matter_is_left_out(one, other):
    assert one == other and one.name == other.name and hash(one) == hash(other)


def test_names_tell_cells_apart():
    cells = unique(cell for preset in PRESETS.values() for cell in preset.cells)
    assert len({cell.name for cell in cells}) == len(cells) > 100
    assert all(set(cell.name) <= set("abcdefghijklmnopqrstuvwxyz_0123456789=,.:-") for cell in cells)
    assert Cell().name == "alone"
    assert Cell(m=(1, 4, 2), pick=3, cfg=2.0).name == "m=1:4:2,pick=3,cfg=2.0"


@pytest.mark.parametrize(
    "cell", [Cell(), Cell(m=(1, 4, 2), pick=2), Cell(n=20, alpha=2.3, m=4, first_scale=2, cfg=0.0, model="d16")]
)
def test_json(cell):
    assert from_json(json.loads(json.dumps(cell.settings))) == cell


def test_searches():
    assert Cell().search(scorer) is None
    best = Cell(m=8, first_scale=0, last_scale=2, pick=3, temperature=0.5).search(scorer)
    assert isinstance(best, BestOfM) and best.scorer is scorer
    assert (best.m, best.first_scale, best.last_scale, best.pick, best.temperature) == (8, 0, 2, 3, 0.5)
    assert Cell(m=(1, 8, 2)).search(scorer).m == (1, 8, 2)
    blocks = Cell(m=1, proposals=4, sweeps=2, first_scale=2, last_scale=3, pick="resample", temperature=0.5)
    assert blocks.name == "proposals=4,sweeps=2,first_scale=2,last_scale=3,pick=resample,temperature=0.5"
    found = blocks.search(scorer)
    assert isinstance(found, BlockResample) and found.scorer is scorer
    assert (found.m, found.proposals, found.sweeps, found.first_scale, found.last_scale) == (1, 4, 2, 2, 3)
    assert (found.pick, found.temperature) == ("resample", 0.5)
    assert Cell(m=4, pick="resample", temperature="fitted").name == "m=4,pick=resample,temperature=fitted"
    both = Cell(m=8, proposals=8, n=30).search(scorer, 1.3)
    assert isinstance(both, Combined) and [both.num_candidates(k, 5) for k in range(5)] == [1, 30, 16, 16, 16]
    density = Cell(n=30, scale=2, representatives=5, alpha=1.7, metric="cosine", per="map", bandwidth=2.0).search(None)
    assert isinstance(density, DensitySearch)
    assert (density.n, density.scales, density.representatives, density.alpha) == (30, (2,), 5, 1.7)
    assert (density.metric, density.per, density.bandwidth, density.min_distance) == ("cosine", "map", 2.0, 1.8)
    assert Cell(n=30, min_distance=0.0, threshold="paper").density(1.2).alpha == 1.2
    assert Cell(n=30, alpha=1.7).density(1.2).alpha == 1.7
    both = Cell(n=30, m=4, first_scale=2).search(scorer, 1.3)
    assert isinstance(both, Combined) and [both.num_candidates(k, 5) for k in range(5)] == [1, 30, 4, 4, 4]


@pytest.mark.parametrize(
    "cell",
    [
        Cell(m=0),
        Cell(m=4, pick="worst"),
        Cell(m=4, proposals=-1),
        Cell(m=4, proposals=2, sweeps=0),
        Cell(n=0),
        Cell(n=5, strategy="tallest"),
    ],
)
def test_wrong_settings_are_told_by_the_search(cell):
    with pytest.raises(ValueError, match="must be"):
        cell.search(scorer, 1.0)


def test_only_a_hybrid_without_alpha_wants_one():
    assert Cell(n=5).needs_alpha and Cell(n=5, alpha=MEDIAN).needs_alpha
    assert not any(cell.needs_alpha for cell in (Cell(), Cell(n=5, alpha=2.0), Cell(n=5, strategy="top")))


def test_which_cells_need_a_scorer():
    models = Models({}, {"": lambda: scorer}, {"": "the facts"})
    for cell, needed in ((Cell(), False), (Cell(n=5), False), (Cell(m=2), True), (Cell(proposals=2), True)):
        assert models.scorer(cell) == (scorer if needed else None)
        assert models.facts(cell)["scorer"] == ("the facts" if needed else None)


def test_grid():
    cells = grid(m=(1, 2, 4), first_scale=(0, 1))
    assert cells == [Cell(), Cell(m=2, first_scale=0), Cell(m=2), Cell(m=4, first_scale=0), Cell(m=4)]
    with pytest.raises(ValueError, match="first_scale must have at least one value"):
        grid(m=(2,), first_scale=())


@pytest.mark.parametrize(
    "cell, scales, fits",
    [
        (Cell(), 1, True),
        (Cell(m=4), 1, False),
        (Cell(m=4, first_scale=4), 5, True),
        (Cell(m=4, first_scale=5), 5, False),
        (Cell(m=4, last_scale=5), 5, False),
        (Cell(proposals=4), 1, False),
        (Cell(m=(1, 2, 4)), 3, True),
        (Cell(m=(1, 2, 4)), 4, False),
        (Cell(n=4, scale=3), 3, False),
        (Cell(n=4, scale=3), 4, True),
    ],
)
def test_fits(cell, scales, fits):
    assert cell.fits(scales) == fits


def test_most_candidates():
    assert [c.most_candidates() for c in (Cell(), Cell(m=8), Cell(m=(1, 9, 2)), Cell(n=5, m=4))] == [1, 8, 9, 5]
    assert Cell(m=8, proposals=8, sweeps=3).most_candidates() == 32
