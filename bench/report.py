"""Render the figures of a device as REPORT.md with plots.

    python -m bench.report bench/results/<device>

This reads generation.json, parts.json and blocks.json of ``bench/test_generation.py``, even of a stopped run. It writes
REPORT.md, overhead.png (time against M, as the left side of the LSRS paper's Fig. 6), memory.png (peak memory against
M, as its right side) and parts.png (the share of each part). Floors are those of ``bench/roofline.py``, if it knows the
device. Exit code 2: there is nothing to report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import cache
from pathlib import Path

from bench.measure import Rates, rates_of
from bench.roofline import PARTS, Part, count_model, published_models
from varkern.studies.report import COLOURS
from varkern.tables import markdown_table

# The bars: the largest accepted time over that of the published loop, by (depth, B, M).
BARS = {(16, 24, 4): 1.00, (20, 24, 4): 1.00, (24, 24, 4): 1.00, (30, 24, 4): 1.00}
BARS |= {(30, 24, 128): 1.05, (16, 24, 128): 1.10, (16, 1, 1): 0.5, (16, 1, 4): 0.5}
CPU_BARS = {(8, 2, 4): 1.05}
WAYS = ("published", "patched", "graph", "upstream", "upstream patched")
MEMORY_BAR = 1.05  # peak at M=128 over that at M=1
FAR = 2.0  # a part that takes more than FAR times its floor is marked


def median(row: dict, way: str) -> float | None:
    times = row["seconds"].get(way)
    return statistics.median(times) if times else None


def best_way(row: dict) -> str:
    """The fastest of our ways: a captured graph, if it was timed."""
    return "graph" if "graph" in row["seconds"] else "patched"


def ratio(row: dict) -> float:
    return median(row, best_way(row)) / median(row, "published")


def bars_of(device: str) -> dict[tuple[int, int, int], float]:
    return CPU_BARS if device == "cpu" else BARS


def times_table(rows: list[dict], bars: dict) -> str:
    ways = [way for way in WAYS if any(way in row["seconds"] for row in rows)]
    head = ["depth", "B", "M", *(f"{way} ms" for way in ways), "ours / published", "peak GiB", "bar"]
    lines = []
    for row in rows:
        peak, key = row["peak"].get(best_way(row)), (row["depth"], row["B"], row["M"])
        bar = f"{bars[key]:.2f} {verdict(ratio(row), bars[key])}" if key in bars else None
        memory = None if peak is None else f"{peak / 2**30:.2f}"
        lines.append([*key, *(spread_of(row["seconds"].get(way)) for way in ways), f"{ratio(row):.3f}", memory, bar])
    return markdown_table(head, lines)


def spread_of(times: list[float] | None) -> str | None:
    return times and f"{statistics.median(times) * 1e3:.1f} ({times[0] * 1e3:.1f}-{times[-1] * 1e3:.1f})"


def verdict(value: float, bar: float) -> str:
    return "met" if value <= bar else "**missed**"


def bar_lines(rows: list[dict], bars: dict) -> list[str]:
    """Lines with the number of bars that were met, and those that were missed or not measured."""
    ratios = {(row["depth"], row["B"], row["M"]): ratio(row) for row in rows}
    met = [key for key, bar in bars.items() if key in ratios and ratios[key] <= bar]
    missed = [key for key, bar in bars.items() if key in ratios and ratios[key] > bar]
    absent = [key for key in bars if key not in ratios]
    lines = [f"Bars of time: {len(met)} met, {len(missed)} missed, {len(absent)} not measured, of {len(bars)}."]
    for word, keys in (("Missed", missed), ("Not measured", absent)):
        if keys:
            lines.append(f"{word}: " + ", ".join(cell_name(*key) for key in keys) + ".")
    return lines


def cell_name(depth: int, batch: int, m: int) -> str:
    return f"d{depth} B={batch} M={m}"


def upstream_line(rows: list[dict]) -> list[str]:
    near = [median(row, "published") / median(row, "upstream") for row in rows if "upstream" in row["seconds"]]
    if not near:
        return ["The published class was not timed in this run (use `--upstream DIR`)."]
    span = f"{min(near):.3f} to {max(near):.3f}"
    return [f"Our version of the published loop takes {span} times as long as the published class."]


def memory_lines(rows: list[dict]) -> list[str]:
    lines = []
    for depth, batch in dict.fromkeys((row["depth"], row["B"]) for row in rows):
        for way in ("patched", "graph"):
            peaks = {r["M"]: r["peak"].get(way) for r in rows if (r["depth"], r["B"]) == (depth, batch)}
            if peaks.get(128) and peaks.get(1):
                grown = peaks[128] / peaks[1]
                said = f"M=128 takes {grown:.3f} times the peak memory of M=1 ({verdict(grown, MEMORY_BAR)})"
                lines.append(f"- d{depth}, B={batch}, {way}: {said}")
    return lines


@cache
def counts_of(cell: str) -> dict[str, Part]:
    depth, batch, m = (int(part.lstrip("dBM=")) for part in cell.split())
    return count_model(*models_of(depth), batch, m)


models_of = cache(published_models)


def parts_table(parts: dict[str, dict[str, float]], rates: Rates | None) -> str:
    """Measured time and floor of every part in milliseconds; ratios above ``FAR`` are bold, with the part's bound."""
    lines = []
    for cell, seconds in parts.items():
        cells = [cell]
        for name in PARTS:
            taken = seconds.get(name)
            text = "" if taken is None else f"{taken * 1e3:.2f}"
            floor = counts_of(cell)[name].floor(rates) if rates else 0
            if taken is not None and floor:
                over, bound = taken / floor, counts_of(cell)[name].bound(rates)
                text += f" / {floor * 1e3:.2f}" + (f" **x{over:.1f}, {bound}**" if over > FAR else f" x{over:.1f}")
            cells.append(text)
        lines.append(cells)
    return markdown_table(["cell", *PARTS], lines)


def blocks_lines(rows: list[dict]) -> list[str]:
    """Times of block resampling beside best-of-M with equally many scored maps; nothing without such figures."""
    if not rows:
        return []
    kinds = [kind for kind in ("", ", graph") if all(f"blocks{kind}" in row["seconds"] for row in rows)]
    head = ["depth", "B", "scored maps per image"]
    head += [f"{what}{kind}" for kind in kinds for what in ("best of M ms", "blocks ms", "blocks / best of M")]
    lines = []
    for row in rows:
        cells = [row["depth"], row["B"], f"{sum(row['M']):,}"]
        for kind in kinds:
            ways = [f"{name}{kind}" for name in ("best of M", "blocks")]
            best, blocks = (median(row, way) for way in ways)
            cells += [*(spread_of(row["seconds"][way]) for way in ways), f"{blocks / best:.3f}"]
        lines.append(cells)
    command = "`python -m pytest bench/test_generation.py -q -s -k blocks`: generations that took turns in one run."
    return ["## Blocks beside best of M", "", command, "", markdown_table(head, lines)]


def predicted_table(rows: list[dict], rates: Rates | None) -> list[str]:
    """The sum of floors and the measured time per cell, and both over those of M=1."""
    if rates is None:
        return []
    head = ["cell", "sum of floors ms", "ours ms", "ratio", "predicted M / M=1", "measured M / M=1"]
    lines = []
    ones = {(row["depth"], row["B"]): row for row in rows if row["M"] == 1}
    for row in rows:
        cell, one = cell_name(row["depth"], row["B"], row["M"]), ones.get((row["depth"], row["B"]))
        floor, taken = floor_of(cell, rates), median(row, best_way(row))
        grown: list[str | None] = [None, None]
        if one is not None:
            predicted = floor / floor_of(cell_name(row["depth"], row["B"], 1), rates)
            grown = [f"{predicted:.3f}", f"{taken / median(one, best_way(one)):.3f}"]
        lines.append([cell, f"{floor * 1e3:.2f}", f"{taken * 1e3:.2f}", f"{taken / floor:.2f}", *grown])
    return ["The sum of all floors and the measured time:", "", markdown_table(head, lines)]


def floor_of(cell: str, rates: Rates) -> float:
    return sum(part.floor(rates) for part in counts_of(cell).values())


def plot_against_m(folder: Path, rows: list[dict], value, quantity: str, name: str) -> None:
    """Plot ``value`` against M, with one line per depth (colour) and batch size (line style)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    depths, batches, candidates = (sorted({row[key] for row in rows}) for key in ("depth", "B", "M"))
    for depth in depths:
        for batch in batches:
            chosen = [row for row in rows if (row["depth"], row["B"]) == (depth, batch)]
            style = {
                "color": COLOURS[depths.index(depth) % len(COLOURS)],
                "linestyle": ("-", "--", ":")[batches.index(batch) % 3],
            }
            label = f"d{depth}, B={batch}"
            axes.plot([r["M"] for r in chosen], [value(r) for r in chosen], marker=".", label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(candidates, map(str, candidates))
    axes.set_xlabel("candidates M")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(folder / name, dpi=130)


def plot_parts(folder: Path, parts: dict[str, dict[str, float]]) -> None:
    """Plot the shares of the parts, with one bar per cell of the largest batch."""
    from matplotlib.figure import Figure

    largest = max((cell.split()[1] for cell in parts), key=lambda batch: int(batch.removeprefix("B=")))
    parts = {cell: seconds for cell, seconds in parts.items() if cell.split()[1] == largest}
    figure = Figure(figsize=(6.5, 0.9 + 0.28 * len(parts)), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(parts)
    for name, colour in zip(PARTS, COLOURS, strict=True):
        shares = [seconds.get(name, 0.0) / sum(seconds.values()) for seconds in parts.values()]
        axes.barh(list(parts), shares, left=lefts, label=name, color=colour)
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the generation's time")
    axes.legend(fontsize=7, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(folder / "parts.png", dpi=130)


def plots(folder: Path, rows: list[dict], parts: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Draw the plots that have figures; returns their Markdown for the generations and for the parts."""
    plot_against_m(folder, rows, ratio, "time / time of the published loop", "overhead.png")
    pictures = ["![time against M](overhead.png)"]
    if all(row["peak"].get(best_way(row)) for row in rows):
        plot_against_m(folder, rows, lambda r: r["peak"][best_way(r)] / 2**30, "peak memory, GiB", "memory.png")
        pictures.append("![memory against M](memory.png)")
    if not parts:
        return pictures, []
    plot_parts(folder, parts)
    return pictures, ["![share of each part](parts.png)"]


def versions_line(generation: dict) -> str:
    """The versions that the run has written."""
    names = ("torch", "triton", "cuda", "driver", "python")
    return ", ".join(f"{name} {generation[name]}" for name in names if generation.get(name))


def render(folder: Path) -> str:
    """Write the report of ``folder`` and return its text.

    Raises:
        ValueError: if there are no figures.
    """
    generation, parts = (read(folder / name) for name in ("generation.json", "parts.json"))
    rows = sorted(generation.get("rows", []), key=lambda row: (row["depth"], row["B"], row["M"]))
    if not rows:
        raise ValueError(f"folder must have a generation.json with figures, got {folder}")
    order = [cell_name(row["depth"], row["B"], row["M"]) for row in rows]
    parts = {cell: parts[cell] for cell in order if cell in parts}
    device, unfinished = generation["device"], not generation.get("finished", True)
    rates, bars = rates_of(device), bars_of(device)
    pictures, part_pictures = plots(folder, rows, parts)
    sections = [
        [f"# Generations on {device}"],
        [
            f"{versions_line(generation)}. Median (minimum-maximum) of generations that took turns in one run of",
            "`python -m pytest bench/test_generation.py -q -s`. Page by `python -m bench.report FOLDER`.",
        ],
        ["**The run was stopped: cells are missing.**"] if unfinished else [],
        [times_table(rows, bars)],
        bar_lines(rows, bars),
        upstream_line(rows),
        memory_lines(rows),
        [" ".join(pictures)],
        blocks_lines(read(folder / "blocks.json") or []),
        ["## Parts"],
        [
            "Milliseconds of each part without a graph / its floor (`bench/roofline.py`, for the devices of",
            "`bench/measure.py`), and the ratio, which is bold above 2 and followed by what bounds the part. Without a",
            "graph, the times include launching by the host.",
        ],
        [parts_table(parts, rates)],
        predicted_table(rows, rates),
        part_pictures,
    ]
    text = "\n\n".join("\n".join(section).rstrip() for section in sections if section) + "\n"
    (folder / "REPORT.md").write_text(text)
    return text


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    try:
        render(parser.parse_args(arguments).folder)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
