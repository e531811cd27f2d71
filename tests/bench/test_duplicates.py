"""What the measurement of duplicates counts, and that leaving them out changes no choice."""

from itertools import product

import pytest
import torch

from bench.duplicates import Offering, Once, distinct_maps, expected_duplicates
from tests.helpers import small_scorer, small_var
from varkern import BestOfM, generate


def test_distinct_maps():
    tokens = torch.tensor([[[1, 2], [1, 2], [2, 1]], [[1, 2], [3, 3], [1, 3]]])
    assert distinct_maps(tokens) == 2 + 3


@pytest.mark.parametrize("codes, length, m", [(2, 1, 3), (2, 2, 4), (3, 1, 5), (1, 2, 4)], ids=str)
def test_expected_duplicates(codes, length, m):
    """Over all equally likely outcomes of M draws."""
    maps = list(product(range(codes), repeat=length))
    outcomes = [1 - len(set(drawn)) / m for drawn in product(maps, repeat=m)]
    assert expected_duplicates(codes, length, m) == pytest.approx(sum(outcomes) / len(outcomes))


@pytest.mark.parametrize("pick", ["best", "resample"])
def test_scoring_once_changes_no_choice_and_scores_less(pick):
    model, scorer, scored = small_var(), small_scorer(), {}

    def counted(name):
        def score(labels, features, scale):
            scored[name] = scored.get(name, 0) + features.shape[0] * features.shape[1]
            return scorer(labels, features, scale)

        return score

    told = {}
    with Offering():
        for name, search in (("all", BestOfM), ("once", Once)):
            rule = search(counted(name), m=40, first_scale=0, pick=pick, maps_at_once=64)
            told[name] = generate(model, torch.tensor([3, 0, 5]), seeds=2, search=rule, top_k=4)
    for found, wanted in zip(told["once"].tokens, told["all"].tokens, strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(told["once"].scores, told["all"].scores, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert scored["once"] < scored["all"] - 3 * 36  # at the first scale at most four maps an image are left
