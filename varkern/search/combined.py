"""Several searches in one generation, each at its own scales."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import TypeIs

from varkern.spec import ModelSpec

from .base import Candidates, Choice, Search, check_highest_label, check_model


class Combined:
    """At each scale, uses the first of its searches that asks for more than one candidate there.

    ``Combined(DensitySearch(scales=(1,)), BestOfM(scorer, m=4))`` searches scale 1 by density and the following scales
    by score. Every function that takes a search also takes a list or tuple of searches, which means their combination.

    Args:
        searches: any number of searches, in the order of their precedence.

    Raises:
        TypeError: if one of them is not a search.

    Example::

        >>> search = varkern.Combined(varkern.DensitySearch(n=20), varkern.BestOfM(scorer, m=4))
        >>> [search.num_candidates(scale, 5) for scale in range(5)]
        [1, 20, 4, 4, 4]
    """

    def __init__(self, *searches: Search):
        for search in searches:
            if not is_search(search):
                raise TypeError(f"searches must be searches such as varkern.BestOfM(scorer), got {describe(search)}")
            if hasattr(search, "num_paths"):
                raise TypeError("searches must not contain a PathSearch: pass it the others as its search")
        self.searches = searches

    def __repr__(self) -> str:
        return f"Combined({', '.join(map(repr, self.searches))})"

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        for search in self.searches:
            check_model(search, spec)

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        for search in self.searches:
            check_highest_label(search, highest, spec)

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """See :class:`.base.Search`."""
        search = self.at(scale, num_scales)
        return 1 if search is None else search.num_candidates(scale, num_scales)

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`.base.Search`."""
        search = self.at(candidates.scale, candidates.num_scales)
        assert search is not None, "the loop asks only where num_candidates is above 1"
        return search.choose(candidates)

    def at(self, scale: int, num_scales: int) -> Search | None:
        """The search that is used at ``scale``; None: one candidate is drawn there."""
        return next((s for s in self.searches if s.num_candidates(scale, num_scales) > 1), None)


def is_search(search: object) -> TypeIs[Search]:
    """True for an object with ``num_candidates`` and ``choose``; false for the class of a search."""
    return not isinstance(search, type) and not missing_methods(search)


def missing_methods(search: object) -> list[str]:
    """The required methods of :class:`.base.Search` that ``search`` does not have."""
    return [name for name in ("num_candidates", "choose") if not callable(getattr(search, name, None))]


def describe(search: object) -> str:
    """How an error message calls an object that is not a search."""
    return f"the class {search.__name__}" if isinstance(search, type) else type(search).__name__


def as_search(search: Search | Sequence[Search] | None) -> Search | None:
    """Returns ``search`` itself, or the combination of a list or tuple of searches.

    Raises:
        TypeError: if it is not a search, a list of searches, or None.

    Example::

        >>> search = varkern.search.as_search([varkern.DensitySearch(n=20), varkern.BestOfM(scorer, m=4)])
        >>> type(search).__name__
        'Combined'
    """
    if isinstance(search, list | tuple):
        return Combined(*search)
    if search is None or is_search(search):
        return search
    missing = [] if isinstance(search, type) else missing_methods(search)
    without = f", which has no method {missing[0]}" if len(missing) == 1 else ""
    raise TypeError(
        "search must be a search such as varkern.BestOfM(scorer), several in a list, or None, "
        f"got {describe(search)}{without}"
    )
