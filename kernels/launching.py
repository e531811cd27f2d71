"""The function that launches every kernel, always on the GPU that holds the kernel's tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run ``kernel[grid](*arguments, **options)`` with the first tensor's GPU as the current device.

    Triton launches on the current device and in its current stream. Tensors can be on another GPU, for instance in a
    process of ``torchrun`` that did not call ``torch.cuda.set_device``; the kernel could then not reach their memory.

    A kernel with an argument ``INTERPRETED`` gets True if Triton's interpreter runs it, which rounds differently.

    The compiler may fuse a multiplication with an addition only where the kernel calls ``tl.fma`` or the launch passes
    ``enable_fp_fusion=True``. Otherwise its choice would depend on the tensor layout: equal samples were then not at
    distance 0, and threads with the same sum disagreed about its last bit.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if "INTERPRETED" in kernel.arg_names:
        options["INTERPRETED"] = triton.knobs.runtime.interpret
    options.setdefault("enable_fp_fusion", False)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
