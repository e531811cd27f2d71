"""A Triton driver in place of a GPU: launches on CPU tensors are compiled for a CUDA target and run in the emulator.

Before a launch Triton does everything that it does for a GPU: it specialises by value and alignment, compiles to PTX
and packs the arguments. TRITON_INTERPRET must be unset when kernels are defined.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver

from . import machine, memory, ptx

LARGEST_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")  # of a launch, on any target

launched: dict[str, machine.Totals] = {}  # by the hash of what was compiled: what was launched so far
listeners: list[Callable[[machine.Totals], None]] = []  # called after every launch, whether it raises or not


def flatten(value, kind) -> Iterator[tuple]:
    """(value, type) of every argument that is a parameter of the PTX: tuples opened, constants left out."""
    if isinstance(kind, tuple | list):
        for inner, inner_kind in zip(value, kind, strict=True):
            yield from flatten(inner, inner_kind)
    elif kind != "constexpr":
        yield value, kind


class Launcher:
    """Runs one compiled kernel in the emulator, and records how it was compiled and launched."""

    def __init__(self, src, metadata):
        self.kinds = [src.signature[name] for name in src.fn.arg_names]
        names = src.fn.arg_names
        constants = {names[path[0]]: value for path, value in src.constants.items() if len(path) == 1}
        self.totals = launched.setdefault(metadata.hash, machine.Totals(None, name=src.fn.__name__))
        self.totals.source, self.totals.constants, self.totals.shared = src, constants, metadata.shared
        self.totals.signature = {name: kind for name, kind in src.signature.items() if name not in constants}
        self.totals.options = {name: getattr(metadata, name, None) for name in OPTIONS}

    def __call__(self, x, y, z, stream, text, packed, launch_metadata, enter, leave, *arguments):
        totals = self.totals
        totals.ptx = text
        totals.grids[x, y, z] += 1
        try:
            if machine.SETTINGS.run:
                totals.kernel = totals.kernel or ptx.translate(text, threads=32 * totals.options["num_warps"])
                machine.launch(totals.kernel, (x, y, z), list(flatten(arguments, self.kinds)), totals.shared, totals)
        finally:
            for listener in listeners:
                listener(totals)


class Driver:
    """Triton's driver for a target of which this machine has none. What it loads as machine code is PTX."""

    launcher_cls = Launcher

    def __init__(self, target: GPUTarget):
        self.target, self.utils = target, self

    def load_binary(self, name, kernel, shared, device):
        module, function, registers, spills, most_threads = object(), kernel.decode(), 0, 0, 1024
        return module, function, registers, spills, most_threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        known = {"max_shared_mem": LARGEST_SHARED.get(self.target.arch, 99 * 1024), "max_num_regs": 65536}
        return {**known, "warpSize": 32, "multiprocessor_count": 132}

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, kind):
        return kind

    @staticmethod
    def is_active():
        return True


def stop_at_assembly(backend=None, stages=None, *rest) -> tuple[str, str]:
    """Triton's hook on the stages of a compilation: the last one, machine code, only passes its text on.

    Without arguments it is asked for a key, to tell apart what lies in Triton's cache.
    """
    if stages:
        stages[list(stages)[-1]] = lambda text, metadata: text.encode()
    return "stop_at_assembly", "stop_at_assembly"


def set_cache(folder: str) -> None:
    """Choose Triton's cache for this process alone: what has no machine code must not lie where others look for it."""
    propagate, knobs.propagate_env = knobs.propagate_env, False
    knobs.cache.dir = folder
    knobs.propagate_env = propagate


@contextlib.contextmanager
def machine_code() -> Iterator[None]:
    """Inside this block ``triton.compile`` goes on to machine code, as it does without the emulator."""
    hook, folder = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
    if hook is None:
        yield
        return
    knobs.runtime.add_stages_inspection_hook = None
    set_cache(os.path.dirname(folder))
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook
        set_cache(folder)


def set_target(target: GPUTarget) -> None:
    """Make Triton specialise and compile for ``target``, whatever this machine has, and no further than to assembly.

    Raises:
        RuntimeError: if kernels would be interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be unset before kernels are imported")
    triton_driver.set_active(Driver(target))
    if knobs.runtime.add_stages_inspection_hook is not stop_at_assembly:
        knobs.runtime.add_stages_inspection_hook = stop_at_assembly
        set_cache(os.path.join(knobs.cache.dir, "emulated"))


def install(arch: int, run: bool = True) -> None:
    """Send Triton's launches on CPU tensors to the emulator, compiled for ``sm_<arch>``.

    Args:
        arch: 80, 90 and 120 are known to work.
        run: False compiles and records launches only; what they would write stays as it was.
    """
    set_target(GPUTarget("cuda", arch, 32))
    machine.SETTINGS.run = run


def poison_new_memory() -> None:
    """Fill what ``torch.empty`` and its relatives return with NaN, and see kernels' reads of it before any write."""
    if getattr(torch.empty, "poisoned", False):
        return

    def poisoned(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return memory.mark_fresh(out) if type(out) is torch.Tensor and out.device.type == "cpu" else out

        made.poisoned = True
        return made

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
