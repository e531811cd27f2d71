"""An emulated GPU, which runs the PTX that Triton compiles on the CPU and checks every access to memory.

``pytest --compiled sm_90`` runs every test of a kernel this way. In a script::

    from tests import emulator

    emulator.install(90)            # before a kernel is imported; TRITON_INTERPRET must be unset
    kernel[grid](*cpu_tensors)      # compiles to PTX for sm_90 and runs; a fault raises EmulationError
    for totals in emulator.launched.values():     # one for each compiled kernel
        print(totals.name, totals.grids, emulator.summarise(totals))

``install(90, run=False)`` compiles and records launches without running them. ``totals.source``, ``signature``,
``constants``, ``options``, ``grids`` and ``ptx`` then describe the launches. ``set_target`` does the same for any
target of Triton. Compilation stops at assembly and has a separate cache, except inside ``with machine_code():``.

**Found and raised** as :class:`EmulationError`: accesses outside the views given as arguments, misaligned accesses,
races between warps in shared memory and between CTAs or warps in global memory, reads of shared memory that nothing
wrote, use of a ``cp.async`` target before its wait, lanes of a warp that store different values to one address,
instructions of a whole warp while its lanes are apart, deadlocks, integer division by zero.

**Counted**, for each instruction: executions, 32-byte sectors of global memory, wavefronts of shared memory.

**Not found**: effects of ptxas (registers, spills, further fusing of multiplications and additions), time, and memory
orders weaker than the program's. An unknown instruction raises ``UnsupportedPTX`` with its name. Add lane-wise
instructions to ``lanewise.py``, others to ``ptx.py`` and the C files.

How it works: ``ptx.py`` reads PTX into a table of instructions; ``lanewise.py`` has the lane-wise ones as C
expressions; ``c/`` runs them, one CTA at a time and a warp's 32 lanes together; ``machine.py`` builds the C part and
runs a launch; ``memory.py`` lays out its tensors; ``driver.py`` replaces Triton's GPU driver. float32 ``add``, ``mul``
and ``fma`` round as IEEE; the matrix units sum exactly and round once; approximate instructions give the exact value
rounded, or moved by up to ``SETTINGS.ulp``. A ``cp.async`` copies when it is waited for, the latest moment allowed.
"""

from .driver import install, launched, listeners, machine_code, poison_new_memory, set_target
from .machine import SETTINGS, EmulationError, Totals, find_compiler, launch, summarise
from .ptx import UnsupportedPTX, translate
from .report import list_accesses, make_table

__all__ = [
    "SETTINGS",
    "EmulationError",
    "Totals",
    "UnsupportedPTX",
    "find_compiler",
    "install",
    "launch",
    "launched",
    "list_accesses",
    "listeners",
    "machine_code",
    "make_table",
    "poison_new_memory",
    "set_target",
    "summarise",
    "translate",
]
