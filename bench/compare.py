"""Compare two files of pytest-benchmark, two generation.json, or two files of ``bench.compiled``.

    python -m bench.compare BASE.json NEW.json [--threshold 0.1]

The times of a generation.json are divided by the published loop's median of the same cell. If both files of
pytest-benchmark have ``test_calibration``, a fixed piece of work without varkern, every time is divided by its median
in the same file. This makes files of two machines, or of a busy and an idle hour, more comparable.

A benchmark has regressed if its median grew by more than the threshold, and its lower quartile is above the upper
quartile of the base. A count of ``bench.compiled``, which has no noise, has regressed if it grew by more than 3%. Exit
code 1: something regressed; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COUNT_THRESHOLD = 0.03
COUNTS = ("instructions", "barriers", "wavefronts", "moved", "registers", "shared", "spills")
CALIBRATION = "test_calibration"
BESIDE = ", over the published loop"


@dataclass(frozen=True)
class Timing:
    """Quartiles of one benchmark's rounds, in seconds or in calibrations."""

    q1: float
    median: float
    q3: float

    def over(self, unit: float) -> Timing:
        return Timing(self.q1 / unit, self.median / unit, self.q3 / unit)


def read(path: Path) -> dict[str, Timing]:
    """The timing of every benchmark, by name.

    Raises:
        ValueError: if ``path`` is not a file of pytest-benchmark or a generation.json.
    """
    try:
        content = json.loads(path.read_text())
        if "rows" in content:
            return dict(timing for row in content["rows"] for timing in of_row(row))
        benchmarks = content["benchmarks"]
        return {b["fullname"]: Timing(*(b["stats"][key] for key in ("q1", "median", "q3"))) for b in benchmarks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file of pytest --benchmark-json or a generation.json: {error!r}") from error


def of_row(row: dict) -> Iterator[tuple[str, Timing]]:
    """The timings of one cell of a generation.json, divided by the published loop's median."""
    unit = statistics.median(row["seconds"]["published"])
    for way, times in row["seconds"].items():
        if way not in ("published", "upstream"):
            quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
            yield f"d{row['depth']} B={row['B']} M={row['M']} {way}{BESIDE}", Timing(*quartiles).over(unit)


def calibrate(timings: dict[str, Timing], calibration: str) -> dict[str, Timing]:
    return {name: timing.over(timings[calibration].median) for name, timing in timings.items() if name != calibration}


def verdict(base: Timing, new: Timing, threshold: float) -> str:
    """``slower``, ``faster`` or ``same``."""
    if new.median > base.median * (1 + threshold) and new.q1 > base.q3:
        return "slower"
    if new.median * (1 + threshold) < base.median and new.q3 < base.q1:
        return "faster"
    return "same"


def compare(base: dict[str, Timing], new: dict[str, Timing], threshold: float) -> tuple[str, int]:
    """The report, and the number of benchmarks that regressed."""
    calibration = next((n for n in base if n.endswith(f"::{CALIBRATION}") and n in new), None)
    if calibration:
        base, new = calibrate(base, calibration), calibrate(new, calibration)
    relative = calibration or all(name.endswith(BESIDE) for name in base)
    unit, factor = ("calibrations" if calibration else "x", 1.0) if relative else ("ms", 1e3)
    lines = [f"{'new/base':>8}  {'base':>10}  {'new':>10}  {unit}"]
    slower = 0
    for name in sorted(base.keys() & new.keys()):
        found = verdict(base[name], new[name], threshold)
        slower += found == "slower"
        ratio = new[name].median / base[name].median
        times = f"{base[name].median * factor:10.4g}  {new[name].median * factor:10.4g}"
        lines.append(f"{ratio:8.3f}  {times}  {found:<6}  {name}")
    for word, names in (("gone", base.keys() - new.keys()), ("new", new.keys() - base.keys())):
        lines += [f"{word}: {name}" for name in sorted(names)]
    count = len(base.keys() & new.keys())
    lines.append(f"{slower} of {count} slower by more than {threshold:.0%} and beyond noise")
    return "\n".join(lines), slower


def read_counts(path: Path) -> dict[str, float] | None:
    """The counts of a file of ``bench.compiled`` by name; None if ``path`` is another file."""
    try:
        content = json.loads(path.read_text())
        rows = content["executed"] + content["compiled"]
        return {
            " ".join(str(row[key]) for key in ("kernel", "case", "target") if key in row) + f", {what}": row[what]
            for row in rows
            for what in COUNTS
            if what in row
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare_counts(base: dict[str, float], new: dict[str, float]) -> tuple[str, int]:
    """The report of the figures that grew by more than COUNT_THRESHOLD, and their number."""
    common = base.keys() & new.keys()
    grown = sorted(name for name in common if new[name] > base[name] * (1 + COUNT_THRESHOLD))
    lines = [f"{base[name]:,.1f} -> {new[name]:,.1f}  {name}" for name in grown]
    lines.append(f"{len(grown)} of {len(common)} figures grew by more than {COUNT_THRESHOLD:.0%}")
    lines.append(f"{len(base.keys() - common)} figures are gone, {len(new.keys() - common)} are new")
    return "\n".join(lines), len(grown)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="least growth of the median, default %(default)s")
    options = parser.parse_args(arguments)
    counts = read_counts(options.base), read_counts(options.new)
    if None not in counts:
        report, slower = compare_counts(*counts)
        print(report)
        return 1 if slower else 0
    try:
        base, new = read(options.base), read(options.new)
        if not base.keys() & new.keys():
            raise ValueError(f"base and new must have a benchmark in common, got {options.base} and {options.new}")
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    report, slower = compare(base, new, options.threshold)
    print(report)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
