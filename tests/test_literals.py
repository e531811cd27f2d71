"""The types of arguments with a closed set of words, and what is checked at run time, name the same words."""

import contextlib
import inspect
import re
from typing import get_args, get_type_hints

import pytest
import torch

import varkern
from tests.helpers import small_var
from varkern import literals

ANY_SCORER = torch.nn.Identity()
CODES, MAPS = torch.randn(50, 16), torch.zeros(2, 4, 9, dtype=torch.int64)


def enter(context: contextlib.AbstractContextManager) -> None:
    """Begin and end a block in which nothing runs."""
    with contextlib.suppress(varkern.OwnLoopError), context:
        pass


# Every public argument with a closed set of words: its function, its name, and a call that gives it a word.
CALLS = [
    (varkern.use_backend.__init__, "name", lambda word: varkern.use_backend(word)),
    (varkern.patch, "sampler", lambda word: varkern.patch(small_var(), sampler=word)),
    (varkern.patch, "loop", lambda word: varkern.patch(small_var(), loop=word)),
    (varkern.patched, "sampler", lambda word: enter(varkern.patched(small_var(), sampler=word))),
    (varkern.patched, "loop", lambda word: enter(varkern.patched(small_var(), loop=word))),
    (varkern.check, "sampler", lambda word: varkern.check(small_var(), sampler=word)),
    (varkern.check, "loop", lambda word: varkern.check(small_var(), loop=word)),
    (varkern.generate, "sampler", lambda word: varkern.generate(small_var(), [0], sampler=word)),
    (varkern.generate, "loop", lambda word: varkern.generate(small_var(), [0], loop=word)),
    (varkern.searching, "sampler", lambda word: enter(varkern.searching(small_var(), sampler=word))),
    (varkern.BestOfM.__init__, "pick", lambda word: varkern.BestOfM(ANY_SCORER, pick=word)),
    (varkern.BlockResample.__init__, "pick", lambda word: varkern.BlockResample(ANY_SCORER, pick=word)),
    (varkern.PathSearch.__init__, "select", lambda word: varkern.PathSearch(2, {1: word}, ANY_SCORER)),
    (varkern.search.Resample.__init__, "potential", lambda word: varkern.search.Resample(1.0, word)),
    (varkern.search.Top.__init__, "potential", lambda word: varkern.search.Top(word)),
    (varkern.DensitySearch.__init__, "strategy", lambda word: varkern.DensitySearch(strategy=word)),
    (varkern.DensitySearch.__init__, "metric", lambda word: varkern.DensitySearch(metric=word)),
    (varkern.DensitySearch.__init__, "per", lambda word: varkern.DensitySearch(per=word)),
    (varkern.DensitySearch.__init__, "bandwidth", lambda word: varkern.DensitySearch(bandwidth=word)),
    (varkern.DensitySearch.__init__, "threshold", lambda word: varkern.DensitySearch(threshold=word)),
    (varkern.DensitySearch.__init__, "compat", lambda word: varkern.DensitySearch(compat=word)),
    (
        varkern.DensitySearch.recommended_alpha,
        "family",
        lambda word: varkern.DensitySearch.recommended_alpha(24, word),
    ),
    (varkern.ops.kernel_density, "metric", lambda word: varkern.ops.kernel_density(CODES, metric=word)),
    (varkern.ops.silverman_bandwidth, "metric", lambda word: varkern.ops.silverman_bandwidth(CODES, metric=word)),
    (varkern.ops.token_density, "metric", lambda word: varkern.ops.token_density(MAPS, CODES, metric=word)),
    (varkern.ops.token_density, "per", lambda word: varkern.ops.token_density(MAPS, CODES, per=word)),
    (varkern.ops.token_density, "bandwidth", lambda word: varkern.ops.token_density(MAPS, CODES, bandwidth=word)),
    (
        varkern.ops.fuse_tokens,
        "interpolation",
        lambda word: varkern.ops.fuse_tokens(MAPS, CODES, side=3, size=6, interpolation=word),
    ),
    (
        varkern.ops.commit_tokens,
        "interpolation",
        lambda word: varkern.ops.commit_tokens(MAPS[:, 0], torch.zeros(2, 16, 6, 6), CODES, side=3, interpolation=word),
    ),
    (
        varkern.ops.resize_features,
        "interpolation",
        lambda word: varkern.ops.resize_features(torch.zeros(2, 16, 6, 6), size=4, interpolation=word),
    ),
]
IDS = [f"{function.__qualname__.removesuffix('.__init__')}, {name}" for function, name, _ in CALLS]


def words_of(hint: object) -> list[str]:
    """The words that a type allows, also inside a union."""
    if isinstance(hint, str):
        return [hint]
    return [word for part in get_args(hint) for word in words_of(part)]


@pytest.fixture(autouse=True)
def backend():
    with varkern.use_backend("torch"):
        yield


@pytest.mark.parametrize("function, name, call", CALLS, ids=IDS)
def test_the_words_of_the_type_are_taken_and_no_other(function, name, call):
    words = words_of(get_type_hints(inspect.unwrap(function))[name])
    assert len(words) > 1
    for word in words:
        call(word)
    for wrong in (words[0] + "x", words[0].swapcase()):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            call(wrong)


def test_every_set_of_words_is_of_an_argument():
    """Every type is that of an argument in the list above."""
    used = [set(words_of(get_type_hints(inspect.unwrap(function))[name])) for function, name, _ in CALLS]
    types = {name: set(get_args(value)) for name, value in vars(literals).items() if get_args(value)}
    # ChosenLoop is what explain_patch answers; a Temperature is a number or one word, which tests of its range refuse.
    assert {name for name, words in types.items() if words not in used} == {"ChosenLoop", "Temperature"}


def test_an_unpatched_model_refuses_a_tensor_of_seeds():
    model = small_var()
    with pytest.raises(TypeError, match=r"g_seed must be an int or None unless varkern\.patch was called on the model"):
        model.autoregressive_infer_cfg(2, 0, varkern.image_seeds(0, 2))
    assert varkern.patch(model).autoregressive_infer_cfg(2, 0, varkern.image_seeds(0, 2)).isfinite().all()
