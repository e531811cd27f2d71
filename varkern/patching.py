"""``patch``, ``unpatch``, ``patched``: the one line that adds a search to a user's own model, or removes it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from varkern.checks import check, check_method
from varkern.copying import ABSENT, CopiedMethod, Replacement, replace, restore
from varkern.errors import UnsupportedModelError
from varkern.exclusive import exclusive
from varkern.families import Family, recognise
from varkern.fingerprints import find_difference
from varkern.generation import run
from varkern.graphs import GenerationGraphs
from varkern.literals import ChosenLoop, Loop, Sampler, check_word
from varkern.lsrs import CalledSearch, published_method
from varkern.own_loop import call_own, named_arguments, set_argument
from varkern.search import PathSearch, Search, as_search

Model = TypeVar("Model")
OWN_SEARCHES = ("enable_var_scaling", "enable_scaling")  # arguments of VAR-Scaling's VAR and Infinity


class PatchedMethod(Replacement):
    """Replaces the published method in the ``__dict__`` of one instance; signature and return value stay the same.

    Copies and pickles of the model are not patched, see :mod:`varkern.copying`. A second call while one runs is
    refused, see :mod:`varkern.exclusive`.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        family: Family,
        search: Search | CalledSearch | None,
        sampler: Sampler,
        cuda_graph: bool,
        loop: ChosenLoop,
        former: Any,
        original: Callable[..., Any],
    ):
        super().__init__(model, name, former)
        self.family, self.search, self.sampler = family, search, sampler
        self.graphs = GenerationGraphs(family, model, None) if cuda_graph else None
        self.__wrapped__ = original
        self.__signature__ = inspect.signature(original)
        self.__name__, self.__doc__, self.loop = name, original.__doc__, loop
        self.warned = False

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        if self.loop == "own":
            assert not isinstance(self.search, CalledSearch), "only the fused loop replaces LSRS' method"
            self.switch_own_search_off(bound)
            with exclusive(self.family, self.model):
                return call_own(self.family, self.model, self.__wrapped__, bound, self.search, self.sampler)
        # A fork may take more arguments than its family. Those that are not passed are left out.
        known = given | set(self.family.arguments)
        arguments = {name: value for name, value in bound.arguments.items() if name in known}
        request, search = self.family.request(arguments), self.search_for(arguments)
        with exclusive(self.family, self.model):
            if self.graphs is not None:
                self.graphs.search = search
                return self.graphs.run(request)
            return run(self.family, self.model, request, search, self.sampler).images

    def switch_own_search_off(self, bound: inspect.BoundArguments) -> None:
        """A search of the patch replaces the method's own, as VAR-Scaling's code has one; one warning says so."""
        for name in OWN_SEARCHES if self.search is not None else ():
            if named_arguments(bound).get(name):
                set_argument(bound, name, False)
                if not self.warned:
                    warnings.warn(f"{name}=False: the search of varkern.patch replaces the method's own", stacklevel=4)
                self.warned = True

    def search_for(self, arguments: Mapping[str, Any]) -> Search | None:
        """The search of the patch, or the one that the method's own arguments ask for."""
        return self.search(arguments) if isinstance(self.search, CalledSearch) else self.search

    def __repr__(self) -> str:
        return f"<varkern's {self.__name__}, search={self.search}, sampler={self.sampler!r}>"


def patch(
    model: Model,
    search: Search | Sequence[Search] | None = None,
    *,
    sampler: Sampler = "philox",
    cuda_graph: bool = False,
    loop: Loop = "auto",
    method: str | None = None,
) -> Model:
    """Give a model's own generation method a search, in place.

    One method of this one instance changes: the published one (``autoregressive_infer_cfg``), whose signature and
    return value stay. Patching again replaces the search. The model's ``state_dict`` and ``repr`` do not change, and
    neither does any other model. A copy, deep copy or pickle of a patched model is not patched; the attribute
    ``__getstate__`` of the instance keeps the patch out of them. The patch and the model refer to each other, so call
    :func:`unpatch` before you drop a model whose memory you need.

    A model has one set of KV caches, so it serves one call at a time: a call from another thread, or from a scorer
    inside the model's own generation, raises ``RuntimeError`` and does not disturb the generation that runs.

    A VAR model of LSRS' own code (dt-3t/LSRS) has a second method, ``autoregressive_infer_cfg_lsrs``, which is replaced
    likewise. It takes its search from its own arguments (``discriminator``, ``st``, ``ed``, ``m_k``, ``top_k_lsrs``,
    ``temperature_lsrs``, ``rand_list``), each with its published meaning, and not from ``search``. A
    :class:`varkern.Scorer` as ``discriminator`` is faster than the published network.

    Args:
        model: a VAR, FlexVAR or Infinity model: the published class, a fork of it, or :class:`varkern.models.VAR`.
            The VAE and the schedule that FlexVAR and Infinity get with each call are checked in that call, before any
            work. A scorer for Infinity gets the method's text condition in place of labels.
        search: the rule that keeps one candidate, such as :class:`varkern.BestOfM`, or a :class:`varkern.PathSearch`,
            which keeps one of several whole images. In a list of searches, the first one that asks for more than one
            candidate at a scale is used there. None: one candidate per scale, drawn by the fused ops: the model's own
            distribution.
        sampler: ``"philox"``: an image depends only on its own seed, in any batch and on any backend. The method's
            ``g_seed`` may also be a tensor of B image seeds. ``"multinomial"``: ``torch.multinomial`` with the model's
            own generator; with one candidate per scale it gives the unpatched model's images bit for bit.
        cuda_graph: capture a whole generation as one CUDA graph for each batch size and set of settings, and replay it
            with the labels, seeds and strengths of guidance of later calls: the same images without launch overhead.
            The four graphs used last are kept, each with the memory of one generation, until :func:`unpatch`. The first
            call with new settings captures and logs this. On a CPU, for Infinity, with a :class:`varkern.PathSearch`
            or with a scorer that waits for the GPU it warns once and generates without a graph. Labels on a GPU are
            still read by the host once per call.
        loop: ``"fused"``: varkern's loop replaces the model's. ``"own"``: the model's own function runs, with all that
            it does beyond the published one, and only its draws of tokens are replaced; see :func:`varkern.searching`.
            ``"auto"``: ``"fused"`` if the model's method is known to be a published one, else ``"own"``;
            :func:`varkern.explain_patch` says which.
        method: the name of another method that generates, such as ``"car_inference"``; it runs as ``loop="own"``.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: if the model fits no family; the message lists what is missing.
        ValueError: if the search does not fit the model's sizes (scales, classes, channels), if ``sampler`` is unknown,
            if ``cuda_graph`` is combined with another sampler than ``"philox"``, or if a :class:`varkern.PathSearch`
            would run in the model's own loop, which it cannot follow.

    Example::

        >>> varkern.patch(var, varkern.BestOfM(scorer, m=4)) is var
        True
        >>> var.autoregressive_infer_cfg(B=8, label_B=labels, g_seed=0).shape
        torch.Size([8, 3, 24, 24])
        >>> _ = varkern.unpatch(var)
    """
    if cuda_graph and sampler != "philox":
        raise ValueError(
            f"cuda_graph=True needs sampler='philox', whose draws are a function of seeds, got {sampler!r}"
        )
    check(model, search, sampler=sampler)
    family, search, way = recognise(model), as_search(search), choose_way(model, loop, method)
    if cuda_graph and way.loop == "own":
        raise ValueError(f"cuda_graph=True needs loop='fused', but {way.reason}")
    if isinstance(search, PathSearch) and way.loop == "own":
        raise ValueError(f"search must not be a PathSearch with loop='own', which it cannot follow, but {way.reason}")
    replace_method(model, way.method, family, search, sampler, cuda_graph, way.loop)
    called = published_method(model, family)
    if called is not None and way.loop == "fused":
        as_called = CalledSearch(called.spec(model).num_scales, sampler)
        replace_method(model, called.method, called, as_called, sampler, cuda_graph)
    return model


class Way(NamedTuple):
    """How :func:`patch` serves a model.

    Example::

        >>> varkern.explain_patch(var).loop
        'fused'
    """

    family: str
    """``"VAR"``, ``"FlexVAR"`` or ``"Infinity"``."""
    method: str
    """The method that is replaced."""
    loop: ChosenLoop
    """``"fused"`` or ``"own"``; see :func:`patch`."""
    reason: str
    """Why, in words."""


def explain_patch(model: Any, method: str | None = None) -> Way:
    """How :func:`patch` would serve ``model``, and why; nothing is changed and nothing runs.

    Args:
        model: as :func:`patch` takes it.
        method: as :func:`patch` takes it.

    Raises:
        UnsupportedModelError: if the model fits no family, or has no such method.

    Example::

        >>> varkern.explain_patch(var).reason
        'its autoregressive_infer_cfg is a published method'
    """
    return choose_way(model, "auto", method)


def choose_way(model: Any, loop: Loop, method: str | None) -> Way:
    """The way that ``loop`` and the model's method decide on."""
    check_word("loop", loop, Loop)
    family = recognise(model)
    name = family.method if method is None else method
    found = getattr(model, name, None)
    if not callable(found):
        raise UnsupportedModelError(f"{type(model).__name__} has no method {name}")
    if loop == "fused":
        if name != family.method:
            raise ValueError(f"loop='fused' replaces {family.method} only, got method={name!r}")
        check_method(family, model)
        return Way(family.name, name, loop, "loop='fused' was asked for")
    if loop == "own":
        return Way(family.name, name, loop, "loop='own' was asked for")
    if name != family.method:
        return Way(family.name, name, "own", f"{name} is not the family's {family.method}")
    difference = find_difference(model, family, found)
    if difference is None:
        return Way(family.name, name, "fused", f"its {name} is a published method")
    return Way(family.name, name, "own", difference)


def replace_method(
    model: Any,
    name: str,
    family: Family,
    search: Search | CalledSearch | None,
    sampler: Sampler,
    cuda_graph: bool,
    loop: ChosenLoop = "fused",
) -> None:
    """Put a :class:`PatchedMethod` in the place of the method of this name, or of the patch that is there."""
    current = vars(model).get(name, ABSENT)
    if isinstance(current, PatchedMethod | CopiedMethod):
        former, original = current.former, current.__wrapped__
    else:
        former, original = current, getattr(model, name)
    replace(PatchedMethod(model, name, family, search, sampler, cuda_graph, loop, former, original))


def unpatch(model: Model) -> Model:
    """Remove the patch of a model, if it has one. Returns ``model``.

    Example::

        >>> before = dict(vars(var))
        >>> varkern.unpatch(varkern.patch(var)) is var and vars(var) == before
        True
    """
    restore(model)
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    search: Search | Sequence[Search] | None = None,
    *,
    sampler: Sampler = "philox",
    cuda_graph: bool = False,
    loop: Loop = "auto",
    method: str | None = None,
) -> Iterator[Model]:
    """:func:`patch`, with the same arguments, inside a ``with`` block; afterwards the model is as it was before.

    Example::

        >>> with varkern.patched(var, varkern.BestOfM(scorer, m=4)):
        ...     images = var.autoregressive_infer_cfg(B=8, label_B=labels, g_seed=0)
    """
    before = {name: value for name, value in vars(model).items() if isinstance(value, PatchedMethod)}
    patch(model, search, sampler=sampler, cuda_graph=cuda_graph, loop=loop, method=method)
    try:
        yield model
    finally:
        unpatch(model)
        restore(model, before)
