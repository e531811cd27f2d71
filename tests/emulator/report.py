"""What ran in the emulator, as a table and as a list of what was noted; and a look at single accesses."""

from __future__ import annotations

import collections

from .machine import REMARKS, Totals


def make_table(all_totals: list[Totals]) -> list[str]:
    """A line per kernel: compiled variants, launches, CTAs, warp instructions, remarks; then a line per fault."""
    by_kernel = collections.defaultdict(list)
    for totals in all_totals:
        by_kernel[totals.kernel.name].append(totals)
    lines = [f"{'kernel':28} {'variants':>8} {'launches':>8} {'CTAs':>8} {'warp instructions':>17}  noted"]
    for name, group in sorted(by_kernel.items()):
        noted = collections.Counter(what for totals in group for what, _ in totals.events)
        instructions = sum(int(totals.counters["count"].sum()) for totals in group if totals.counters)
        launches, ctas = sum(t.launches for t in group), sum(t.ctas for t in group)
        said = ", ".join(f"{what} ({count})" for what, count in noted.items()) or "-"
        lines.append(f"{name:28} {len(group):8} {launches:8} {ctas:8} {instructions:17}  {said}")
    events = [event for totals in all_totals for event in totals.events.items()]
    return lines + [f"FAULT {example}" for (what, _), (_, example) in events if what not in REMARKS]


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
