"""The host never waits for the device while a patched model generates, whatever the search; else nothing could be
captured, and one image at a time would be as slow as the host."""

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import varkern
from tests.helpers import on, small_scorer, small_var
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern import BestOfM, BlockResample, DensitySearch, LogRatio, PathSearch
from varkern.search import Resample

LABELS = torch.tensor([3, 0, 5])


def mean_feature(labels, features, scale):
    return features.mean((2, 3, 4))


class HostData(TorchFunctionMode):
    """Records tensors made of the host's numbers, which PyTorch builds out of the other mode's sight."""

    def __init__(self, found):
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        listed = False
        if function is torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = any(isinstance(place, list) for place in places)
        if made or listed or function is torch.Tensor.new_tensor:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class HostTensors(TorchDispatchMode):
    """Records operations that touch a tensor on the host: copies to and from it, and work done there."""

    def __init__(self, found):
        super().__init__()
        self.found, self.count = found, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.count += 1
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(function))
        return out


@contextlib.contextmanager
def no_waiting(monkeypatch):
    """Fails where the host would wait for the device, for models on the device that :func:`far` names.

    On a GPU PyTorch itself raises at every wait. Elsewhere tensors that hold no data stand in for a GPU's: to read a
    value of one, or to take a shape from values, raises, whichever way it is done; what is copied from or to the host,
    and what is computed there, is recorded. The kernels themselves do not run then.
    """

    def waits(*_):
        raise AssertionError("a wait for the device")

    monkeypatch.setattr("varkern.checks.label_range", lambda request, spec: (0, 5))  # the one look, before any work
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", waits)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    found: list[str] = []
    with HostData(found), HostTensors(found) as touched:
        yield
    assert touched.count > 300  # or nothing was looked at
    assert not found


def far(*modules):
    """Move modules to where a wait shows; returns that device."""
    where = torch.device("cuda" if torch.cuda.is_available() else "meta")
    for module in modules:
        module.to(where)
        if hasattr(module, "rng"):
            module.rng = torch.Generator("cuda" if where.type == "cuda" else "cpu")
    return where


# The first scale, the last, and one between: a search, a chunk and a scale do on the host what others of them do.
SIDES = (1, 2, 3)


def models():
    return small_var(SIDES), small_scorer(num_scales=len(SIDES), size=SIDES[-1], widths=(8,))


SEARCHES = {
    "none": lambda scorer: None,
    "best": lambda scorer: BestOfM(scorer, m=4, maps_at_once=7),
    "resample": lambda scorer: BestOfM(scorer, m=3, first_scale=0, pick="resample"),
    "two best": lambda scorer: BestOfM(scorer, m=4, pick=2),
    "blocks": lambda scorer: BlockResample(scorer, m=2, proposals=3, sweeps=2, maps_at_once=7),
    "best blocks": lambda scorer: BlockResample(scorer, m=1, proposals=2, first_scale=0, pick="best"),
    "paths": lambda scorer: PathSearch(
        (4, 3, 1),
        {0: "resample", 1: "cluster", 2: Resample(1.0, "difference")},
        LogRatio(scorer),
        search=BestOfM(scorer, m=2),
    ),
    "paths, of images": lambda scorer: PathSearch.best_of_n(3, lambda labels, images, scale: images.mean((1, 2, 3))),
    "density, then best": lambda scorer: [DensitySearch(n=12, representatives=4, min_distance=0), BestOfM(scorer, m=2)],
}
OPTIONS = {
    "plain": {},
    "no guidance, filtered": {"cfg": 0, "top_k": 5, "top_p": 0.9},
    "smooth": {"more_smooth": True},
    "drawn labels": {"label_B": None},
    "one label": {"label_B": 4},
    "an int seed": {"g_seed": 7},
    "by image": {"cfg": torch.tensor([0.5, 1.5, 2.5]).view(3, 1, 1)},
}


def arguments(where, **options):
    strengths = {k: v.to(where) for k, v in options.items() if isinstance(v, torch.Tensor)}
    return {"B": 3, "label_B": LABELS.to(where), "g_seed": LABELS.to(where), "top_k": 20, **options, **strengths}


PAIRS = [(search, "plain") for search in SEARCHES] + [("best", option) for option in OPTIONS if option != "plain"]


@pytest.mark.parametrize(
    "search, options",
    [pytest.param(SEARCHES[a], OPTIONS[b], id=f"{a}: {b}") for a, b in [*PAIRS, ("none", "smooth")]],
)
def test_a_patched_generation_never_waits_for_the_device(search, options, monkeypatch):
    """The whole method, scorer and searches and all, when labels, seeds and strengths are there already."""
    model, scorer = models()
    where = far(model, model.vae_proxy[0], scorer)
    given = arguments(where, **options)
    varkern.patch(model, search(scorer))
    if where.type == "cuda":  # what is compiled or tabulated once may wait
        model.autoregressive_infer_cfg(**given)
    with no_waiting(monkeypatch):
        images = model.autoregressive_infer_cfg(**given)
    assert images.device.type == where.type and images.shape == (3, 3, 6, 6)


@pytest.mark.parametrize("options", [{}, {"cfg": 0}, {"max_pn": 3, "top_p": 0.9}], ids=str)
def test_a_patched_flexvar_never_waits_for_the_device(options, monkeypatch):
    model, vae = small_flexvar()
    where = far(model, vae)
    given = arguments(where, vqvae=vae, infer_patch_nums=FLEX_SIDES, **options)
    varkern.patch(model, BestOfM(mean_feature, m=4, pick="resample", maps_at_once=7))
    if where.type == "cuda":
        model.autoregressive_infer_cfg(**given)
    with no_waiting(monkeypatch):
        assert model.autoregressive_infer_cfg(**given).shape == (3, 3, 12, 12)


READING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize(
    "search",
    [
        pytest.param(lambda scorer: BestOfM(scorer, m=2, pick="resample"), id="best of m"),
        pytest.param(lambda scorer: BlockResample(scorer, m=1, proposals=2, blocks=2), id="blocks"),
    ],
)
def test_the_kernels_launchers_read_no_value(search, device, monkeypatch):
    """The host's side of every launch, through the interpreter where there is no GPU; tables are made before.

    What an op does inside is out of the modes' sight, so the reading methods themselves tell who calls them.
    """
    model, scorer = on(small_var((1, 3)), device), small_scorer(num_scales=2, size=3, widths=(8,)).to(device)
    labels, readers = LABELS[:1].to(device), []

    def watched(name, read):
        def method(*arguments, **options):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("varkern"):
                readers.append(f"{name} in {caller}")
            return read(*arguments, **options)

        return method

    monkeypatch.setattr("varkern.checks.label_range", lambda request, spec: (0, 5))
    with varkern.use_backend("triton"), varkern.patched(model, search(scorer)):
        model.autoregressive_infer_cfg(1, labels, labels, top_k=20, top_p=0.9)
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        model.autoregressive_infer_cfg(1, labels, labels, top_k=20, top_p=0.9)
    assert not readers


def from_the_host(labels, features, scale):
    return mean_feature(labels, features, scale) * torch.tensor([1.0, 2.0], device=features.device).sum()


def by_a_list(labels, features, scale):
    return mean_feature(labels, features[:, [1, 0]], scale)


WAITING = {
    "item": lambda labels, features, scale: mean_feature(labels, features, scale) * features.sum().item(),
    "to the host": lambda labels, features, scale: mean_feature(labels, features, scale).cpu().to(features.device),
    "a list": lambda labels, features, scale: mean_feature(labels, features, scale) * features.flatten().tolist()[0],
    "a branch": lambda labels, features, scale: mean_feature(labels, features, scale) if features.any() else None,
    "a mask": lambda labels, features, scale: mean_feature(labels, features, scale) + features[features > 0].sum(),
    "from the host": from_the_host,
    "from the host's memory": lambda labels, features, scale: (
        mean_feature(labels, features, scale) + torch.ones(1).to(features.device)
    ),
    "by a list": by_a_list,
    "synchronize": lambda *given: torch.cuda.synchronize() or mean_feature(*given),
}


@pytest.mark.parametrize("scorer", WAITING.values(), ids=WAITING)
def test_a_scorer_that_waits_is_seen(scorer, monkeypatch):
    """What the tests above rest on: none of these goes by unseen."""
    model, _ = models()
    where = far(model, model.vae_proxy[0])
    given = arguments(where)
    varkern.patch(model, BestOfM(scorer, m=2))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), no_waiting(monkeypatch):
        model.autoregressive_infer_cfg(**given)
