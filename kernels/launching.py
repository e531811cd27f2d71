"""How every kernel is launched: on the GPU of its tensors, whichever GPU is the current one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` with the first tensor's GPU as the current device.

    Triton launches on the current device and in its current stream; with tensors of another GPU, as in a process of
    ``torchrun`` that did not call ``torch.cuda.set_device``, the kernel would run where its memory is not.

    A kernel with an argument ``INTERPRETED`` is told whether Triton's interpreter runs it, which rounds differently.

    Multiplications and additions are fused only where a kernel says so with ``tl.fma`` or its launch with
    ``enable_fp_fusion=True``. Which ones the compiler would fuse depends on the layout: equal samples were no longer at
    distance 0, and threads that hold the same sum disagreed about its last bit.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if "INTERPRETED" in kernel.arg_names:
        options["INTERPRETED"] = triton.knobs.runtime.interpret
    options.setdefault("enable_fp_fusion", False)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
