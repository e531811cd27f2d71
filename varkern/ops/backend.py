"""The choice of an op's implementation: plain PyTorch, or the Triton kernels.

``auto`` (the default) uses Triton for tensors on a GPU and PyTorch for tensors on a CPU. With ``TRITON_INTERPRET=1`` in
the environment it uses Triton's interpreter for CPU tensors, so that tests run the kernels on a machine with no GPU.
Without Triton (macOS, Windows), or with a Triton older than 3.6 (PyTorch before 2.10), it uses PyTorch everywhere.
"""

from __future__ import annotations

import contextvars
import functools
import os
import re
import warnings

import torch

from varkern.literals import Backend, check_word

OLDEST_TRITON = (3, 6)

_chosen: contextvars.ContextVar[Backend] = contextvars.ContextVar("varkern_backend", default="auto")


class NoKernelsError(ImportError):
    """The backend ``"triton"`` was chosen, but Triton is missing or too old for the kernels."""


@functools.cache
def triton_trouble() -> str | None:
    """Why this process cannot run the kernels on any device; None if it can.

    The first call imports Triton, so it happens only when a kernel would run.
    """
    needed = ".".join(map(str, OLDEST_TRITON))
    try:
        import triton
    except Exception as error:  # a Triton that does not fit the driver or PyTorch can raise anything
        return f"the kernels need Triton {needed} or newer, but importing it failed: {type(error).__name__}: {error}"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TRITON:
        return f"the kernels need Triton {needed} or newer, got {triton.__version__}"
    return None


@functools.cache
def _warn(trouble: str) -> None:
    """Warn once per process."""
    warnings.warn(f"{trouble}; the ops run in plain PyTorch, which gives the same results", stacklevel=3)


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
        NoKernelsError: if ``name`` is ``"triton"`` and Triton is missing or older than 3.6; an ``ImportError``.

    Example::

        >>> with varkern.use_backend("torch"):
        ...     images = varkern.generate(var, labels, seeds=0).images
    """

    def __init__(self, name: Backend):
        check_word("backend", name, Backend)
        if name == "triton" and triton_trouble():
            raise NoKernelsError(f"backend 'triton' cannot be used: {triton_trouble()}; use 'auto' or 'torch'")
        self._former = _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        _chosen.set(self._former)


def chosen_backend() -> Backend:
    """The current choice of :class:`use_backend`: ``"auto"``, ``"torch"`` or ``"triton"``."""
    return _chosen.get()


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
    if chosen != "auto":
        return chosen
    if not reachable:
        return "torch"
    if triton_trouble():
        _warn(triton_trouble())
        return "torch"
    return "triton"


def explain(device: torch.device | str) -> str:
    """One line for bug reports: the implementation in use on ``device`` and the reason for it."""
    kind = torch.device(device).type
    chosen = _chosen.get()
    if chosen != "auto":
        return f"{chosen} (chosen with use_backend)"
    if (kind == "cuda" or (kind == "cpu" and interpreting())) and triton_trouble():
        return f"torch ({triton_trouble()})"
    if kind == "cuda":
        return "triton (tensors on a GPU)"
    if kind == "cpu" and interpreting():
        return "triton (TRITON_INTERPRET is set: kernels run in the interpreter)"
    return f"torch (tensors on {kind})"
