"""Render a device's figures as REPORT.md with plots.

    python -m bench.report bench/results/<device>

Reads generation.json and parts.json of ``bench/test_generation.py``; writes REPORT.md, overhead.png (time against M, as
the left of the LSRS paper's Fig. 6), memory.png (peak memory against M, as its right) and parts.png (the share of each
part). Floors are those of ``bench/roofline.py`` where the device is in its table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from bench.measure import DEVICES
from bench.roofline import PARTS, count_model, published_models

# Time over the unpatched model's, as the issue sets it: (least depth, B, M) -> at most.
BARS = {(16, 24, 4): 1.00, (20, 24, 4): 1.00, (24, 24, 4): 1.00, (30, 24, 4): 1.00}
BARS |= {(30, 24, 128): 1.05, (16, 24, 128): 1.15, (16, 1, 4): 0.5}
WAYS = ("published", "patched", "graph", "upstream", "upstream patched")
MEMORY_BAR = 1.05  # peak at M=128 over that at M=1


def median(row: dict, way: str) -> float | None:
    times = row["seconds"].get(way)
    return statistics.median(times) if times else None


def best_way(row: dict) -> str:
    """Ours at its fastest: captured where there is a graph."""
    return "graph" if "graph" in row["seconds"] else "patched"


def ratio(row: dict) -> float:
    return median(row, best_way(row)) / median(row, "published")


def times_table(rows: list[dict]) -> list[str]:
    ways = [
        way for way in ("published", "patched", "graph", "upstream", "upstream patched") if way in rows[0]["seconds"]
    ]
    lines = ["| depth | B | M | " + " | ".join(f"{way} ms" for way in ways) + " | ours / published | peak GiB | bar |"]
    lines.append("| --- " * (len(ways) + 6) + "|")
    for row in rows:
        cells = []
        for way in ways:
            times = row["seconds"][way]
            cells.append(f"{statistics.median(times) * 1e3:.1f} ({times[0] * 1e3:.1f}-{times[-1] * 1e3:.1f})")
        peak = row["peak"].get(best_way(row))
        bar = BARS.get((row["depth"], row["B"], row["M"]))
        said = "" if bar is None else f"{bar:.2f} {'met' if ratio(row) <= bar else '**missed**'}"
        memory = "" if peak is None else f"{peak / 2**30:.2f}"
        head = f"| {row['depth']} | {row['B']} | {row['M']} | "
        lines.append(head + " | ".join(cells) + f" | {ratio(row):.3f} | {memory} | {said} |")
    return lines


def upstream_line(rows: list[dict]) -> list[str]:
    near = [median(row, "published") / median(row, "upstream") for row in rows if "upstream" in row["seconds"]]
    if not near:
        return ["The published class itself was not timed in this run (`--upstream DIR` does)."]
    span = f"{min(near):.3f} to {max(near):.3f}"
    return [f"Our restatement of the published loop takes {span} times what the published class takes."]


def memory_lines(rows: list[dict]) -> list[str]:
    lines = []
    for depth, batch in dict.fromkeys((row["depth"], row["B"]) for row in rows):
        peaks = {r["M"]: r["peak"].get("patched") for r in rows if (r["depth"], r["B"]) == (depth, batch)}
        if peaks.get(128) and peaks.get(1):
            grown = peaks[128] / peaks[1]
            said = "met" if grown <= MEMORY_BAR else "**missed**"
            lines.append(f"- d{depth}, B={batch}: M=128 takes {grown:.3f} times the peak memory of M=1 ({said})")
    return lines


def parts_table(parts: dict[str, dict[str, float]], device: str) -> list[str]:
    """Measured and least milliseconds of every part; parts beyond twice their floor are marked."""
    rates = next((rates for name, rates in DEVICES.items() if name in device), None)
    lines = ["| cell | " + " | ".join(PARTS) + " |", "| --- " * (len(PARTS) + 1) + "|"]
    for cell, seconds in parts.items():
        floors = {}
        if rates:
            depth, batch, m = (int(part.lstrip("dBM=")) for part in cell.split())
            counts = count_model(*published_models(depth), batch, m)
            floors = {name: counts[name].floor(rates) for name in PARTS}
        cells = []
        for name in PARTS:
            taken = seconds.get(name)
            text = "" if taken is None else f"{taken * 1e3:.2f}"
            if taken is not None and floors.get(name):
                over = taken / floors[name]
                text += f" / {floors[name] * 1e3:.2f}" + (f" **x{over:.1f}**" if over > 2 else f" x{over:.1f}")
            cells.append(text)
        lines.append(f"| {cell} | " + " | ".join(cells) + " |")
    return lines


def plot_against_m(folder: Path, rows: list[dict], value, quantity: str, name: str) -> None:
    """One line a depth (colour) and batch (stroke), over M."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    depths, batches, candidates = (sorted({row[key] for row in rows}) for key in ("depth", "B", "M"))
    for depth in depths:
        for batch in batches:
            chosen = [row for row in rows if (row["depth"], row["B"]) == (depth, batch)]
            style = {"color": f"C{depths.index(depth)}", "linestyle": ("-", "--", ":")[batches.index(batch) % 3]}
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
    """A bar a cell of the largest batch."""
    from matplotlib.figure import Figure

    largest = max((cell.split()[1] for cell in parts), key=lambda batch: int(batch.removeprefix("B=")))
    parts = {cell: seconds for cell, seconds in parts.items() if cell.split()[1] == largest}
    figure = Figure(figsize=(6.5, 0.9 + 0.28 * len(parts)), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(parts)
    for name in PARTS:
        shares = [seconds.get(name, 0.0) / sum(seconds.values()) for seconds in parts.values()]
        axes.barh(list(parts), shares, left=lefts, label=name)
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the generation's time")
    axes.legend(fontsize=7, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(folder / "parts.png", dpi=130)


def render(folder: Path) -> str:
    """Write the report of ``folder``; returns its text."""
    generation = json.loads((folder / "generation.json").read_text())
    parts = json.loads((folder / "parts.json").read_text())
    rows = generation["rows"]
    plot_against_m(folder, rows, ratio, "time over the published loop's", "overhead.png")
    pictures = ["![time against M](overhead.png)"]
    if all(row["peak"].get(best_way(row)) for row in rows):
        plot_against_m(folder, rows, lambda r: r["peak"][best_way(r)] / 2**30, "peak memory, GiB", "memory.png")
        pictures.append("![memory against M](memory.png)")
    plot_parts(folder, parts)
    text = "\n".join(
        [
            f"# Generations on {generation['device']}",
            "",
            f"torch {generation['torch']}. Median (least-most) of generations that took turns in one run, by",
            "`python -m pytest bench/test_generation.py -q -s`; this page by `python -m bench.report FOLDER`.",
            "",
            *times_table(rows),
            "",
            *upstream_line(rows),
            "",
            *memory_lines(rows),
            "",
            " ".join(pictures),
            "",
            "## Parts",
            "",
            "Milliseconds of each part without a graph / the least it must take (`bench/roofline.py`), and the ratio;",
            "bold beyond twice the floor. Without a graph the parts hold what the host takes to launch them.",
            "",
            *parts_table(parts, generation["device"]),
            "",
            "![share of each part](parts.png)",
            "",
        ]
    )
    (folder / "REPORT.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    render(parser.parse_args().folder)


if __name__ == "__main__":
    main()
