"""Search over paths: what is refused, and with which words."""

import pytest
import torch

import varkern
from tests.helpers import small_scorer, small_var
from tests.path_helpers import (
    LABELS,
    Fixed,
    brightness,
    weighed,
)
from varkern import BestOfM, Combined, LogRatio, PathSearch, generate, patched, searching
from varkern.search import Resample

# ---- What is refused -----------------------------------------------------------------------------------------------

WRONG = {
    "no paths": (lambda: PathSearch(()), TypeError, r"paths must be an int or a sequence .*, got \(\)"),
    "a word": (lambda: PathSearch("8"), TypeError, "paths must be an int or a sequence .*, got '8'"),
    "zero": (lambda: PathSearch((4, 0)), ValueError, "paths must be >= 1, got 0"),
    "rule": (lambda: PathSearch(4, {2: "best"}), ValueError, r"select\[2\] must be one of .*, got 'best'"),
    "class": (lambda: PathSearch(4, {2: Resample}), TypeError, r"select\[2\] must be a rule such as"),
    "select": (lambda: PathSearch(4, ["top"]), TypeError, "select must be a dict from scales to rules"),
    "scale": (lambda: PathSearch(4, {-1: "top"}), ValueError, "select must have scales >= 0, counted from 0, got -1"),
    "no reward": (lambda: PathSearch(4, {2: "top"}), ValueError, "reward must be given for the rule Top.* of scale 2"),
    "reward": (lambda: PathSearch(4, reward=3), TypeError, "reward must be a callable object .*, got 3"),
    "features": (
        lambda: PathSearch(4, features="dino"),
        TypeError,
        "features must be a callable object .*, got 'dino'",
    ),
    "search": (lambda: PathSearch(4, search=brightness), TypeError, "search must be a search such as"),
    "inside": (lambda: PathSearch(4, search=PathSearch(2)), TypeError, "search must be a search inside each path"),
    "at once": (lambda: PathSearch(4, images_at_once=0), ValueError, "images_at_once must be an int >= 1, got 0"),
    "n": (lambda: PathSearch.best_of_n(0, brightness), ValueError, "n must be an int >= 1, got 0"),
    "joined": (lambda: Combined(PathSearch(2)), TypeError, "searches must not contain a PathSearch"),
    "list": (lambda: generate(small_var(), [0], search=[PathSearch(2)]), TypeError, "must not contain a PathSearch"),
}


@pytest.mark.parametrize("make, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


UNFIT = {
    "scales": (PathSearch((2,) * 6, None, brightness), "paths must have one number for each of 5 scales, got 6"),
    "select": (PathSearch(2, {5: "top"}, brightness), "select must have scales < 5, the model's scales, got 5"),
    "end": (
        PathSearch((4, 4, 4, 4, 2), None, brightness),
        "paths must end in 1 or in 4, the number of paths that draw",
    ),
    "no rule": (
        PathSearch((4, 4, 2, 2, 1), None, brightness),
        "select must have a rule for scale 2, after which paths changes from 4 to 2",
    ),
    "growth": (
        PathSearch((2, 2, 4, 4, 1), {2: "cluster"}, brightness),
        "paths must not grow after scale 2, whose rule Cluster.* copies no paths, got 2, 4",
    ),
    "no reward": (PathSearch(2), "reward must be given to keep one of 2 paths after the last scale, got none"),
    "inside": (
        PathSearch(2, reward=brightness, search=BestOfM(weighed, m=[2])),
        "m must have one number for each of 5",
    ),
    "scorer": (PathSearch(2, reward=LogRatio(small_scorer(channels=4))), "scorer was made for channels=4"),
}


@pytest.mark.parametrize("search, message", UNFIT.values(), ids=UNFIT)
def test_searches_that_do_not_fit_the_model(search, message):
    model = small_var()
    for call in (varkern.check, varkern.patch):
        with pytest.raises(ValueError, match=message):
            call(model, search)
    with pytest.raises(ValueError, match=message):
        generate(model, LABELS, search=search)


def test_labels_that_a_reward_does_not_know():
    search = PathSearch(2, reward=LogRatio(small_scorer()))
    with pytest.raises(ValueError, match=r"label .* must be in 0..6, the scorer's classes, got 7"):
        generate(small_var(), [7], search=search)


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda p: [0, 1], r"a rule of select must return an int64 tensor of shape \[4, 2\], got list"),
        (lambda p: torch.zeros(4, 3, dtype=torch.int64), r"of shape \[4, 2\], got torch.int64 of shape \[4, 3\]"),
        (lambda p: torch.zeros(4, 2), r"int64 tensor .*, got torch.float32"),
        (lambda p: torch.full((4, 2), 3), r"must return paths in 0..2, got \[\[3, 3\]"),
        (lambda p: torch.full((4, 2), -1), r"must return paths in 0..2, got \[\[-1, -1\]"),
    ],
)
def test_wrong_results_of_rules(returned, message):
    model = small_var()
    search = PathSearch((3, 2, 2, 2, 1), {1: returned, 4: "top"}, brightness)
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, LABELS, search=search)


@pytest.mark.parametrize("came", [torch.zeros(5), torch.zeros(12, 1), 0.5])
def test_wrong_results_of_rewards(came):
    search = PathSearch((3, 2, 2, 2, 1), {1: "top"}, lambda condition, images, scale: came)
    with pytest.raises(ValueError, match=r"reward must return values of shape \[12\], got "):
        generate(small_var(), LABELS, search=search)


def test_a_rule_that_asks_for_rewards_that_nobody_gives():
    search = PathSearch((3, 2, 2, 2, 1), {1: Fixed([0, 1]), 4: Fixed([0])})
    with pytest.raises(
        ValueError, match="reward must be given, because the rule of scale 1 asks for rewards, got none"
    ):
        generate(small_var(), LABELS, search=search)


def test_the_models_own_loop_has_no_paths():
    model, search = small_var(), PathSearch.best_of_n(2, brightness)
    with pytest.raises(ValueError, match="search must not be a PathSearch with loop='own'"):
        varkern.patch(model, search, loop="own")
    with (
        pytest.raises(ValueError, match="search must not be a PathSearch in the model's own loop"),
        searching(model, search),
    ):
        pass


def test_caches_that_are_unknown():
    model = small_var()

    class Attention:
        def kv_caching(self, enable): ...

    model.blocks[1].attn.__class__ = type("Plain", (torch.nn.Module,), {"kv_caching": Attention.kv_caching})
    del model.blocks[1].attn.cached_k
    with pytest.raises(
        varkern.UnsupportedModelError, match="needs KV caches with the attributes cached_k and cached_v"
    ):
        generate(model, LABELS, search=PathSearch.best_of_n(2, brightness))


def test_a_graph_is_not_captured():
    model, search = small_var(), PathSearch.best_of_n(2, brightness)
    wanted = generate(model, LABELS, seeds=0, search=search).images
    with patched(model, search, cuda_graph=True), pytest.warns(RuntimeWarning, match="Generating without a graph"):
        assert torch.equal(model.autoregressive_infer_cfg(B=4, label_B=LABELS, g_seed=0), wanted)


def test_how_it_is_shown():
    search = PathSearch((2, 1), {1: "resample"}, brightness, search=BestOfM(weighed, m=2))
    assert repr(search) == (
        "PathSearch(paths=(2, 1), select={1: Resample(strength=10.0, potential='value')}, reward=brightness, "
        "search=BestOfM(weighed, m=2, first_scale=1, last_scale=None, pick='best'))"
    )
