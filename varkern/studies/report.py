"""The results of a sweep as Markdown, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from varkern.runs import atomically, write_text
from varkern.tables import markdown_table

from .cells import Cell, format_value, from_json
from .presets import Preset
from .sweep import Entry

FIGURES = {  # title, digits after the decimal point
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "inception_score": ("Inception score", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "accuracy": ("accuracy", 3),
    "mean_difference": ("mean difference²", 3),
    "trace_term": ("trace term", 3),
    "trace_generated": ("Tr Σ_g", 2),
    "cross_term": ("2 Tr (Σ_r Σ_g)^½", 2),
    "dense": ("share of dense images", 2),
    "alpha": ("alpha", 2),
    "scored": ("scored maps per scale", 1),
    "seconds": ("ms per image", 2),
    "peak_bytes": ("peak memory, GiB", 2),
}
UNITS = {"seconds": 1e3, "peak_bytes": 2**-30}
COSTS = tuple(UNITS)
SETTLED = ("alpha", "scored")  # one number for all seeds
# Okabe and Ito's palette without yellow; colour-blind people can distinguish these colours. One marker per colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDE = 4  # the axis of FID is logarithmic if its largest value is more than WIDE times its smallest
# FID, sFID and Inception score are defined for Inception's features only; with others, the tables use these titles.
OTHER_FEATURES = {"fid": "Fréchet distance", "sfid": "spatial Fréchet distance", "inception_score": "class score"}


class Summary(NamedTuple):
    """A figure over the seeds: its mean and half its range. For costs: the minimum, without a range."""

    value: float
    spread: float | None


class Found(NamedTuple):
    """The contents of a report; ``times`` says in words how times were measured."""

    preset: Preset
    entries: list[Entry]
    settings: dict[str, Any]
    command: str
    times: str = "the median over batches"

    def as_json(self) -> dict[str, Any]:
        cells = [{"settings": entry.cell.settings, "repeats": entry.repeats} for entry in self.entries]
        facts = {"preset": self.preset.name, "command": self.command, "times": self.times}
        return {**facts, "settings": self.settings, "cells": cells}


def from_file(path: Path, preset: Preset) -> Found:
    """Read the JSON file that :func:`write` wrote."""
    report = json.loads(path.read_text(encoding="utf-8"))
    entries = [Entry(from_json(cell["settings"]), cell["repeats"]) for cell in report["cells"]]
    return Found(preset, entries, report["settings"], report["command"], report["times"])


def summary(entry: Entry, name: str) -> Summary | None:
    """One figure of a cell; None if it was not measured."""
    values = [repeat[name] * UNITS.get(name, 1) for repeat in entry.repeats if repeat.get(name) is not None]
    if not values:
        return None
    if name in COSTS:  # other work of the machine can only increase these
        return Summary(min(values), None)
    spread = (max(values) - min(values)) / 2 if len(values) > 1 and name not in SETTLED else None
    return Summary(fmean(values), spread)  # the rounding of sum() depends on the Python version, that of fmean() not


def titles(found: Found) -> dict[str, str]:
    """The title of every figure, by name."""
    changed = {} if uses_inception(found) else OTHER_FEATURES
    return {name: changed.get(name, title) for name, (title, _) in FIGURES.items()}


def uses_inception(found: Found) -> bool:
    return found.settings.get("features", "inception") == "inception"


def list_varying(cells: Sequence[Cell]) -> list[str]:
    """The settings that have more than one value, over the cells in which they have an effect."""
    names = [field.name for field in fields(Cell)]
    return [n for n in names if len({getattr(cell, n) for cell in cells if n not in cell.idle}) > 1]


def list_columns(found: Found) -> list[str]:
    """The figures in the table: those of the preset that were measured, and what alpha, "dense" and "scored" say."""
    names = list(found.preset.shown)
    if any(cell.n != 1 and cell.strategy == "hybrid" for cell in found.preset.cells):
        names = ["alpha", "dense", *names]
    if any(cell.proposals for cell in found.preset.cells):
        names = ["scored", *names]
    return [name for name in names if any(summary(entry, name) for entry in found.entries)]


def format_setting(cell: Cell, name: str) -> str:
    """A setting as the table shows it; empty if it has no effect in the cell."""
    value = getattr(cell, name)
    if name in cell.idle or value is None or value == "":
        return ""
    if (name == "m" and cell.n != 1 and value == 1) or (name == "n" and value == 1):
        return ""
    return format_value(value)


def markdown(found: Found) -> str:
    """The table: one row per cell, mean ± half the range over the seeds, followed by the paper's figures."""
    columns, names, heading = list_varying(found.preset.cells), list_columns(found), titles(found)
    columns = [name for name in columns if name != "alpha" or "alpha" not in names] or ["m"]
    printed = [name for name in FIGURES if any(name in row for row in found.preset.paper.values())]
    head = [*columns, *(heading[name] for name in names), *(f"paper: {FIGURES[name][0]}" for name in printed)]
    lines = []
    for entry in found.entries:
        paper = found.preset.paper.get(entry.cell, {})
        chosen = [format_setting(entry.cell, name) for name in columns]
        if not entry.cell.scores and entry.cell.n == 1 and not chosen[0]:
            chosen[0] = "alone"
        lines.append(
            [
                *chosen,
                *(format_summary(summary(entry, name), FIGURES[name][1]) for name in names),
                *(f"{paper[name]:g}" if name in paper else "" for name in printed),
            ]
        )
    return markdown_table(head, lines)


def format_summary(value: Summary | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.value:.{digits}f}" + ("" if value.spread is None else f" ± {value.spread:.{digits}f}")


def page(found: Found) -> str:
    """The table under its title, the paper's claim and the command that made it."""
    settings, repeats = found.settings, max(len(entry.repeats) for entry in found.entries)
    seeds = (
        f"seed {settings['seed']}" if repeats == 1 else f"seeds {settings['seed']} to {settings['seed'] + repeats - 1}"
    )
    lines = [f"### {found.preset.title}", ""]
    if found.preset.claim:
        lines += [f"The paper: {found.preset.claim}", ""]
    sampling = ", ".join(f"{name}={settings[name]}" for name in ("cfg", "top_k", "top_p") if name in settings)
    lines += [
        f"`{found.command}`: {settings['images']:,} images per cell and seed, {seeds}; {sampling}. "
        f"Figures are the mean ± half the range over the seeds; times ({found.times}) are the minimum over the seeds.",
        "",
        *(f"Not measured: {reason}\n" for reason in list_missing(found)),
    ]
    return "\n".join(lines) + "\n" + markdown(found)


def list_missing(found: Found) -> list[str]:
    """The figures of the preset that could not be measured, each with its reason."""
    reasons: dict[str, str] = {}
    for entry in found.entries:
        for repeat in entry.repeats:
            reasons |= {n: why for n, why in repeat.get("missing", {}).items() if n in found.preset.shown}
    return [f"{titles(found)[name]}: {reason}" for name, reason in reasons.items()]


def as_csv(found: Found) -> str:
    """One line per cell and seed, with every setting and every figure."""
    settings = [field.name for field in fields(Cell)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*settings, "seed", *({"alpha": "alpha_found"}.get(name, name) for name in FIGURES)])
    for entry in found.entries:
        for repeat in entry.repeats:
            chosen = [format_value(getattr(entry.cell, name)) for name in settings]
            writer.writerow([*chosen, repeat["seed"], *(repeat.get(name) for name in FIGURES)])
    return buffer.getvalue()


def write(found: Found, folder: Path) -> list[Path]:
    """Write ``NAME.md``, ``NAME.csv``, ``NAME.json`` and, if there are figures to draw, ``NAME.png``.

    Returns:
        the paths of the written files.
    """
    stem = folder / found.preset.name
    contents = {
        ".md": page(found),
        ".csv": as_csv(found),
        ".json": json.dumps(found.as_json(), indent=1) + "\n",
    }
    paths = []
    for suffix, content in contents.items():
        paths.append(stem.with_name(stem.name + suffix))
        write_text(paths[-1], content)
    if list_panels(found):
        paths.append(stem.with_name(stem.name + ".png"))
        draw(found, paths[-1])
    return paths


class Axis(NamedTuple):
    """A horizontal axis of the picture. ``value`` returns None for an entry that has no point on it."""

    name: str
    title: str
    value: Callable[[Entry], float | None]
    logarithmic: bool


def axes_of(found: Found) -> list[Axis]:
    """An axis for each of M, n, the first scale and the density search's scale that varies, and one for the time.

    Where a search scores more maps than M, their number takes the place of M.
    """
    blocks = any(cell.proposals for cell in found.preset.cells)
    axes = [Axis("scored", "scored maps per image and scale", partial(entry_figure, name="scored"), True)] * blocks
    for name, title, logarithmic in (
        ("m", "candidates M", True),
        ("first_scale", "first searched scale", False),
        ("n", "candidates n", True),
        ("scale", "searched scale", False),
    ):
        values = {value for cell in found.preset.cells if (value := number_of(cell, name)) is not None}
        if len(values) > 1 and not (blocks and name == "m"):
            axes.append(Axis(name, title, partial(entry_number, name=name), logarithmic))
    if not found.settings["timing"]:
        axes.append(Axis("seconds", FIGURES["seconds"][0], partial(entry_figure, name="seconds"), False))
    return axes or [Axis("m", "candidates M", partial(entry_number, name="m"), False)]


def number_of(cell: Cell, name: str) -> float | None:
    """M, n or a scale of a cell's search; None if the cell has no such search, or one M per scale."""
    searched = cell.scores and isinstance(cell.m, int) if name in ("m", "first_scale") else cell.n != 1
    return float(getattr(cell, name)) if searched else None


def entry_number(entry: Entry, name: str) -> float | None:
    return number_of(entry.cell, name)


def entry_figure(entry: Entry, name: str) -> float | None:
    found = summary(entry, name)
    return None if found is None else found.value


def list_panels(found: Found) -> list[str]:
    """The figures in the picture: costs; FID and its parts; or FID, a figure of quality and one of diversity."""
    if found.settings["timing"]:
        wanted: tuple[str, ...] = COSTS
    elif "trace_term" in found.preset.shown:
        wanted = ("fid", "mean_difference", "trace_term")
    elif uses_inception(found):
        wanted = ("fid", "inception_score", "recall")
    else:
        wanted = ("fid", "precision", "recall")
    return [name for name in wanted if any(summary(entry, name) for entry in found.entries)]


def draw(found: Found, path: Path) -> None:
    """Draw every figure over every axis, with one line per setting and a dashed line for the model alone, as PNG."""
    from matplotlib.figure import Figure

    names, axes = list_panels(found), axes_of(found)
    figure = Figure(figsize=(0.6 + 3.9 * len(axes), 1.2 + 2.4 * len(names)), layout="constrained")
    # Each axis has its own legend, because its lines differ only in the settings that the axis does not show.
    for column, axis in zip(figure.subfigures(1, len(axes), squeeze=False)[0], axes, strict=True):
        panels = column.subplots(len(names), 1, squeeze=False)[:, 0]
        for panel, name in zip(panels, names, strict=True):
            draw_panel(panel, found, name, axis)
        handles, labels = panels[0].get_legend_handles_labels()
        columns = 2 if len(labels) > 4 else 1
        column.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    figure.suptitle(found.preset.title, fontsize=10)
    with atomically(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def draw_panel(panel: Any, found: Found, name: str, axis: Axis) -> None:
    """Draw one figure over one axis."""
    panel.set_prop_cycle(color=COLOURS, marker=MARKERS)
    lines: dict[str, list[Entry]] = {}
    for entry in found.entries:
        if not entry.cell.scores and entry.cell.n == 1:
            value = summary(entry, name)
            if value is not None:
                label = " ".join(["the model alone", *(f"{k}={v}" for k, v in entry.cell.settings.items())])
                panel.axhline(value.value, color="grey", linestyle="--", linewidth=1, label=label)
        elif axis.value(entry) is not None:
            lines.setdefault(line_of(found, entry.cell, axis.name), []).append(entry)
    if axis.name != "seconds":  # leaves out lines with a single point, unless there are no others
        lines = {k: v for k, v in lines.items() if len({axis.value(entry) for entry in v}) > 1} or lines
    for label, entries in lines.items():
        points = [(axis.value(entry), found_value) for entry in entries if (found_value := summary(entry, name))]
        points.sort(key=lambda point: point[0])
        panel.errorbar(
            [x for x, _ in points],
            [y.value for _, y in points],
            yerr=[y.spread or 0.0 for _, y in points],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=label,
        )
    if axis.logarithmic:
        ticks = sorted({x for entries in lines.values() for entry in entries if (x := axis.value(entry)) is not None})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    elif axis.name != "seconds":
        panel.xaxis.get_major_locator().set_params(integer=True)
    values = [y.value for entry in found.entries if (y := summary(entry, name))]
    if name == "fid" and min(values) > 0 and max(values) > WIDE * min(values):
        low, high = panel.get_ylim()
        panel.set_yscale("log")
        ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
        panel.set_yticks([t for t in ticks if max(low, min(values)) * 0.7 <= t <= high], minor=False)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
    panel.set_xlabel(axis.title, fontsize=9)
    panel.set_ylabel(titles(found)[name], fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)


def line_of(found: Found, cell: Cell, axis: str) -> str:
    """The label of a cell's line: its kind of search, and the varying settings that the axis does not show."""
    searched = [other for other in found.preset.cells if kind(other)]
    hidden = {"seconds": {"m", "n"}, "scored": {"m", "proposals", "sweeps"}}.get(axis, {axis})
    names = [name for name in list_varying(found.preset.cells) if name not in hidden | {"alpha"}]
    parts = [f"{name}={value}" for name in names if (value := format_setting(cell, name))]
    kinds = [kind(cell)] if len({kind(other) for other in searched}) > 1 else []
    return ", ".join(kinds + parts) or "searched"


def kind(cell: Cell) -> str:
    """The kind of a cell's search in words; empty if it has none."""
    kinds = ["density"] if cell.n != 1 else []
    if cell.proposals:
        kinds.append("blocks")
    elif cell.m != 1:
        kinds.append("best of M" if isinstance(cell.m, int) else "M by scale")
    return " and ".join(kinds)
