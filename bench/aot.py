"""Compile every kernel ahead of time for every target, on a machine with or without a GPU, and tabulate what it takes.

    python bench/aot.py                  # all of it; writes bench/results/aot-triton-<version>.json and aot.md
    python bench/aot.py sampling --targets cuda:90 --no-write

A module of ``kernels/`` takes part by offering ``aot_specs()``, itself or in a file of its own, <module>_aot.py. That
yields dictionaries:

    label       what the row of the table is called: the sizes that matter
    kernel      the ``@triton.jit`` function
    signature   {argument: type} for the run-time arguments, in Triton's words: "*fp32", "i32", "fp32", ...
    constexprs  {argument: value} for the others (None for a pointer left out)
    divisible   arguments that are multiples of 16, as Triton would find out at a launch; optional
    options     launch options: num_warps, num_stages, enable_fp_fusion, ...; optional
    essential   True for the few rows that the tests compile too; optional
    no_spills   True if registers spilled to memory are an error for this row; optional

The table has one column a Triton version; run the script once under each (``TRITON_INTERPRET`` must be unset).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import varkern.kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "cuda:120": GPUTarget("cuda", 120, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
RESULTS = Path(__file__).parent / "results"


def specs(only: str | None = None) -> Iterator[dict]:
    """Every kernel module's specifications, each with its module's name."""
    for module_info in pkgutil.iter_modules(varkern.kernels.__path__):
        name = module_info.name.removesuffix("_aot")
        if only not in (None, name):
            continue
        module = importlib.import_module(f"varkern.kernels.{module_info.name}")
        for spec in getattr(module, "aot_specs", tuple)():
            yield {"module": name, **spec}


def compile_spec(spec: dict, target: GPUTarget) -> dict:
    """Compile; return vector registers a thread, shared bytes a program, spilled bytes a thread."""
    kernel = spec["kernel"]
    types = {name: spec["signature"].get(name, "constexpr") for name in kernel.arg_names}
    missing = [n for n, t in types.items() if t == "constexpr" and n not in spec["constexprs"]]
    if missing:
        raise ValueError(f"{spec['label']}: neither signature nor constexprs name {', '.join(missing)}")
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in spec.get("divisible", ())}
    source = ASTSource(kernel, types, spec["constexprs"], attributes)
    compiled = triton.compile(source, target=target, options=spec.get("options", {}))
    usage = _cuda_usage(compiled.asm["cubin"]) if target.backend == "cuda" else _hip_usage(compiled.asm["amdgcn"])
    return {**usage, "shared": compiled.metadata.shared}


def _cuda_usage(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def _hip_usage(assembly: str) -> dict:
    # Scratch bytes, not spill counts: scalar registers spill into lanes of vector registers, which touches no memory.
    def field(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return {"registers": field("vgpr_count"), "spills": field("private_segment_fixed_size")}


def tabulate(folder: Path) -> str:
    """The Markdown table of all versions' results in ``folder``."""
    versions = {}
    for path in folder.glob("aot-triton-*.json"):
        versions[path.stem.removeprefix("aot-triton-")] = json.loads(path.read_text())
    names = sorted(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True)
    rows = dict.fromkeys(tuple(row["row"]) for name in names for row in versions[name])
    lines = [
        "# Kernels compiled ahead of time",
        "",
        "Registers a thread / bytes of shared memory a program / bytes a thread spills to memory, one column a Triton",
        "version. By `python bench/aot.py`.",
        "",
        "| kernel | case | target | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row in rows:
        cells = []
        for name in names:
            found = next((r for r in versions[name] if tuple(r["row"]) == row), None)
            cells.append(f"{found['registers']} / {found['shared']} / {found['spills']}" if found else "")
        lines.append("| " + " | ".join((*row, *cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", nargs="?", help="one module of kernels/; default: all")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default: %(default)s")
    parser.add_argument("--essential", action="store_true", help="the rows that tests compile, not all of them")
    parser.add_argument("--no-write", action="store_true", help="only print")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must be unset: interpreted kernels cannot be compiled")
    results, failures = [], 0
    for spec in specs(arguments.module):
        if arguments.essential and not spec.get("essential"):
            continue
        for target in arguments.targets.split(","):
            row = (spec["module"], spec["label"], target)
            usage = compile_spec(spec, TARGETS[target])
            failed = bool(spec.get("no_spills") and usage["spills"])
            failures += failed
            print(*row, usage, "SPILLS" if failed else "", flush=True)
            results.append({"row": row, **usage})
    if not arguments.no_write:
        path = RESULTS / f"aot-triton-{triton.__version__}.json"
        if path.exists():
            done = {tuple(r["row"]) for r in results}
            former = json.loads(path.read_text())
            partial = arguments.module or arguments.essential or set(arguments.targets.split(",")) != set(TARGETS)
            results = [r for r in former if partial and tuple(r["row"]) not in done] + results
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=0) + "\n")
        (RESULTS / "aot.md").write_text(tabulate(RESULTS))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
