"""``pytest --compiled sm_90``: tests that launch kernels on the CPU run them as compiled code in the emulator."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

from . import driver, machine, report

TARGETS = ("sm_80", "sm_90", "sm_120")


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("compiled", "kernels as compiled code on an emulated GPU")
    group.addoption("--compiled", choices=TARGETS, help="GPU target that kernels are compiled for; the CPU emulates it")
    group.addoption("--ulp", type=int, default=0, help="error of approximate instructions, in units in the last place")
    group.addoption("--order", type=int, default=1, help="seed of the order in which blocks and warps run")


def start(config: pytest.Config) -> None:
    """Install the emulator before any kernel is imported, and take CPU tensors to it."""
    if machine.find_compiler() is None:
        raise pytest.UsageError("--compiled needs a C compiler: install gcc")
    os.environ.pop("TRITON_INTERPRET", None)
    driver.install(int(config.getoption("--compiled").removeprefix("sm_")))
    driver.poison_new_memory()
    machine.SETTINGS.ulp, machine.SETTINGS.seed = config.getoption("--ulp"), config.getoption("--order")
    kernels = importlib.import_module("varkern.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"varkern.kernels.{module.name}")
    importlib.import_module("varkern.ops.backend").interpreting = lambda: True


def summarise(terminalreporter) -> None:
    if driver.launched:
        lines = report.make_table(list(driver.launched.values()))
        terminalreporter.write_line("\n".join(["", "Kernels that ran as compiled code, emulated:", *lines]))
