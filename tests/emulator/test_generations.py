"""Whole generations with compiled kernels: the tokens of the PyTorch backend, in every family and search."""

import contextlib
import itertools

import pytest
import torch

from tests import emulator
from tests.standins.cases import CASES, VARCase, seeds_at
from tests.test_promises import weighed
from varkern import BestOfM, DensitySearch, patched, patching
from varkern.demo.run import load_demo
from varkern.ops import use_backend
from varkern.search.density import STRATEGIES

pytestmark = pytest.mark.compiled_only


class DemoCase(VARCase):
    """The digits model that ships with the package, with its own scorer."""

    def build(self):
        model, self.scorer = load_demo()
        return model


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
}
PRECISIONS = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
}
# Of scores and densities, relative to the largest of their image; of images, whose numbers lie in 0..1 or -1..1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}

# Every model with every search; batch and precision take turns, so that each pair of model and batch, model and
# precision, search and batch, search and precision is there.
TURNS = list(itertools.product(PRECISIONS, (1, 3)))
PAIRS = [
    pytest.param(
        model, search, *TURNS[(i + j) % len(TURNS)], id="-".join((model, search, *map(str, TURNS[(i + j) % 6])))
    )
    for i, model in enumerate(MODELS)
    for j, search in enumerate(SEARCHES)
]


@pytest.mark.parametrize("model, search, precision, batch", PAIRS)
def test_the_tokens_of_the_pytorch_backend(model, search, precision, batch, monkeypatch):
    case, options = MODELS[model]
    built, told = case.build(), {}
    search = SEARCHES[search](getattr(case, "scorer", weighed))
    run = patching.run
    monkeypatch.setattr(patching, "run", lambda *args: told.setdefault(backend, run(*args)))
    launches = sum(sum(totals.grids.values()) for totals in emulator.launched.values())
    for backend in ("torch", "triton"):
        with use_backend(backend), patched(built, search), PRECISIONS[precision]():
            case.call(built, seeds_at(range(batch)), range(batch), **options)
    assert sum(sum(totals.grids.values()) for totals in emulator.launched.values()) > launches
    wanted, got = told["torch"], told["triton"]
    for scale in range(len(wanted.tokens)):
        assert_close(got.scores[scale], wanted.scores[scale], TOLERANCE[precision])
        assert_equal(got.choices[scale], wanted.choices[scale])
        assert_equal(got.tokens[scale], wanted.tokens[scale])


def assert_equal(got, wanted):
    assert got is wanted is None or torch.equal(got, wanted)


def assert_close(got, wanted, tolerance):
    if wanted is not None or got is not None:
        assert ((got - wanted).abs() <= tolerance * wanted.abs().amax(1, keepdim=True)).all()
