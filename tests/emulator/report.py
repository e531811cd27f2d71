"""Reports on what ran in the emulator: a table, a list of notes, and a view of single accesses."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from .machine import REMARKS, Totals


def make_rows(all_totals: Iterable[Totals]) -> list[dict]:
    """A row per compiled kernel that was launched, of numbers and strings, which can go from process to process."""
    return [
        {
            "kernel": totals.name,
            "launches": sum(totals.grids.values()),
            "CTAs": totals.ctas,
            "instructions": int(totals.counters["count"].sum()) if totals.counters else 0,
            "events": [[what, example] for (what, _), (_, example) in totals.events.items()],
        }
        for totals in all_totals
        if totals.grids
    ]


def make_table(rows: list[dict]) -> list[str]:
    """A line per kernel: compiled variants, launches, CTAs, warp instructions, variants in which something was noted;
    then, for each kernel and kind of fault, a line with one example."""
    by_kernel, faults = collections.defaultdict(list), {}
    for row in rows:
        by_kernel[row["kernel"]].append(row)
    lines = [f"{'kernel':28} {'variants':>8} {'launches':>8} {'CTAs':>8} {'warp instructions':>17}  noted in"]
    for name, group in sorted(by_kernel.items()):
        launches, ctas, instructions = (sum(row[key] for row in group) for key in ("launches", "CTAs", "instructions"))
        noted = collections.Counter(what for row in group for what in {what for what, _ in row["events"]})
        said = ", ".join(f"{count}: {what}" for what, count in noted.items()) or "-"
        lines.append(f"{name:28} {len(group):8} {launches:8} {ctas:8} {instructions:17}  {said}")
        faults |= {(name, what): example for row in group for what, example in row["events"] if what not in REMARKS}
    return lines + [f"FAULT {example}" for example in faults.values()]


def list_accesses(totals: Totals) -> list[dict]:
    """Each access to memory: opcode, place in the source, times, bytes wanted, bytes of sectors moved, wavefronts."""
    found = []
    for k, text in enumerate(totals.kernel.text):
        words = text.split()
        opcode = "" if not words else words[1] if words[0].startswith("@") and len(words) > 1 else words[0]
        kinds = ("ld.global", "st.global", "cp.async.c", "ld.shared", "st.shared", "ldmatrix", "stmatrix")
        times = int(totals.counters["count"][k])
        if opcode.startswith(kinds) and times:
            counts = {name: int(totals.counters[name][k]) for name in ("bytes", "sectors", "waves")}
            moved = {"bytes": counts["bytes"], "sector_bytes": 32 * counts["sectors"], "wavefronts": counts["waves"]}
            found.append({"opcode": opcode, "place": totals.kernel.lines[k][1], "times": times, **moved})
    return found
