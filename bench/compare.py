"""Compare two files of pytest-benchmark, two generation.json, or two files of ``bench.compiled``.

    python -m bench.compare BASE.json NEW.json [--threshold 0.1]

The times of a generation.json are divided by the published loop's median of the same cell. If a file of
pytest-benchmark has ``test_calibration``, a fixed piece of work without varkern, every time is divided by its median.
This makes files of two machines, or of a busy and an idle hour, more comparable.

A benchmark has regressed if its median grew by more than the threshold, and its lower quartile is above the upper
quartile of the base. A count of ``bench.compiled``, which has no noise, has regressed if it grew by more than 3%. Exit
code 1: something regressed; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COUNTS = ("instructions", "barriers", "wavefronts", "moved", "registers", "shared", "spills")
COUNT_THRESHOLD = 0.03
CALIBRATION = "test_calibration"


class Figure(NamedTuple):
    """Quartiles of one benchmark's rounds; of a count, three times the same number."""

    q1: float
    median: float
    q3: float

    def over(self, unit: float) -> Figure:
        return Figure(*(value / unit for value in self))


def read(path: Path) -> dict[str, Figure]:
    """The figures of a file by name.

    Raises:
        ValueError: if ``path`` is another file.
    """
    try:
        content = json.loads(path.read_text())
        if "executed" in content:
            return dict(counts(content["executed"] + content["compiled"]))
        if "rows" in content:
            return dict(generations(content["rows"]))
        found = {b["fullname"]: Figure(*(b["stats"][q] for q in Figure._fields)) for b in content["benchmarks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = "pytest --benchmark-json, a generation.json or a file of bench.compiled"
        raise ValueError(f"{path} must be a file of {known}: {error!r}") from error
    unit = next((found.pop(name).median for name in list(found) if name.endswith(f"::{CALIBRATION}")), None)
    return found if unit is None else {f"{name}, in calibrations": found[name].over(unit) for name in found}


def counts(rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    for row in rows:
        name = " ".join(str(row[key]) for key in ("kernel", "case", "target") if key in row)
        yield from ((f"{name}, {what}", Figure(*[row[what]] * 3)) for what in COUNTS if what in row)


def generations(rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """The times of every cell, divided by the published loop's median."""
    for row in rows:
        unit = statistics.median(row["seconds"]["published"])
        for way, times in row["seconds"].items():
            if way not in ("published", "upstream"):
                quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
                yield f"d{row['depth']} B={row['B']} M={row['M']} {way}", Figure(*quartiles).over(unit)


def verdict(base: Figure, new: Figure, threshold: float) -> str:
    """``slower`` (or larger), ``faster`` or ``same``."""
    if new.median > base.median * (1 + threshold) and new.q1 > base.q3:
        return "slower"
    if new.median * (1 + threshold) < base.median and new.q3 < base.q1:
        return "faster"
    return "same"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="least growth of the median, default %(default)s")
    options = parser.parse_args(arguments)
    try:
        base, new = read(options.base), read(options.new)
        common = sorted(base.keys() & new.keys())
        if not common:
            raise ValueError(f"base and new must have a figure in common, got {options.base} and {options.new}")
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    exact = all(name.endswith(COUNTS) for name in base)
    threshold, grown = COUNT_THRESHOLD if exact else options.threshold, 0
    print(f"{'new/base':>8}  {'base':>10}  {'new':>10}")
    for name in common:
        found = verdict(base[name], new[name], threshold)
        grown += found == "slower"
        if found == "slower" or not exact:
            ratio = new[name].median / base[name].median if base[name].median else math.inf
            print(f"{ratio:8.3f}  {base[name].median:10.4g}  {new[name].median:10.4g}  {found:<6}  {name}")
    for word, names in (("gone", base.keys() - new.keys()), ("new", new.keys() - base.keys())):
        print(f"{word}: {len(names) if exact else ', '.join(sorted(names)) or 'none'}")
    print(f"{grown} of {len(common)} grew by more than {threshold:.0%} and beyond noise")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
