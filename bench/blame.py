"""A pytest plugin (``-p bench.blame``): a failed test or benchmark says which kernel's launch failed.

The line ``failed kernel: NAME`` goes among the sections of the failure, where ``bench/gpu.sh`` finds it. A kernel that
fails while it runs shows at a later wait, at which no launch is under way: compute-sanitizer names those.
"""

from __future__ import annotations

from types import TracebackType

import pytest

LAUNCHER = ("varkern.kernels.launching", "launch")


def find_kernel(traceback: TracebackType | None) -> str | None:
    """The kernel whose compilation or launch raised; None: another line did."""
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
