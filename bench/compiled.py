"""Registers, spills, shared memory and executed instructions of the kernels, without a GPU.

    python -m bench.compiled                              # everything, to bench/results/compiled-triton-<version>.json
    python -m bench.compiled --targets cuda:90 --out FILE # one target, to compare: python -m bench.compare BASE FILE
    python -m bench.compiled --count                      # number and time of the compilations per generation

Each launch of ``bench/launches.py`` is compiled with its specialisation: which integers are constants, which are
multiples of 16, which pointers are None. The executed instructions are counted on the emulated GPU
(``tests/emulator``), for ``sm_90``. No figure is a time. Run it with each Triton version; ``compiled.md`` has a column
for each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
import varkern.kernels
from triton.backends.compiler import GPUTarget

from tests import emulator
from varkern.ops import backend, use_backend
from varkern.tables import markdown_table

TARGETS = {f"cuda:{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["hip:gfx942"] = GPUTarget("hip", "gfx942", 64)
RESULTS = Path(__file__).parent / "results"
PAGE = """\
# Compiled kernels

Made by `python -m bench.compiled` without a GPU: no figure is a time. One column per Triton version.

## Executed instructions

Per unit, on an emulated `sm_90`: warp instructions / barriers (counted per warp) / wavefronts of shared memory /
bytes in 32-byte sectors that move between warps and caches / bytes that must move at least.

{executed}
## Registers, shared memory, spills

For every launch of generations of the published sizes (`bench/launches.py`): registers per thread / bytes of shared
memory per program / bytes spilled per thread. Each is the largest over the targets.

{compiled}"""


def record(target: str) -> dict[str, tuple[emulator.Totals, list[str], float]]:
    """Every distinct launch of ``bench/launches.py``: its specialisation, its scenarios, and seconds to assembly."""
    from .launches import scenarios, zero_memory

    emulator.install(90, run=False)
    emulator.set_target(TARGETS[target])
    forget_compilations()
    backend.takes_cpu_tensors = lambda: True
    found: dict[str, tuple[emulator.Totals, list[str], float]] = {}
    for name, run in scenarios():
        before, start = set(emulator.launched), time.perf_counter()
        for totals in emulator.launched.values():
            totals.reset()
        with zero_memory(), use_backend("triton"):
            run()
        new = len(set(emulator.launched) - before)
        seconds = (time.perf_counter() - start) / max(new, 1)
        for key, totals in emulator.launched.items():
            if totals.launches or totals.grids:
                found.setdefault(key, (totals, [], seconds if key not in before else 0.0))[1].append(name)
    return found


def forget_compilations() -> None:
    """Make every kernel compile again at its next launch, because the target has changed."""
    emulator.launched.clear()
    for info in pkgutil.iter_modules(varkern.kernels.__path__):
        for thing in vars(importlib.import_module(f"varkern.kernels.{info.name}")).values():
            if isinstance(thing, triton.JITFunction):
                thing.device_caches.clear()


def describe(totals: emulator.Totals) -> str:
    """The sizes and pointer types of a specialisation, and a digest of all its properties."""
    sizes = {name: value for name, value in totals.constants.items() if name.isupper() and value is not None}
    types = sorted({kind for kind in totals.signature.values() if str(kind).startswith("*")})
    whole = repr((sorted(totals.signature.items()), sorted(map(repr, totals.constants.items())), totals.options))
    attributes = repr(sorted(map(repr, getattr(totals.source, "attrs", {}).items())))
    digest = hashlib.sha256((whole + attributes).encode()).hexdigest()[:6]
    shown = " ".join(f"{name}={value}" for name, value in sorted(sizes.items()) if name != "INTERPRETED")
    return f"{shown} {' '.join(types)} ({digest})"


def compile_for(totals: emulator.Totals, target: str) -> dict[str, int]:
    """Registers and spilled bytes per thread and bytes of shared memory per program of a recorded launch."""
    options = {name: value for name, value in totals.options.items() if value is not None}
    with emulator.machine_code():
        compiled = triton.compile(totals.source, target=TARGETS[target], options=options)
    usage = cuda_usage(compiled.asm["cubin"]) if "cuda" in target else hip_usage(compiled.asm["amdgcn"])
    return {**usage, "shared": compiled.metadata.shared}


def cuda_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def hip_usage(assembly: str) -> dict[str, int]:
    # Scratch bytes, not spill counts: scalar registers are spilled to lanes of vector registers, not to memory.
    def largest(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return {"registers": largest("vgpr_count"), "spills": largest("private_segment_fixed_size")}


def compile_all(targets: list[str]) -> list[dict]:
    rows = []
    for target in targets:
        for totals, names, _ in record(target).values():
            usage = compile_for(totals, target)
            rows.append({"kernel": totals.name, "case": describe(totals), "target": target, "by": names, **usage})
            print(f"{target:11} {totals.name:24} {usage} {names[0]}", flush=True)
    return rows


def execute_all() -> list[dict]:
    """Counts of executed instructions on sm_90 per unit of work."""
    from .counted import cases

    emulator.install(90)
    backend.takes_cpu_tensors = lambda: True
    rows = []
    for name, unit, units, run in cases():
        for totals in emulator.launched.values():
            totals.reset()
        with use_backend("triton"):
            run()
        for totals in emulator.launched.values():
            if totals.launches:
                counts = emulator.summarise(totals)
                moved = 32 * (counts.get("load_sectors", 0) + counts.get("store_sectors", 0))
                needed = counts["bytes_read"] + counts["bytes_written"]
                row = {"instructions": counts["instructions"], "barriers": counts.get("barriers", 0)}
                row |= {"wavefronts": counts.get("wavefronts", 0), "moved": moved, "needed": needed}
                row = {key: round(value / units, 1) for key, value in row.items()}
                rows.append({"kernel": totals.name, "case": name, "unit": unit, **row})
                print(rows[-1], flush=True)
    return rows


def tabulate(folder: Path) -> str:
    """The Markdown page of the results of all Triton versions in ``folder``."""
    paths = {path.stem.removeprefix("compiled-triton-"): path for path in folder.glob("compiled-triton-*.json")}
    names = sorted(paths, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True)
    found = {name: json.loads(paths[name].read_text()) for name in names}
    executed = table(["case", "kernel", "unit"], names, found, "executed", ("case", "kernel", "unit"), executed_cell)
    largest = {name: {"compiled": over_targets(content["compiled"])} for name, content in found.items()}
    compiled = table(["kernel", "compiled for"], names, largest, "compiled", ("kernel", "case"), compiled_cell)
    return PAGE.format(executed=executed, compiled=compiled)


def over_targets(rows: list[dict]) -> list[dict]:
    """One row per launch: the largest figures over the targets, and the targets with spills.

    Several specialisations of the same sizes are numbered in their order, which is the same for all Triton versions,
    unlike their digests.
    """
    merged: dict[tuple, dict] = {}
    for row in rows:
        entry = merged.setdefault((row["kernel"], row["case"]), {"kernel": row["kernel"], "where": []})
        for key in ("registers", "shared", "spills"):
            entry[key] = max(entry.get(key, 0), row[key])
        if row["spills"]:
            entry["where"].append(row["target"])
    seen: dict[tuple, int] = {}
    for (kernel, case), entry in merged.items():
        sizes = re.sub(r" \([0-9a-f]{6}\)$", "", case)
        seen[kernel, sizes] = number = seen.get((kernel, sizes), 0) + 1
        entry["case"] = sizes if number == 1 else f"{sizes}, variant {number}"
    return list(merged.values())


def executed_cell(row: dict) -> str:
    numbers = [row["instructions"], row["barriers"], row["wavefronts"], row["moved"], row["needed"]]
    return " / ".join(f"{number:,.0f}" for number in numbers)


def compiled_cell(row: dict) -> str:
    where = f" ({', '.join(row['where'])})" if row["where"] else ""
    return f"{row['registers']} / {row['shared']} / {row['spills']}{where}"


def table(heads, names, found, part, keys, cell) -> str:
    rows = dict.fromkeys(tuple(row[key] for key in keys) for name in names for row in found[name][part])
    lines = []
    for row in rows:
        cells = [next((cell(r) for r in found[n][part] if tuple(r[k] for k in keys) == row), "") for n in names]
        lines.append([text.replace("*", r"\*") for text in (*row, *cells)])
    return markdown_table([*heads, *(f"Triton {name}" for name in names)], lines)


def count_compilations() -> None:
    """Print the number of compilations of each scenario that earlier scenarios have not made yet."""
    found = record("cuda:90")
    by_scenario: dict[str, list[float]] = {}
    for _, names, seconds in found.values():
        by_scenario.setdefault(names[0], []).append(seconds)
    for name, seconds in by_scenario.items():
        print(f"{name:28} {len(seconds):3} compilations, {sum(seconds):6.1f} s to PTX on this machine")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated targets, default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write instead of the committed one")
    parser.add_argument("--count", action="store_true", help="only count the compilations of each generation")
    options = parser.parse_args(arguments)
    if options.count:
        count_compilations()
        return 0
    wanted = options.targets.split(",")
    if unknown := set(wanted) - set(TARGETS):
        parser.error(f"--targets must be among {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    content = {"triton": triton.__version__, "executed": execute_all()}
    emulator.launched.clear()
    content["compiled"] = compile_all(wanted)
    path = options.out or RESULTS / f"compiled-triton-{triton.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=0) + "\n")
    if options.out is None:
        (RESULTS / "compiled.md").write_text(tabulate(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
