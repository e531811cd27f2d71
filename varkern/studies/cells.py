"""The cells of a sweep: one search each, with what it is sampled under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from varkern.search import BestOfM, Combined, DensitySearch, Search

MEDIAN = "median"
"""An alpha that is found: the median, over images, of the highest density over the mean, so that every other image
counts as dense."""
BEST_OF_M = {"first_scale", "last_scale", "pick", "temperature", "scorer"}
DENSITY = {"scale", "representatives", "alpha", "strategy", "metric", "per", "bandwidth", "min_distance", "threshold"}


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep; the defaults are the model alone. What does not matter to a cell takes its default.

    Args:
        m: candidates of :class:`varkern.BestOfM`, or one number a scale; 1: no such search.
        first_scale, last_scale, pick, temperature: its further arguments.
        scorer: the name of its scorer among the sweep's.
        n: candidates of :class:`varkern.DensitySearch`; 1: no such search. With ``m`` as well the density search goes
            first.
        scale: where it searches.
        alpha: a number, or ``"median"``; of the hybrid strategy alone.
        representatives, strategy, metric, per, bandwidth, min_distance, threshold: its further arguments.
        cfg: strength of guidance; None: the sweep's.
        model: the name of the model among the sweep's.
    """

    m: int | tuple[int, ...] = 1
    first_scale: int = 1
    last_scale: int | None = None
    pick: str | int = "best"
    temperature: float = 1.0
    scorer: str = ""
    n: int = 1
    scale: int = 1
    representatives: int = 10
    alpha: float | str = MEDIAN
    strategy: str = "hybrid"
    metric: str = "euclidean"
    per: str | None = None
    bandwidth: str | float | None = None
    min_distance: float | None = None
    threshold: str | None = None
    cfg: float | None = None
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha", "bandwidth", "min_distance", "cfg"):  # 0 and 0.0 are one name
            if isinstance(value := getattr(self, name), int):
                self._set(name, float(value))
        if not isinstance(self.m, int):
            self._set("m", 1 if set(self.m) == {1} else tuple(self.m))
        idle = set()
        if self.m == 1:
            idle |= BEST_OF_M
        elif not isinstance(self.m, int):
            idle |= {"first_scale", "last_scale"}
        if self.pick == "best":
            idle.add("temperature")
        if self.n == 1:
            idle |= DENSITY
        elif self.strategy != "hybrid":
            idle |= {"alpha", "threshold"}
        for field in fields(self):
            if field.name in idle:
                self._set(field.name, field.default)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def settings(self) -> dict[str, Any]:
        """What is not at its default, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @property
    def name(self) -> str:
        """All that makes this cell another than the model alone, fit for a file's name."""
        return ",".join(f"{name}={written(value)}" for name, value in self.settings.items()) or "alone"

    def search(self, scorer: Callable | None, alpha: float | None = None) -> Search | None:
        """The search, or None.

        Args:
            scorer: of that name.
            alpha: in place of ``"median"``.

        Raises:
            ValueError, TypeError: if a setting is out of its range.
        """
        searches: list[Search] = []
        if self.n != 1:
            searches.append(self.density(alpha))
        if self.m != 1:
            scales = (self.first_scale, self.last_scale) if isinstance(self.m, int) else (1, None)
            searches.append(BestOfM(scorer, self.m, *scales, self.pick, self.temperature))
        return Combined(*searches) if len(searches) > 1 else searches[0] if searches else None

    def density(self, alpha: float | None = None) -> DensitySearch:
        """The density search of a cell that has one."""
        chosen = alpha if self.alpha == MEDIAN else self.alpha
        return DensitySearch(
            self.n,
            self.representatives,
            1.0 if chosen is None else chosen,  # other strategies look at none
            self.scale,
            self.strategy,
            self.metric,
            self.per,
            self.bandwidth,
            self.min_distance,
            threshold=self.threshold,
        )

    @property
    def wants_alpha(self) -> bool:
        """True for a hybrid whose alpha is the median."""
        return self.n != 1 and self.strategy == "hybrid" and self.alpha == MEDIAN

    def most_candidates(self) -> int:
        return max(self.n, *((self.m,) if isinstance(self.m, int) else self.m))

    def fits(self, num_scales: int) -> bool:
        """True if a model of so many scales has all the scales that the cell names."""
        named = [self.first_scale] if self.m != 1 else []
        named += [self.scale] if self.n != 1 else []
        named += [] if self.last_scale is None else [self.last_scale]
        return max(named, default=0) < num_scales and (isinstance(self.m, int) or len(self.m) == num_scales)


def written(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def grid(**settings: Sequence[Any]) -> list[Cell]:
    """All combinations of settings, the last varying fastest; those that are one cell stand once.

    ``grid(m=(1, 2, 4), first_scale=(0, 1))`` has five cells: with one candidate there is no first scale.

    Raises:
        ValueError: if a setting has no values.
    """
    for name, values in settings.items():
        if not values:
            raise ValueError(f"{name} must have at least one value, got none")
    return unique(Cell(**dict(zip(settings, chosen, strict=True))) for chosen in product(*settings.values()))


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, where it first stands."""
    return list(dict.fromkeys(cells))


def from_json(settings: dict[str, Any]) -> Cell:
    """A cell from its :attr:`Cell.settings` as JSON keeps them."""
    return Cell(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
