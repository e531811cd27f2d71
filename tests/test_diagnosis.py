"""What `varkern env` says of GPUs that are there and broken: one line with the error's text, never a traceback."""

import sys
import time

import pytest
import torch

from varkern import cli, diagnosis
from varkern.ops.backend import triton_trouble

PROC = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


class Machine:
    """A machine with a driver and a PyTorch of the test's choice."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch, self.folder = monkeypatch, tmp_path
        for name in ("NVIDIA", "AMD"):
            monkeypatch.setattr(diagnosis, name, tmp_path / name)
        monkeypatch.setenv("PATH", str(tmp_path))
        self.pytorch(cuda="13.0", available=False, count=0)

    def driver(self, smi: str | None = None, code: int = 0, proc: str | None = PROC) -> None:
        """The file of a loaded driver, and a program nvidia-smi that prints a text and ends with a code."""
        if proc is not None:
            (self.folder / "NVIDIA").write_text(proc)
        if smi is not None:
            program = self.folder / "nvidia-smi"
            program.write_text(f"#!/bin/sh\nprintf '%s' '{smi}'\nexit {code}\n")
            program.chmod(0o755)

    def pytorch(self, cuda=None, available=None, count=None, init=None) -> None:
        """PyTorch of a build whose functions return these values, or raise them."""
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.version, "hip", None)
        answers = {"is_available": available, "device_count": count, "init": init}
        for name, answer in answers.items():
            self.patch.setattr(torch.cuda, name, self.function(answer))

    @staticmethod
    def function(answer):
        def call(*args):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture
def env(capsys):
    """The lines of ``varkern env`` by name; every value is on one line, and nothing is on stderr."""

    def run(*arguments: str) -> dict[str, str]:
        assert cli.main(["env", *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == "" and "Traceback" not in captured.out
        lines = [line.partition(": ") for line in captured.out.splitlines()]
        assert all(colon for _, colon, _ in lines)
        return {name.strip(): value.strip() for name, _, value in lines}

    return run


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")


class TestDriver:
    def test_none(self, machine, env):
        report = env()
        assert report["cuda"] == "13.0 (PyTorch's), driver none" and report["gpu"] == "none: no driver is found"

    def test_working(self, machine, env):
        machine.driver("550.54.14\n550.54.14\n")
        assert env()["cuda"] == "13.0 (PyTorch's), driver NVIDIA 550.54.14"

    def test_smi_that_fails(self, machine, env):
        machine.driver("NVIDIA-SMI has failed because it could not\ncommunicate with the NVIDIA driver.", 9)
        said = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
        assert env()["cuda"].endswith(
            f"driver NVIDIA 550.54.14, but nvidia-smi fails: RuntimeError: exit code 9: {said}"
        )

    def test_smi_that_cannot_start(self, machine, env):
        machine.driver("")
        (machine.folder / "nvidia-smi").write_text("no program")
        assert "nvidia-smi fails: OSError: " in env()["cuda"]

    def test_no_smi(self, machine, env):
        machine.driver(None)
        assert env()["cuda"].endswith("driver NVIDIA 550.54.14, without nvidia-smi")

    def test_an_unreadable_version(self, machine, env):
        machine.driver(None, proc="other words")
        assert env()["cuda"].endswith("driver NVIDIA of unknown version, without nvidia-smi")

    def test_amd(self, machine, env):
        (machine.folder / "AMD").touch()
        assert env()["cuda"].endswith("driver AMD")


class TestGPU:
    def test_a_build_without_cuda(self, machine, env):
        machine.driver("550.54.14")
        machine.pytorch(cuda=None, available=False)
        wanted = f"a driver is there (NVIDIA 550.54.14), but PyTorch {torch.__version__} is built without CUDA: install"
        assert env()["gpu"].startswith(wanted)

    def test_no_gpu_and_the_reason(self, machine, env):
        machine.driver("550.54.14")
        reason = RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")
        machine.pytorch(cuda="13.0", available=False, count=0, init=reason)
        assert env()["gpu"] == (
            "a driver is there (NVIDIA 550.54.14), but PyTorch finds no GPU: starting CUDA fails: RuntimeError: The "
            "NVIDIA driver on your system is too old (found version 11040)."
        )

    def test_looking_for_gpus_raises(self, machine, env):
        machine.driver("550.54.14")
        machine.pytorch(cuda="13.0", available=RuntimeError("CUDA driver initialization failed"))
        report = env()
        assert report["gpu"] == "torch.cuda.is_available() fails: RuntimeError: CUDA driver initialization failed"
        assert report["device"].startswith("cpu")

    def test_counting_raises(self, machine, env):
        machine.pytorch(cuda="13.0", available=True, count=RuntimeError("no count"))
        assert env("--device", "cpu")["gpu"] == "torch.cuda.device_count() fails: RuntimeError: no count"

    def test_a_kernel_fails(self, machine, env, monkeypatch):
        machine.pytorch(cuda="13.0", available=True, count=2)
        error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
        monkeypatch.setattr(diagnosis, "run_torch", machine.function(error))
        monkeypatch.setattr(diagnosis, "run_triton", machine.function("runs"))
        report = env("--device", "cpu")
        assert report["gpu"] == "2 found"
        wanted = (
            "a kernel of PyTorch fails: RuntimeError: CUDA error: no kernel image is available for execution on the "
            "device Compile with ...; a kernel of Triton runs"
        )
        assert report["cuda:0"] == report["cuda:1"] == wanted

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the errors are those of a machine without a GPU")
    def test_a_device_that_is_not_there(self, machine, env):
        """With nothing faked but the count, the kernels' own errors are told, whatever they are."""
        machine.pytorch(cuda="13.0", available=True, count=1)
        report = env()
        assert report["device"].startswith("fails: ")
        assert report["cuda:0"].startswith("a kernel of PyTorch fails: ")
        assert "; a kernel of Triton fails: " in report["cuda:0"]

    def test_wrong_numbers(self, monkeypatch):
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, **options: 2 * ones(*shape))
        assert diagnosis.run_torch(torch.device("cpu")) == "gives 12 instead of 8"
        monkeypatch.setattr(diagnosis, "uniforms", lambda *args: torch.rand(3))
        assert diagnosis.run_triton(torch.device("cpu")) == "gives other random numbers than PyTorch"

    def test_kernels_that_run(self, device):
        """On the GPU, or through the interpreter."""
        if triton_trouble():
            pytest.skip(triton_trouble())
        assert diagnosis.describe_kernels(device) == "a kernel of PyTorch runs; a kernel of Triton runs"

    def test_a_gpu_that_hangs_is_left_alone(self, machine, env, monkeypatch):
        machine.pytorch(cuda="13.0", available=True, count=2)
        monkeypatch.setattr(diagnosis, "SECONDS", 0.05)
        monkeypatch.setattr(diagnosis, "run_torch", lambda device: time.sleep(1))
        report = env("--device", "cpu")
        assert report["cuda:0"].startswith("a kernel of PyTorch does not answer within") and "cuda:1" not in report


class TestTriton:
    def test_an_import_that_fails(self, monkeypatch):
        error = ImportError("libtriton.so: bad ELF")
        monkeypatch.setattr(diagnosis.importlib, "import_module", Machine.function(error))
        assert diagnosis.describe_triton("3.8.0") == "3.8.0, but its import fails: ImportError: libtriton.so: bad ELF"
        assert diagnosis.describe_triton("not installed") == "not installed"

    def test_one_that_works(self):
        pytest.importorskip("triton")
        assert diagnosis.describe_triton("3.8.0") == "3.8.0"


def test_long_errors_are_cut():
    def fail():
        raise ValueError("word " * 1000)

    text = diagnosis.attempt(fail)
    assert text.startswith("fails: ValueError: word word") and text.endswith(" ...") and len(text) < 350
