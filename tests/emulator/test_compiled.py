"""Runs the emulator's tests in a separate process, because without ``--compiled`` the interpreter runs all kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulator

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    emulator.find_compiler() is None, reason="the emulator needs a C compiler, and this machine has none"
)
def test_the_emulators_own_tests_pass_compiled(request):
    if request.config.getoption("--compiled"):
        pytest.skip("they run in this process")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST"))
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--compiled", "sm_80"]
    run = subprocess.run(
        [*command, "tests/emulator/test_kernels.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def test_without_a_compiler_one_sentence_says_what_to_install(pytestconfig, monkeypatch):
    from tests.emulator.plugin import CompiledKernels

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "")
    with pytest.raises(pytest.UsageError, match="--compiled needs a C compiler: install gcc"):
        CompiledKernels(pytestconfig)


def test_only_cases_of_the_pytorch_form_are_left_out():
    from tests.emulator.plugin import runs_plain

    plain = [{"backend": "torch"}, {"form": "torch", "side": 3}]
    assert all(map(runs_plain, plain))
    others = [{}, {"backend": "triton"}, {"form": "registered"}, {"form": "triton"}, {"dtype": "torch"}]
    assert not any(map(runs_plain, others))
