"""``pytest --compiled sm_90`` runs kernels that tests launch on the CPU as compiled code in the emulator."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

from . import driver, machine, report


def runs_plain(params: dict) -> bool:
    """Whether a case is of the PyTorch form, which launches no kernel."""
    return "torch" in (params.get("backend"), params.get("form"))


class CompiledKernels:
    """The plugin of a run with ``--compiled``: from its start on, kernels compile and CPU tensors go to them."""

    def __init__(self, config: pytest.Config):
        if machine.find_compiler() is None:
            raise pytest.UsageError("--compiled needs a C compiler: install gcc")
        self.target = config.getoption("--compiled")
        self.rows: list[dict] = []  # of other processes, where pytest-xdist spreads the tests
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there stays out of it
        os.environ.pop("TRITON_INTERPRET", None)
        driver.install(int(self.target.removeprefix("sm_")))
        driver.poison_new_memory()
        machine.SETTINGS.ulp, machine.SETTINGS.seed = config.getoption("--ulp"), config.getoption("--order")
        kernels = importlib.import_module("varkern.kernels")
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"varkern.kernels.{module.name}")
        importlib.import_module("varkern.ops.backend").takes_cpu_tensors = lambda: True

    def pytest_collection_modifyitems(self, config, items):
        """Leave out what runs the same without ``--compiled``."""
        plain = [item for item in items if getattr(item, "callspec", None) and runs_plain(item.callspec.params)]
        items[:] = [item for item in items if item not in set(plain)]
        config.hook.pytest_deselected(items=plain)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["compiled"] = report.make_rows(driver.launched.values())

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.rows += getattr(node, "workeroutput", {}).get("compiled", [])

    def pytest_terminal_summary(self, terminalreporter):
        rows = self.rows + report.make_rows(driver.launched.values())
        if rows:
            terminalreporter.section(f"kernels compiled for {self.target}, emulated")
            terminalreporter.write_line("\n".join(report.make_table(rows)))
