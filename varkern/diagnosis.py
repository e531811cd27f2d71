"""What a bug report needs to know of a GPU, above all of one that is there and does not work: a line per finding.

Nothing here raises: an error becomes a part of the line, with its text.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from varkern.ops import use_backend
from varkern.ops.philox import uniforms

NVIDIA, AMD = Path("/proc/driver/nvidia/version"), Path("/dev/kfd")  # files that a loaded driver makes on Linux
SECONDS = 60.0  # a broken GPU may also hang
LONGEST = 300  # characters of an error's text
HUNG = "does not answer"


def attempt(work: Callable[[], str], seconds: float | None = None) -> str:
    """The answer of ``work``; or ``fails: ...`` with its error; or, after ``seconds``, that it does not answer."""
    answers: list[str] = []

    def run() -> None:
        try:
            answers.append(work())
        except Exception as error:
            answers.append(f"fails: {type(error).__name__}: {one_line(str(error))}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS if seconds is None else seconds)
    return answers[0] if answers else f"{HUNG} within {SECONDS if seconds is None else seconds:.0f} s"


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def describe_driver() -> str | None:
    """The GPU driver of this machine, and whether nvidia-smi can talk to it; None: no driver is found."""
    loaded = attempt(lambda: NVIDIA.read_text(encoding="utf-8", errors="replace")) if NVIDIA.exists() else ""
    match = re.search(r"Kernel Module\D*([\d.]+)", loaded)
    version = match[1] if match else None
    program = shutil.which("nvidia-smi")
    if program is None:
        if NVIDIA.exists():
            return f"NVIDIA {version or 'of unknown version'}, without nvidia-smi"
        return "AMD" if AMD.exists() else None
    answer = attempt(lambda: ask(program))
    if re.fullmatch(r"[\d.]+", answer):
        return f"NVIDIA {answer}"
    return f"NVIDIA {version or 'of unknown version'}, but nvidia-smi {answer}"


def ask(program: str) -> str:
    """The version of the driver, from nvidia-smi; its own words if it has none."""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(said)}")
    return said[0].strip() if said else "says nothing"


def describe_triton(version: str) -> str:
    """The installed version of Triton, and the error if it cannot be imported."""
    if version == "not installed":
        return version
    found = attempt(lambda: importlib.import_module("triton").__name__)
    return version if found == "triton" else f"{version}, but its import {found}"


def describe_gpus(driver: str | None) -> dict[str, str]:
    """Lines about the GPUs: why PyTorch uses none, or for each whether kernels run on it.

    Args:
        driver: see :func:`describe_driver`.
    """
    if not (torch.version.cuda or torch.version.hip):
        if driver is None:
            return {"gpu": "none: no driver is found"}
        return {
            "gpu": f"a driver is there ({driver}), but PyTorch {torch.__version__} is built without CUDA: install a "
            "build with it, see https://pytorch.org/get-started/locally"
        }
    available = attempt(lambda: str(torch.cuda.is_available()))
    if available == "False":
        if driver is None:
            return {"gpu": "none: no driver is found"}
        return {"gpu": f"a driver is there ({driver}), but PyTorch finds no GPU: starting CUDA {attempt(start)}"}
    if available != "True":
        return {"gpu": f"torch.cuda.is_available() {available}"}
    count = attempt(lambda: str(torch.cuda.device_count()))
    if not count.isdecimal():
        return {"gpu": f"torch.cuda.device_count() {count}"}
    report = {"gpu": f"{count} found"}
    for number in range(int(count)):
        report[f"cuda:{number}"] = describe_kernels(torch.device("cuda", number))
        if HUNG in report[f"cuda:{number}"]:
            break
    return report


def start() -> str:
    torch.cuda.init()
    return "raises no error"


def describe_kernels(device: torch.device) -> str:
    """Whether a kernel of PyTorch and one of Triton give the right numbers on a device."""
    plain = attempt(lambda: run_torch(device))
    if HUNG in plain:
        return f"a kernel of PyTorch {plain}"
    return f"a kernel of PyTorch {plain}; a kernel of Triton {attempt(lambda: run_triton(device))}"


def run_torch(device: torch.device) -> str:
    total = float((torch.ones(4, device=device) + 1).sum())
    return "runs" if total == 8 else f"gives {total:g} instead of 8"


def run_triton(device: torch.device) -> str:
    seeds = torch.arange(3)
    with use_backend("torch"):
        wanted = uniforms(seeds, 2, 5, 0)
    with use_backend("triton"):
        found = uniforms(seeds.to(device), 2, 5, 0).cpu()
    return "runs" if torch.equal(found, wanted) else "gives other random numbers than PyTorch"
