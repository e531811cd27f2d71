"""Runs a translated kernel over its grid: builds the C part, lays out memory, and reports faults and counts."""

from __future__ import annotations

import collections
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import lanewise, ptx
from .memory import Memory

# In the order of the EV_ constants in c/state.h.
EVENTS = [
    None, "global load out of bounds", "global store out of bounds", "misaligned global access",
    "shared access out of bounds", "misaligned shared access", "read of shared memory never written",
    "shared race: read after write", "shared race: write after read", "shared race: write after write",
    "shared memory between lanes of a warp without bar.warp.sync", "read or write of a cp.async in flight",
    "lanes store different values to one address", "global race between CTAs", "global race between warps",
    "warp-synchronous instruction while diverged", "deadlock or trap", "division by zero",
    "barrier after some warps exited", "shfl from an inactive lane", "too many instructions",
    "global memory between lanes of a warp without a barrier", "read of global memory never written",
    "warps store the same value to one shared address", "warps or CTAs store the same value to one global address",
]  # fmt: skip
# Correct code does these too: they are listed in the report and raise nothing.
REMARKS = {
    "shared memory between lanes of a warp without bar.warp.sync",
    "barrier after some warps exited",
    "read of global memory never written",
    "warps store the same value to one shared address",
    "warps or CTAs store the same value to one global address",
}
# None stands for what lanewise.c_source() writes.
C_FILES = ("state.h", "numbers.h", "global.h", "shared.h", "access.h", "lanes.h", "matrix.h", None, "control.h")
COMPILER_FLAGS = (
    "-O2 -ftree-vectorize -march=native -ffp-contract=off -fno-strict-aliasing -fno-math-errno -fPIC -shared -w"
)


class EmulationError(Exception):
    """Something that on a GPU would be undefined behaviour or a crash."""


@dataclass
class Settings:
    """How launches run.

    Args:
        seed: decides the order of CTAs and, between barriers, of warps.
        ulp: approximate instructions (ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.full) are moved by up to so many
            units in the last place, as a function of their operand, where their result is inexact.
        mma_truncates: the matrix units round their sums towards zero instead of to the nearest.
        max_steps: instructions of a warp after which a launch counts as endless.
        run: False records launches and runs none.
    """

    seed: int = 1
    ulp: int = 0
    mma_truncates: bool = False
    max_steps: int = 20_000_000_000
    run: bool = True


SETTINGS = Settings()


class _Context(ctypes.Structure):
    """``struct Ctx`` of c/state.h."""

    P, N, U, L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
    _fields_ = [
        ("prog", P), ("nprog", N), ("pool", P), ("nwarps", N), ("nthreads", N), ("grid", U * 3), ("seg", P),
        ("nseg", N), ("param", P), ("nparam", N), ("smem", P), ("shw", P), ("shr", P), ("shsize", U),
        ("check_global", N), ("ulp", N), ("truncate", N), ("rng", L),
        ("count", P), ("threads", P), ("sectors", P), ("bytes", P), ("waves", P), ("ev", P), ("nev", N), ("capev", N),
        ("cta", N), ("epoch", U), ("w", P), ("ctaid", U * 3), ("nslots", N), ("nconst", N), ("consts", P),
        ("steps", L), ("maxsteps", L), ("stop", N), ("lastseg", N), ("approx_seed", U),
    ]  # fmt: skip


EVENT = np.dtype([("type", np.int32), ("pc", np.int32), ("count", np.int32), ("cta", np.int32), ("warp", np.int32),
                  ("lane", np.int32), ("addr", np.uint64), ("extra", np.int64)])  # fmt: skip
COUNTERS = ("count", "threads", "sectors", "bytes", "waves")


def find_compiler() -> str | None:
    """The C compiler that builds the emulator; None if this machine has none."""
    return shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("cc")


def build_library() -> ctypes.CDLL:
    """The C part, built once for each version of its source, in the folder for temporary files."""
    folder = Path(__file__).parent / "c"
    source = "\n".join(lanewise.c_source() if name is None else (folder / name).read_text() for name in C_FILES)
    builds = Path(tempfile.gettempdir()) / f"varkern-emulator-{os.getuid()}"
    builds.mkdir(parents=True, exist_ok=True)
    path = builds / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=builds) as scratch:
            c_file, library_file = Path(scratch) / "emulator.c", Path(scratch) / "emulator.so"
            c_file.write_text(source)
            command = [find_compiler(), *COMPILER_FLAGS.split(), "-o", str(library_file), str(c_file), "-lm"]
            subprocess.run(command, check=True)
            os.replace(library_file, path)
    library = ctypes.CDLL(str(path))
    library.sizeof_ctx.restype = ctypes.c_uint64
    assert library.sizeof_ctx() == ctypes.sizeof(_Context), "the fields of _Context are not those of struct Ctx"
    return library


_library: ctypes.CDLL | None = None


@dataclass
class Totals:
    """How one kernel was compiled, and what all its launches came to.

    Of the compilation: ``source`` is Triton's description of it (``triton.compile(source, target=..., options=...)``
    does it again for another target); ``signature`` has the types of the arguments that are no constants, ``constants``
    the values of the others, ``options`` the number of warps and the like; ``shared``: bytes of shared memory of a CTA.

    Of the launches: ``grids`` counts them by grid. ``counters`` has an entry per instruction: times a warp executed it,
    threads that did, 32-byte sectors of global memory, bytes wanted, wavefronts of shared memory. ``events``: (what,
    instruction) -> [times, first example].
    """

    kernel: ptx.Kernel | None
    name: str = ""
    source: object = None
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    shared: int = 0
    ptx: str = ""
    grids: collections.Counter = field(default_factory=collections.Counter)
    launches: int = 0
    ctas: int = 0
    counters: dict[str, np.ndarray] = field(default_factory=dict)
    events: dict = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0

    def reset(self) -> None:
        """Forget the launches so far."""
        self.launches = self.ctas = self.bytes_read = self.bytes_written = 0
        self.counters, self.events = {}, {}
        self.grids.clear()


def parameter_bytes(kernel: ptx.Kernel, arguments, memory: Memory) -> np.ndarray:
    """The kernel's parameters as they lie in memory; parameters without an argument are null."""
    params = np.zeros(max(8, kernel.param_bytes), np.uint8)
    for (value, kind), (name, size, offset) in zip(arguments, kernel.params, strict=False):
        if isinstance(value, torch.Tensor):
            raw = np.array([memory.addresses[id(value)]], np.uint64)
        elif kind in ("fp32", "f32"):
            raw = np.array([value], np.float32)
        elif kind in ("fp64", "f64"):
            raw = np.array([value], np.float64)
        elif kind in ("i1", "u1"):
            raw = np.array([int(bool(value))], np.uint8)
        else:
            bits = int(kind[1:])
            raw = np.array([int(value) & ((1 << bits) - 1)], np.uint64).view(np.uint8)[: bits // 8]
        raw = raw.view(np.uint8)
        if len(raw) != size:
            raise ptx.UnsupportedPTX(f"parameter {name}: {size} bytes for {kind}")
        params[offset : offset + size] = raw
    return params


def launch(kernel: ptx.Kernel, grid, arguments, shared: int, totals: Totals) -> None:
    """Run a kernel.

    Args:
        kernel: what :func:`ptx.translate` made.
        grid: CTAs along x, y, z.
        arguments: (tensor or number, Triton's type) for each parameter of the PTX, in order.
        shared: bytes of shared memory.
        totals: where counts and events are added.

    Raises:
        EmulationError: for every event that is no remark.
    """
    global _library
    _library = _library or build_library()
    memory = Memory([value for value, _ in arguments if isinstance(value, torch.Tensor)])
    params = parameter_bytes(kernel, arguments, memory)
    counters = {name: np.zeros(len(kernel.program), np.uint64) for name in COUNTERS}
    events = np.zeros(256 + 4 * len(kernel.program), EVENT)
    size = max(16, shared)
    smem, shw, shr = np.zeros(size, np.uint8), np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    grid = tuple(int(g) for g in grid) + (1,) * (3 - len(grid))
    ctas = grid[0] * grid[1] * grid[2]

    c = _Context()
    c.prog, c.nprog, c.pool = kernel.program.ctypes.data, len(kernel.program), kernel.pool.ctypes.data
    c.nthreads, c.nwarps = kernel.threads, -(-kernel.threads // 32)
    c.grid[:] = grid
    c.seg, c.nseg, c.check_global = memory.segments.ctypes.data, len(memory.segments), int(memory.checked)
    c.param, c.nparam = params.ctypes.data, len(params)
    c.smem, c.shw, c.shr, c.shsize = smem.ctypes.data, shw.ctypes.data, shr.ctypes.data, shared
    c.ulp, c.truncate = SETTINGS.ulp, int(SETTINGS.mma_truncates)
    c.rng, c.approx_seed = (SETTINGS.seed * 0x9E3779B97F4A7C15 | 1) & (2**64 - 1), SETTINGS.seed & 0xFFFFFFFF
    for name, values in counters.items():
        setattr(c, name, values.ctypes.data)
    c.ev, c.capev = events.ctypes.data, len(events)
    c.nslots, c.nconst, c.consts = kernel.slots, len(kernel.consts), kernel.consts.ctypes.data
    c.maxsteps = SETTINGS.max_steps
    if ctas:
        _library.run(ctypes.byref(c))

    totals.launches += 1
    totals.ctas += ctas
    for name, values in counters.items():
        totals.counters[name] = totals.counters.get(name, 0) + values
    read, written = memory.footprint()
    totals.bytes_read += read
    totals.bytes_written += written
    faults = note_events(kernel, events[: c.nev], memory, totals)
    if faults:
        raise EmulationError("\n".join(faults[:8]))


def note_events(kernel: ptx.Kernel, events: np.ndarray, memory: Memory, totals: Totals) -> list[str]:
    """Add a launch's events to ``totals``; the sentences of those that are no remarks."""
    faults = []
    for e in events:
        what = EVENTS[e["type"]]
        line, place = kernel.lines[e["pc"]]
        where = memory.describe(e["addr"]) if "global" in what else f"address {int(e['addr'])}"
        example = (
            f"{kernel.name}: {what}: {kernel.text[e['pc']]!r} (PTX line {line}; {place}), {e['count']} times, "
            f"first in CTA {e['cta']} warp {e['warp']} lane {e['lane']}, {where}"
        )
        entry = totals.events.setdefault((what, int(e["pc"])), [0, example])
        entry[0] += int(e["count"])
        if what not in REMARKS:
            faults.append(example)
    return faults


def summarise(totals: Totals) -> dict[str, int]:
    """Counts over all launches: instructions of warps, barriers, accesses, sectors and bytes moved, wavefronts."""
    out = collections.Counter()
    for k, text in enumerate(totals.kernel.text if totals.counters else ()):
        times = int(totals.counters["count"][k])
        if not times:
            continue
        words = text.split()
        opcode = words[1] if words[0].startswith("@") else words[0]
        out["instructions"] += times
        if opcode.startswith(("ld.global", "cp.async.c", "st.global")):
            kind = "store" if opcode.startswith("st") else "load"
            out[f"{kind}s"] += times
            out[f"{kind}_sectors"] += int(totals.counters["sectors"][k])
            out[f"{kind}_bytes"] += int(totals.counters["bytes"][k])
        elif opcode.startswith(("ld.shared", "st.shared", "ldmatrix", "stmatrix")):
            out["shared"] += times
            out["wavefronts"] += int(totals.counters["waves"][k])
        elif opcode.startswith(("bar.sync", "barrier")):
            out["barriers"] += times
    return {**out, "bytes_read": totals.bytes_read, "bytes_written": totals.bytes_written}
