"""Whole generations with compiled kernels give the same tokens as the PyTorch backend, for every family and search."""

import pytest
import torch

from tests import emulator
from tests.standins.cases import CASES, VARCase, seeds_at
from varkern import BestOfM, BlockResample, DensitySearch, draws, patched, patching
from varkern.demo.run import load_demo
from varkern.ops import sample_tokens, use_backend
from varkern.search.combined import as_search
from varkern.search.density import STRATEGIES

pytestmark = pytest.mark.compiled_only


class DemoCase(VARCase):
    """The digits model that ships with the package, and its scorer."""

    def build(self):
        model, self.scorer = load_demo()
        return model


def judge(labels, features, scale):
    """Every place of every channel has a different weight, so that only equal maps have equal scores."""
    weights = torch.arange(1.0, features[0, 0].numel() + 1).cos().view(features.shape[2:])
    return (features * weights).mean((2, 3, 4)) * 100


def density(strategy: str, **options) -> DensitySearch:
    return DensitySearch(n=6, representatives=3, scales=(1, 2), strategy=strategy, **options)


DEMO, FLEXVAR, INFINITY, PATCHIFIED = DemoCase(), *(CASES[k] for k in ("FlexVAR", "Infinity", "Infinity, patchify"))
MODELS = {
    "VAR": (DEMO, {"cfg": 1.5, "top_k": 40, "top_p": 0.96}),
    "VAR, smooth": (DEMO, {"cfg": 4.0, "more_smooth": True}),
    "VAR, no guidance": (DEMO, {"cfg": 0.0, "top_k": 40}),
    "FlexVAR": (FLEXVAR, {"cfg": 2.5, "top_k": 20, "top_p": 0.9}),
    "FlexVAR, no guidance": (FLEXVAR, {"cfg": 0}),
    "Infinity": (INFINITY, {}),
    "Infinity, no guidance": (INFINITY, {"cfg_list": [1] * 5}),
    "Infinity, patchify": (PATCHIFIED, {}),
    "Infinity, patchify, no guidance": (PATCHIFIED, {"cfg_list": [1] * 5}),
}
SEARCHES = {
    "no search": lambda scorer: None,
    "best": lambda scorer: BestOfM(scorer, m=2),
    "resample": lambda scorer: BestOfM(scorer, m=3, pick="resample"),
    "pick=2": lambda scorer: BestOfM(scorer, m=4, pick=2),
    **{f"density, {strategy}": lambda scorer, s=strategy: density(s) for strategy in STRATEGIES},
    "both": lambda scorer: [density("hybrid"), BestOfM(scorer, m=2, first_scale=3)],
    "blocks": lambda scorer: BlockResample(scorer, m=2, proposals=2, first_scale=3),
}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of scores and densities, relative to the largest of their image.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 6e-3}
# Every model with every search; batch and precision take turns, so that each meets every model and every search.
PAIRS = [
    (model, search, (1, 3)[(i // 2 + j // 2) % 2], list(HALVES)[(i + j) % 2])
    for i, model in enumerate(MODELS)
    for j, search in enumerate(SEARCHES)
]


def assert_close(got, wanted, precision):
    assert ((got - wanted).abs() <= TOLERANCE[precision] * wanted.abs().amax(1, keepdim=True)).all()


def count_launches():
    return sum(totals.grids.total() for totals in emulator.launched.values())


@pytest.mark.parametrize("model, search, batch", [pair[:3] for pair in PAIRS], ids=str)
def test_the_tokens_of_the_pytorch_backend(model, search, batch, monkeypatch):
    case, options = MODELS[model]
    built, found, before = case.build(), {}, count_launches()
    search = SEARCHES[search](getattr(case, "scorer", judge))
    run = patching.run
    monkeypatch.setattr(patching, "run", lambda *args: found.setdefault(backend, run(*args)))
    for backend in ("torch", "triton"):
        with use_backend(backend), patched(built, search):
            case.call(built, seeds_at(range(batch)), range(batch), **options)
    assert count_launches() > before
    for scale, wanted in enumerate(found["torch"].scores):
        if wanted is not None:
            assert_close(found["triton"].scores[scale], wanted, "float32")
        assert torch.equal(found["triton"].tokens[scale], found["torch"].tokens[scale])


class BothWays:
    """A search that chooses with both backends from the same candidates, and continues with the kernels' choice."""

    def __init__(self, search, precision):
        self.search, self.precision = search, precision

    def __getattr__(self, name):
        return getattr(self.search, name)

    def choose(self, candidates):
        got = self.search.choose(candidates)
        with use_backend("torch"):
            wanted = self.search.choose(candidates)
        assert_close(got.scores, wanted.scores, self.precision)
        comparable = torch.isclose(got.scores, wanted.scores, rtol=1e-5).all(
            1
        )  # others may be chosen by their rounding
        for image in comparable.nonzero()[:, 0]:
            mine, other = got.index[image], wanted.index[image]
            same = torch.equal(candidates.tokens[image, mine], candidates.tokens[image, other])
            tied = torch.isclose(got.scores[image, mine], got.scores[image, other], rtol=1e-5)
            assert same or tied
        return got


# One pick that rounding decides changes all maps that are composed after it.
@pytest.mark.parametrize("model, search, batch, precision", [pair for pair in PAIRS if pair[1] != "blocks"], ids=str)
def test_in_half_precision_every_step_is_that_of_the_pytorch_backend(model, search, batch, precision, monkeypatch):
    """Compare scale by scale from the same logits, because a half-precision model turns rounding into other logits."""
    case, options = MODELS[model]
    built, drawn = case.build(), []
    search = as_search(SEARCHES[search](getattr(case, "scorer", judge)))

    def draw_both_ways(logits, *args, **kwargs):
        tokens = sample_tokens(logits, *args, **kwargs)
        with use_backend("torch"):
            drawn.append(torch.equal(tokens, sample_tokens(logits, *args, **kwargs)))
        return tokens

    monkeypatch.setattr(draws, "sample_tokens", draw_both_ways)
    before = count_launches()
    with (
        use_backend("triton"),
        patched(built, search and BothWays(search, precision)),
        torch.autocast("cpu", HALVES[precision]),
    ):
        case.call(built, seeds_at(range(batch)), range(batch), **options)
    assert len(drawn) >= 5 and all(drawn)
    assert count_launches() > before
