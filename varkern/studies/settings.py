"""The settings of a sweep in a TOML file: reading, checking and printing them.

.. code-block:: toml

    images = 2000
    seeds = 3

    [[grid]]            # every combination: four cells; the model alone is always measured too
    m = [4, 16]
    pick = ["best", "resample"]

    [[grid]]
    n = 50              # one value needs no list
    strategy = ["hybrid", "top"]
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .cells import BEST_OF_M, DENSITY, MEDIAN, Cell, grid, unique
from .presets import Preset, tomllib

NUMBER, TEXT, TEXT_OR_NUMBER = (int, float), (str,), (str, int, float)
KINDS = {(int,): "an integer", NUMBER: "a number", TEXT: "a text", TEXT_OR_NUMBER: "a text or a number"}
WORDS = {"alpha": MEDIAN, "temperature": "fitted"}  # the only text that a setting takes in place of a number
GRID = {
    **dict.fromkeys(("proposals", "sweeps", "first_scale", "last_scale", "n", "scale", "representatives"), (int,)),
    **dict.fromkeys(("min_distance", "cfg"), NUMBER),
    **dict.fromkeys(("scorer", "strategy", "metric", "per", "threshold", "model"), TEXT),
    **dict.fromkeys(("pick", "temperature", "alpha", "bandwidth"), TEXT_OR_NUMBER),
}


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep. None: the default of the model and the preset.

    Args:
        preset: the name of a table of the papers; instead of ``grid``.
        grid: tables of values for the arguments of :class:`.cells.Cell`, each one value or a list of values.
        var, scorer: a file or short name, or several of them by the names that the cells use.
        vae: the VQ-VAE's checkpoint.
        reference: real images or their statistics, as for ``varkern evaluate``.
        features: the feature extractor.
        images: images per cell and seed.
        seeds: number of seeds, each with all cells.
        seed: the first seed.
        batch_size: images generated at a time.
        neighbors: number of real and of generated images that precision and recall use; 0: leave both out.
        cfg, top_k, top_p: as for :func:`varkern.generate`.
        alpha, min_distance: replace those of all density searches.
        max_m: leaves out cells with more candidates.
        dtype, autocast: data types of the weights and of ``torch.autocast``.
    """

    preset: str | None = None
    grid: tuple[Mapping[str, Any], ...] = ()
    var: str | Mapping[str, str] = "demo"
    vae: str | None = None
    scorer: str | Mapping[str, str] | None = None
    reference: str | None = None
    features: str | None = None
    images: int | None = None
    seeds: int = 3
    seed: int = 0
    batch_size: int | None = None
    neighbors: int = 50_000
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    alpha: float | str | None = None
    min_distance: float | None = None
    max_m: int | None = None
    dtype: str = "float32"
    autocast: str | None = None

    def cells(self) -> Preset:
        """The cells of ``grid``, the model alone first.

        Raises:
            ValueError: if there is no grid, or a value is out of its range.
        """
        if not self.grid:
            raise ValueError("preset or grid must be given, got neither")
        cells = [Cell()]
        for table in self.grid:
            cells += grid(**{name: value if isinstance(value, list) else [value] for name, value in table.items()})
        return Preset("sweep", "Sweep", "", tuple((cell, {}) for cell in unique(cells)))

    def as_toml(self) -> str:
        """All settings that have a value, as text that :func:`read` can read."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "grid"}
        lines = [f"{name} = {toml(value)}" for name, value in values.items() if value is not None]
        for table in self.grid:
            lines += ["", "[[grid]]", *(f"{name} = {toml(value)}" for name, value in table.items())]
        return "\n".join(lines) + "\n"


SETTINGS = {
    **dict.fromkeys(("preset", "vae", "reference", "features", "dtype", "autocast"), TEXT),
    **dict.fromkeys(("images", "seeds", "seed", "batch_size", "neighbors", "top_k", "max_m"), (int,)),
    **dict.fromkeys(("cfg", "top_p", "min_distance"), NUMBER),
    "alpha": TEXT_OR_NUMBER,
}


def read(path: Path) -> dict[str, Any]:
    """Read a settings file; returns arguments of :class:`SweepSettings` by name.

    Raises:
        FileNotFoundError, OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not TOML, has an unknown setting, or a setting has a wrong type or value.
    """
    if not path.is_file():
        raise FileNotFoundError(f"settings must be a TOML file, got {path}, which is not a file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be TOML: {error}") from error
    check_names(path, values, [*SETTINGS, "grid", "var", "scorer"])
    for name in SETTINGS.keys() & values.keys():
        check_kind(f"{path}: {name}", values[name], SETTINGS[name])
    for name in {"var", "scorer"} & values.keys():
        files = values[name].values() if isinstance(values[name], dict) else [values[name]]
        for file in files:
            check_kind(f"{path}: {name}", file, TEXT)
    tables = values.pop("grid", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: grid must be tables, each headed [[grid]], got {tables!r}")
    for number, table in enumerate(tables, 1):
        check_grid(f"{path}: grid {number}", table)
    return {**values, **({"grid": tuple(tables)} if tables else {})}


def check_grid(where: str, table: Mapping[str, Any]) -> None:
    check_names(where, table, ["m", *GRID])
    if not {"m", "n"} & table.keys():
        raise ValueError(f"{where}: m or n must be given, the numbers of candidates")
    for search, names in (("m", BEST_OF_M | {"proposals", "sweeps"}), ("n", DENSITY)):
        if search not in table and (idle := sorted(names & table.keys())):
            raise ValueError(f"{where}: {idle[0]} must not be given without {search}, got {table[idle[0]]!r}")
    for name, given in table.items():
        values = given if isinstance(given, list) else [given]
        if not values:
            raise ValueError(f"{where}: {name} must have at least one value, got none")
        for value in values:
            if name != "m" or not isinstance(value, list):
                check_kind(f"{where}: {name}", value, GRID.get(name, (int,)))
                continue
            for count in value:
                check_kind(f"{where}: {name}", count, (int,))


def check_names(where: object, values: Mapping[str, Any], known: list[str]) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown setting {name}; {hint}")


def check_kind(where: str, value: Any, kinds: tuple[type, ...]) -> None:
    word = WORDS.get(where.rpartition(" ")[2])
    if word is not None and isinstance(value, str) and value != word:
        raise ValueError(f"{where} must be a number or {word}, got {value!r}")
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{where} must be {KINDS[kinds]}, got {value!r}")


def toml(value: Any) -> str:
    """A string, number, list or mapping in TOML's syntax."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(name)} = {toml(part)}" for name, part in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
