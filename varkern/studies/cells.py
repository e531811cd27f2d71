"""The cells of a sweep: each is one search with the settings it is sampled under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from varkern.search import BestOfM, BlockResample, Combined, DensitySearch, Search

MEDIAN = "median"
"""An alpha that is measured: the median, over images, of the highest density over the mean density. Half of the images
count as dense then."""
BEST_OF_M = {"first_scale", "last_scale", "pick", "temperature", "scorer"}
DENSITY = {"scale", "representatives", "alpha", "strategy", "metric", "per", "bandwidth", "min_distance", "threshold"}


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep. The defaults are the model without a search.

    A setting that has no effect in a cell is set to its default, so that equal cells compare equal.

    Args:
        m: number of candidates of :class:`varkern.BestOfM`, or one number per scale; 1: no such search.
        proposals: number of proposals per block of :class:`varkern.BlockResample`, which is then used instead, with
            ``m`` whole maps; 0: none.
        sweeps: its number of sweeps.
        first_scale, last_scale, pick, temperature: further arguments of either; ``temperature`` may be ``"fitted"``.
        scorer: the name of its scorer, one of the sweep's scorers.
        n: number of candidates of :class:`varkern.DensitySearch`; 1: no such search. If ``m`` is given too, the density
            search has precedence.
        scale: the scale at which the density search is used.
        alpha: a number, or ``"median"``; only used by the hybrid strategy.
        representatives, strategy, metric, per, bandwidth, min_distance, threshold: further arguments of
            :class:`varkern.DensitySearch`.
        cfg: strength of guidance; None: that of the sweep.
        model: the name of the model, one of the sweep's models.
    """

    m: int | tuple[int, ...] = 1
    proposals: int = 0
    sweeps: int = 1
    first_scale: int = 1
    last_scale: int | None = None
    pick: str | int = "best"
    temperature: float | str = 1.0
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
        for name in ("temperature", "alpha", "bandwidth", "min_distance", "cfg"):  # 0 and 0.0 must give one name
            if isinstance(value := getattr(self, name), int):
                self._set(name, float(value))
        if not isinstance(self.m, int):
            self._set("m", 1 if set(self.m) == {1} else tuple(self.m))
        for field in fields(self):
            if field.name in self.idle:
                self._set(field.name, field.default)

    @property
    def idle(self) -> set[str]:
        """The names of the settings that have no effect in the cell."""
        idle = {"temperature"} if self.pick == "best" else set()
        if self.proposals == 0:
            idle.add("sweeps")
        if not self.scores:
            idle |= BEST_OF_M
        elif not isinstance(self.m, int):
            idle |= {"first_scale", "last_scale"}
        if self.n == 1:
            idle |= DENSITY
        elif self.strategy != "hybrid":
            idle |= {"alpha", "threshold"}
        return idle

    @property
    def scores(self) -> bool:
        """True for a cell whose search needs a scorer."""
        return self.m != 1 or self.proposals != 0

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @property
    def name(self) -> str:
        """:attr:`settings` as one text that can be a file's name; ``"alone"`` if there are none."""
        return ",".join(f"{name}={format_value(value)}" for name, value in self.settings.items()) or "alone"

    def search(self, scorer: Callable | None, alpha: float | None = None) -> Search | None:
        """The cell's search; None if it has none.

        Args:
            scorer: the scorer that :attr:`scorer` names.
            alpha: the number to use for ``"median"``.

        Raises:
            ValueError, TypeError: if a setting is out of its range.
        """
        searches: list[Search] = []
        if self.n != 1:
            searches.append(self.density(alpha))
        if self.proposals:
            given = {"sweeps": self.sweeps, "first_scale": self.first_scale, "last_scale": self.last_scale}
            given |= {"pick": self.pick, "temperature": self.temperature}
            searches.append(BlockResample(scorer, self.m, self.proposals, **given))
        elif self.m != 1:
            scales = (self.first_scale, self.last_scale) if isinstance(self.m, int) else (1, None)
            searches.append(BestOfM(scorer, self.m, *scales, self.pick, self.temperature))
        return Combined(*searches) if len(searches) > 1 else searches[0] if searches else None

    def density(self, alpha: float | None = None) -> DensitySearch:
        """The density search of a cell with n > 1; ``alpha``: the number to use for ``"median"``."""
        chosen = alpha if self.alpha == MEDIAN else self.alpha
        return DensitySearch(
            self.n,
            self.representatives,
            1.0 if chosen is None else chosen,  # not used by other strategies
            self.scale,
            self.strategy,
            self.metric,
            self.per,
            self.bandwidth,
            self.min_distance,
            threshold=self.threshold,
        )

    @property
    def needs_alpha(self) -> bool:
        """True for a hybrid density search whose alpha must be measured."""
        return self.n != 1 and self.strategy == "hybrid" and self.alpha == MEDIAN

    def most_candidates(self) -> int:
        most = self.m if isinstance(self.m, int) else max(self.m)
        return max(self.n, most + self.sweeps * self.proposals)

    def fits(self, num_scales: int) -> bool:
        """True if a model with ``num_scales`` scales has all the scales that the cell uses."""
        scales = [self.first_scale] if self.scores else []
        scales += [self.scale] if self.n != 1 else []
        scales += [] if self.last_scale is None else [self.last_scale]
        return max(scales, default=0) < num_scales and (isinstance(self.m, int) or len(self.m) == num_scales)


def format_value(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def grid(**settings: Sequence[Any]) -> list[Cell]:
    """All combinations of the settings, the last one varying fastest. Equal cells are listed once.

    ``grid(m=(1, 2, 4), first_scale=(0, 1))`` has five cells, because ``first_scale`` has no effect for ``m=1``.

    Raises:
        ValueError: if a setting has no values.
    """
    for name, values in settings.items():
        if not values:
            raise ValueError(f"{name} must have at least one value, got none")
    return unique(Cell(**dict(zip(settings, chosen, strict=True))) for chosen in product(*settings.values()))


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, at its first position."""
    return list(dict.fromkeys(cells))


def from_json(settings: dict[str, Any]) -> Cell:
    """A cell from its :attr:`Cell.settings`, which were read from JSON."""
    return Cell(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
