"""The models and scorers that a sweep's cells name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from varkern.families import recognise

from .cells import Cell


class Models:
    """The models and scorers that cells name; they are loaded when they are wanted, one of each at a time.

    Args:
        models: what loads a model, by name.
        scorers: what loads a scorer, by name.
        scorer_facts: JSON values that tell one scorer from another, by name, such as its file's checksum. Figures made
            with others are never joined.
        model_facts: the same of models.
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
            self._model = None  # before the next one is loaded
            self._model = name, self.models[name]()
        return self._model[1]

    def num_scales(self, name: str) -> int:
        """K of a model."""
        model = self.model(name)
        return recognise(model).spec(model).num_scales

    def scorer(self, cell: Cell) -> Callable | None:
        """The cell's scorer; None if it has no best-of-M."""
        if cell.m == 1:
            return None
        if self._scorer is None or self._scorer[0] != cell.scorer:
            self._scorer = cell.scorer, self.scorers[cell.scorer]()
        return self._scorer[1]

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What a cell's figures are made with, beside the sweep's settings."""
        return {
            "scorer": None if cell.m == 1 else self.scorer_facts.get(cell.scorer),
            "model": self.model_facts.get(cell.model),
        }

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise ``ValueError`` for a name that is not known."""
        for cell in cells:
            for what, name, known in (("model", cell.model, self.models), ("scorer", cell.scorer, self.scorers)):
                if name not in known and (what == "model" or cell.m != 1):
                    wanted = f"a {what}" if name == "" else f"{what} {name!r}"
                    given = ", ".join(map(repr, known)) or "none"
                    raise ValueError(f"cell {cell.name} wants {wanted}, and there is none: given are {given}")
