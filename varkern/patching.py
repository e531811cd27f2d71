"""``patch``, ``unpatch``, ``patched``: the one line that adds a search to a user's own model, or removes it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from varkern.checks import check
from varkern.families import Family, recognise
from varkern.generation import run
from varkern.graphs import GenerationGraphs
from varkern.lsrs import CalledSearch, published_method
from varkern.search import Search, as_search

Model = TypeVar("Model")
ABSENT = object()


class PatchedMethod:
    """Replaces the published method in the ``__dict__`` of one instance; signature and return value stay the same.

    A pickle or a deep copy of the model is not patched, because this object is stored as the method that it replaces. A
    shallow copy (``copy.copy``) shares this object, and with it the original model, as it shares everything else.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        search: Search | CalledSearch | None,
        sampler: str,
        cuda_graph: bool,
        former: Any,
        original: Callable[..., Any],
    ):
        self.model, self.family, self.search, self.sampler, self.former = model, family, search, sampler, former
        self.graphs = GenerationGraphs(family, model, None) if cuda_graph else None
        self.__wrapped__ = original
        self.__signature__ = inspect.signature(original)
        self.__name__, self.__doc__ = family.method, original.__doc__

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        # A fork may take more arguments than its family. Those that are not passed are left out.
        known = given | set(self.family.arguments)
        arguments = {name: value for name, value in bound.arguments.items() if name in known}
        request, search = self.family.request(arguments), self.search_for(arguments)
        if self.graphs is not None:
            self.graphs.search = search
            return self.graphs.run(request)
        return run(self.family, self.model, request, search, self.sampler).images

    def search_for(self, arguments: Mapping[str, Any]) -> Search | None:
        """The search of the patch, or the one that the method's own arguments ask for."""
        return self.search(arguments) if isinstance(self.search, CalledSearch) else self.search

    def __reduce__(self):
        if self.former is ABSENT:
            return getattr, (self.model, self.family.method)
        return identity, (self.former,)

    def __repr__(self) -> str:
        return f"<varkern's {self.__name__}, search={self.search}, sampler={self.sampler!r}>"


def identity(x: Any) -> Any:
    return x


def patch(
    model: Model,
    search: Search | Sequence[Search] | None = None,
    *,
    sampler: str = "philox",
    cuda_graph: bool = False,
) -> Model:
    """Give a model's own generation method a search, in place.

    One attribute of this one instance changes: the published method (``autoregressive_infer_cfg``), whose signature and
    return value stay. Patching again replaces the search. The model's ``state_dict`` and ``repr`` stay as they were,
    and so do all other models; a pickle or deep copy made of a patched model is not patched. The patch and the model
    hold each other: :func:`unpatch` before dropping a model whose memory is wanted back at once.

    A VAR model of LSRS' own code (dt-3t/LSRS) has a second method, ``autoregressive_infer_cfg_lsrs``, which is replaced
    likewise. It takes its search from its own arguments (``discriminator``, ``st``, ``ed``, ``m_k``, ``top_k_lsrs``,
    ``temperature_lsrs``, ``rand_list``), each with its published meaning, and not from ``search``. A
    :class:`varkern.Scorer` as ``discriminator`` is faster than the published network.

    Args:
        model: a VAR, FlexVAR or Infinity model: the published class, a fork of it, or :class:`varkern.models.VAR`.
            The VAE and the schedule that FlexVAR and Infinity get with each call are checked in that call, before any
            work. A scorer for Infinity gets the method's text condition in place of labels.
        search: the rule that keeps one candidate, such as :class:`varkern.BestOfM`. In a list of searches, at each
            scale, the first search that asks for more than one candidate is used. None: one candidate per scale, drawn
            by the fused ops: the model's own distribution.
        sampler: ``"philox"``: an image depends only on its own seed, in any batch and on any backend. The method's
            ``g_seed`` may also be a tensor of B image seeds. ``"multinomial"``: ``torch.multinomial`` with the model's
            own generator; with one candidate per scale it gives the unpatched model's images bit for bit.
        cuda_graph: capture a whole generation as one CUDA graph for each batch size and set of settings, and replay it
            with the labels, seeds and strengths of guidance of later calls: the same images without launch overhead.
            The four graphs used last are kept, each with the memory of one generation, until :func:`unpatch`. The first
            call with new settings captures and logs this. On a CPU, for Infinity, or with a scorer that waits for the
            GPU it warns once and generates without a graph. Labels on a GPU are still read by the host once per call.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: if the model fits no family; the message lists what is missing.
        ValueError: if the search does not fit the model's sizes (scales, classes, channels), if ``sampler`` is unknown,
            or if ``cuda_graph`` is combined with another sampler than ``"philox"``.

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
    family, search = recognise(model), as_search(search)
    replace_method(model, family, search, sampler, cuda_graph)
    called = published_method(model, family)
    if called is not None:
        replace_method(model, called, CalledSearch(called.spec(model).num_scales, sampler), sampler, cuda_graph)
    return model


def replace_method(
    model: Any, family: Family, search: Search | CalledSearch | None, sampler: str, cuda_graph: bool
) -> None:
    """Put a :class:`PatchedMethod` in the place of the family's method, or of the patch that is there."""
    current = vars(model).get(family.method, ABSENT)
    if isinstance(current, PatchedMethod):
        former, original = current.former, current.__wrapped__
    else:
        former, original = current, getattr(model, family.method)
    vars(model)[family.method] = PatchedMethod(model, family, search, sampler, cuda_graph, former, original)


def unpatch(model: Model) -> Model:
    """Remove the patch of a model, if it has one. Returns ``model``.

    Example::

        >>> before = dict(vars(var))
        >>> varkern.unpatch(varkern.patch(var)) is var and vars(var) == before
        True
    """
    for name, value in list(vars(model).items()):
        if isinstance(value, PatchedMethod):
            if value.former is ABSENT:
                del vars(model)[name]
            else:
                vars(model)[name] = value.former
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    search: Search | Sequence[Search] | None = None,
    *,
    sampler: str = "philox",
    cuda_graph: bool = False,
) -> Iterator[Model]:
    """:func:`patch` inside a ``with`` block; afterwards the model is as it was before, patched or not.

    Example::

        >>> with varkern.patched(var, varkern.BestOfM(scorer, m=4)):
        ...     images = var.autoregressive_infer_cfg(B=8, label_B=labels, g_seed=0)
    """
    family = recognise(model)
    families = filter(None, (family, published_method(model, family)))
    before = {family.method: vars(model).get(family.method, ABSENT) for family in families}
    patch(model, search, sampler=sampler, cuda_graph=cuda_graph)
    try:
        yield model
    finally:
        for name, value in before.items():
            if value is ABSENT:
                vars(model).pop(name, None)
            else:
                vars(model)[name] = value
