"""A pytest plugin (``-p bench.blame``) that adds the kernel whose launch failed to the report of a failed test.

It adds the line ``failed kernel: NAME`` as a section of the failure, where ``bench/gpu.sh`` finds it. A kernel that
fails while it runs is not found, because its error is raised by a later synchronization; use compute-sanitizer.
"""

from __future__ import annotations

from types import TracebackType

import pytest

LAUNCHER = ("varkern.kernels.launching", "launch")


def find_kernel(traceback: TracebackType | None) -> str | None:
    """The kernel whose compilation or launch raised; None if the error has another origin."""
    name = None
    while traceback is not None:
        frame = traceback.tb_frame
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == LAUNCHER:
            name = frame.f_locals["kernel"].__name__
        traceback = traceback.tb_next
    return name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    name = find_kernel(call.excinfo.tb) if call.excinfo is not None else None
    if name is not None:
        outcome.get_result().sections.append(("kernel", f"failed kernel: {name}"))
