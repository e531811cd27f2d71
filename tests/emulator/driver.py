"""Stands in for a GPU under Triton: launches on CPU tensors compile for a CUDA target and go to the emulator.

Triton itself does all it does before a launch: it specialises by value and alignment, compiles to PTX, and packs the
arguments. Kernels must have been defined while TRITON_INTERPRET was unset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

from . import machine, memory, ptx

LARGEST_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

launched: dict[str, machine.Totals] = {}  # by the PTX's hash: what ran so far
listeners: list[Callable[[machine.Totals], None]] = []  # called after every launch, whether it raises or not


class Utils:
    """What Triton asks of a loaded binary: nothing is loaded, so every answer is a constant."""

    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        arch = triton_driver.active.target.arch
        known = {"max_shared_mem": LARGEST_SHARED.get(arch, 99 * 1024), "max_num_regs": 65536, "warpSize": 32}
        return {**known, "multiprocessor_count": 132, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}


def flatten(value, kind):
    """(value, type) of every argument that is a parameter of the PTX: tuples opened, constants left out."""
    if isinstance(kind, tuple | list):
        for inner, inner_kind in zip(value, kind, strict=True):
            yield from flatten(inner, inner_kind)
    elif kind != "constexpr":
        yield value, kind


class Launcher:
    """Runs one compiled kernel in the emulator."""

    def __init__(self, src, metadata):
        self.src, self.metadata, self.totals = src, metadata, None

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        if self.totals is None:
            text = self.src.emulated_ptx
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in launched:
                launched[key] = machine.Totals(ptx.translate(text))
            self.totals = launched[key]
            self.totals.kernel.threads = self.totals.kernel.threads or 32 * self.metadata.num_warps
            names = self.src.fn.arg_names
            self.totals.constants = {names[path[0]]: v for path, v in self.src.constants.items() if len(path) == 1}
        given = list(flatten(arguments, [self.src.signature[name] for name in self.src.fn.arg_names]))
        try:
            machine.launch(self.totals.kernel, (x, y, z), given, self.metadata.shared, self.totals)
        finally:
            for listener in listeners:
                listener(self.totals)


class Driver:
    """Triton's driver for a target of which this machine has none."""

    launcher_cls = Launcher

    def __init__(self, target: GPUTarget):
        self.target, self.utils = target, Utils()

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


def set_target(target: GPUTarget) -> None:
    """Make Triton specialise and compile for ``target``, whatever this machine has."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be unset before kernels are imported")
    triton_driver.set_active(Driver(target))


def install(arch: int) -> None:
    """Send Triton's launches to the emulator, compiled for ``sm_<arch>`` (80, 90 and 120 are known to work)."""
    set_target(GPUTarget("cuda", arch, 32))
    if getattr(CompiledKernel, "emulated", False):
        return
    CompiledKernel.emulated = True
    add_stages, make = CUDABackend.add_stages, CompiledKernel.__init__

    def add_stages_up_to_ptx(self, stages, *args):
        result = add_stages(self, stages, *args)
        stages["cubin"] = lambda source, metadata: b"not assembled"
        return result

    def make_with_ptx(self, src, *args, **kwargs):
        make(self, src, *args, **kwargs)
        src.emulated_ptx = self.asm["ptx"]

    CUDABackend.add_stages, CompiledKernel.__init__ = add_stages_up_to_ptx, make_with_ptx


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
