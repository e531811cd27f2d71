"""The tables of the two papers as sweeps, read from ``presets.toml``: ``varkern sweep --preset lsrs-table5``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from .cells import Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUALITY = ("fid", "sfid", "inception_score", "precision", "recall", "accuracy", "seconds")
PRESETS_FILE = Path(__file__).with_name("presets.toml")
DEFAULTS = {field.name: field.default for field in fields(Cell)}


@dataclass(frozen=True)
class Preset:
    """One table or figure of a paper.

    Args:
        name: the name that ``--preset`` takes.
        title: title of the report.
        claim: a short form of the paper's conclusion.
        rows: the cells, each with the paper's figures by name (those of :data:`.report.FIGURES`).
        shown: the figures that the report shows.
        cfg: the paper's strength of guidance.
        top_k, top_p: the paper's filters.
        timing: True: measure only time and memory, of one batch per repeat.
    """

    name: str
    title: str
    claim: str
    rows: tuple[tuple[Cell, dict[str, float]], ...]
    shown: tuple[str, ...] = QUALITY
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    timing: bool = False

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell, _ in self.rows]

    @property
    def paper(self) -> dict[Cell, dict[str, float]]:
        return dict(self.rows)

    def keep(self, wanted: Callable[[Cell], bool]) -> Preset:
        """The preset with the wanted cells only."""
        return replace(self, rows=tuple(row for row in self.rows if wanted(row[0])))


def read_presets(path: Path) -> dict[str, Preset]:
    """The presets of a file by name; its first lines describe the format."""
    found: dict[str, Preset] = {}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        rows: dict[Cell, dict[str, float]] = {}
        for other in table.pop("rows_of", []):
            rows |= found[other].paper
        settings = columns(table.pop("cells", {}))
        printed = columns(table.pop("paper", {})) or [{} for _ in settings]
        for chosen, figures in zip(settings, printed, strict=True):
            rows[Cell(**{key: DEFAULTS[key] if value == "" else value for key, value in chosen.items()})] = figures
        shown = tuple(table.pop("shown", QUALITY))
        found[name] = Preset(name=name, rows=tuple(rows.items()), shown=shown, **table)
    return found


def columns(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that is given by its columns."""
    values = [value if isinstance(value, list) else cycle([value]) for value in table.values()]
    return [dict(zip(table, row, strict=True)) for row in zip(*values, strict=False)]


PRESETS = read_presets(PRESETS_FILE)
"""By name."""
