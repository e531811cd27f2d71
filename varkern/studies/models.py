"""The models and scorers that the cells of a sweep use, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from varkern.families import recognise

from .cells import Cell


class Models:
    """The models and scorers of a sweep. One model and one scorer are in memory at a time, loaded on first use.

    Args:
        models: functions that load a model, by name.
        scorers: functions that load a scorer, by name.
        scorer_facts: JSON values that identify a scorer, by name, such as the checksum of its file. Results that were
            made with other facts are refused.
        model_facts: the same for the models.
    """

    def __init__(
        self,
        models: Mapping[str, Callable[[], Any]],
        scorers: Mapping[str, Callable[[], Callable]],
        scorer_facts: Mapping[str, Any] | None = None,
        model_facts: Mapping[str, Any] | None = None,
    ):
        self.models, self.scorers = models, scorers
        self.scorer_facts, self.model_facts = scorer_facts or {}, model_facts or {}
        self._model: tuple[str, Any] | None = None
        self._scorer: tuple[str, Callable] | None = None

    def model(self, name: str) -> Any:
        if self._model is None or self._model[0] != name:
            self._model = None  # frees the memory before the next model is loaded
            self._model = name, self.models[name]()
        return self._model[1]

    def num_scales(self, name: str) -> int:
        """The number of scales of a model."""
        model = self.model(name)
        return recognise(model).spec(model).num_scales

    def scorer(self, cell: Cell) -> Callable | None:
        """The cell's scorer; None if its search needs none."""
        if not cell.scores:
            return None
        if self._scorer is None or self._scorer[0] != cell.scorer:
            self._scorer = cell.scorer, self.scorers[cell.scorer]()
        return self._scorer[1]

    def facts(self, cell: Cell) -> dict[str, Any]:
        """JSON values that identify the model and the scorer of a cell."""
        return {
            "scorer": self.scorer_facts.get(cell.scorer) if cell.scores else None,
            "model": self.model_facts.get(cell.model),
        }

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise ``ValueError`` if a cell uses an unknown name."""
        for cell in cells:
            for what, name, known in (("model", cell.model, self.models), ("scorer", cell.scorer, self.scorers)):
                if name not in known and (what == "model" or cell.scores):
                    needed = f"a {what}" if name == "" else f"{what} {name!r}"
                    given = ", ".join(map(repr, known)) or "none"
                    raise ValueError(f"cell {cell.name} needs {needed}, the given {what}s are {given}")
