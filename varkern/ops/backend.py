"""The choice of an op's implementation: plain PyTorch, or the Triton kernels.

``auto`` (the default) uses Triton for tensors on a GPU and PyTorch for tensors on a CPU. With ``TRITON_INTERPRET=1`` in
the environment it uses Triton's interpreter for CPU tensors, so that tests run the kernels on a machine with no GPU.
Where Triton is not installed, as on macOS and Windows, it uses PyTorch for all tensors.
"""

from __future__ import annotations

import contextvars
import functools
import os

import torch

from varkern.literals import Backend, check_word

_chosen: contextvars.ContextVar[Backend] = contextvars.ContextVar("varkern_backend", default="auto")


class use_backend:
    """Choose the implementation of every op: ``"torch"``, ``"triton"`` or ``"auto"``.

    A call as a function changes the choice from then on. As a context manager it changes the choice inside the block
    and restores the former choice after it::

        varkern.use_backend("torch")
        with varkern.use_backend("triton"):
            ...

    The choice is a context variable, so it does not affect other threads.

    Raises:
        ValueError: if ``name`` is not one of the three.
        ImportError: if ``name`` is ``"triton"`` and Triton is not installed.

    Example::

        >>> with varkern.use_backend("torch"):
        ...     images = varkern.generate(var, labels, seeds=0).images
    """

    def __init__(self, name: Backend):
        check_word("backend", name, Backend)
        if name == "triton" and not has_triton():
            raise ImportError(
                "backend 'triton' needs the package triton, which is not installed (pip install triton, on Linux): use "
                "'auto' or 'torch'"
            )
        self._former = _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        _chosen.set(self._former)


def chosen_backend() -> Backend:
    """The current choice of :class:`use_backend`: ``"auto"``, ``"torch"`` or ``"triton"``."""
    return _chosen.get()


@functools.cache
def has_triton() -> bool:
    """True if the package triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def interpreting() -> bool:
    """True if Triton runs kernels in its interpreter on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def takes_cpu_tensors() -> bool:
    """True if kernels can run on CPU tensors in this process. Tests that emulate a GPU replace this function."""
    return interpreting()


def backend_for(tensor: torch.Tensor) -> str:
    """The implementation for an op whose main input is ``tensor``: ``"torch"`` or ``"triton"``.

    Raises:
        RuntimeError: if the chosen backend is Triton and it cannot run on the tensor's device.
    """
    chosen = _chosen.get()
    reachable = tensor.is_cuda or (tensor.device.type == "cpu" and takes_cpu_tensors())
    if chosen == "triton" and not reachable:
        raise RuntimeError(
            f"backend 'triton' needs a tensor on a GPU, got one on {tensor.device}; "
            "set TRITON_INTERPRET=1 to run the kernels on the CPU (slowly, for tests)"
        )
    if chosen == "auto":
        return "triton" if reachable and has_triton() else "torch"
    return chosen


def explain(device: torch.device | str) -> str:
    """One line for bug reports: the implementation in use on ``device`` and the reason for it."""
    kind = torch.device(device).type
    chosen = _chosen.get()
    if chosen != "auto":
        return f"{chosen} (chosen with use_backend)"
    reachable = kind == "cuda" or (kind == "cpu" and interpreting())
    if reachable and not has_triton():
        return "torch (Triton is not installed)"
    if kind == "cuda":
        return "triton (tensors on a GPU)"
    if kind == "cpu" and interpreting():
        return "triton (TRITON_INTERPRET is set: kernels run in the interpreter)"
    return f"torch (tensors on {kind})"
