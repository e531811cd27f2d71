"""Settings that every test shares.

Kernels run on the GPU where there is one and in Triton's interpreter where there is none; Triton reads its switch when
a kernel is defined, so it is set here, before anything imports one. Tests run the plain PyTorch forms unless they ask
for the kernels with ``use_backend("triton")``, because the interpreter is thousands of times slower.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes that each start a thread a core only hinder one another
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest

from varkern.ops.backend import use_backend

# Convolutions in TensorFloat-32, cuDNN's default, err by 1e-3: more than any form here may differ from float64.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU (through the interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def quick_backend(device) -> str:
    """The backend for whole generations: the kernels on a GPU, never Triton's interpreter."""
    return "auto" if device.type == "cuda" else "torch"


@pytest.fixture(autouse=True)
def plain_backend():
    with use_backend("torch"):
        yield
