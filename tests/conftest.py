"""Settings that every test shares.

Kernels run on the GPU where there is one and in Triton's interpreter where there is none; Triton reads its switch when
a kernel is defined, so it is set here, before anything imports one. ``--compiled sm_90`` runs them as compiled code on
an emulated GPU instead (``tests/emulator``). Tests run the plain PyTorch forms unless they ask for the kernels with
``use_backend("triton")``, because the interpreter and the emulator are thousands of times slower than a GPU.

Without Triton, or with one too old for the kernels, the tests of kernels are skipped. ``VARKERN_NEED_KERNELS=1``
makes this an error, so that a machine that must run the kernels cannot pass without them.
"""

import gc
import os

import pytest
import torch

from tests.interpreter import patch_language_once, runs_interpreted

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes that each start a thread a core only hinder one another
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the processes that tests start

# The first gradient of a process starts autograd's threads, one per device that PyTorch knows at that moment. With one
# of these, no forked child can compute gradients. opcheck makes PyTorch know a device; other tests train in children.
if not torch.cuda.is_available():
    torch.zeros((), requires_grad=True).backward()

# Convolutions in TensorFloat-32, cuDNN's default, err by 1e-3: more than any form here may differ from float64.
torch.backends.cudnn.allow_tf32 = False


# The collector of reference cycles walks through all modules and test items again and again while these are made, which
# takes a fifth of the time of collection. They live as long as the process, so it never needs to look at them.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


def pytest_addoption(parser):
    group = parser.getgroup("compiled", "kernels as compiled code on an emulated GPU")
    targets = ("sm_80", "sm_90", "sm_120")
    group.addoption("--compiled", choices=targets, help="GPU target that kernels are compiled for; the CPU emulates it")
    group.addoption("--ulp", type=int, default=0, help="error of approximate instructions, in units in the last place")
    group.addoption("--all-cases", action="store_true", help="the interpreter runs every case of thinned tests too")
    group.addoption("--thinned", action="store_true", help="compiled code runs only what the interpreter would run")
    group.addoption("--order", type=int, default=1, help="seed of the order in which blocks and warps run")


def pytest_configure(config):
    config.addinivalue_line("markers", "compiled_only: the test needs kernels as compiled code (--compiled)")
    config.addinivalue_line("markers", "thinned(every, **values): see tests/interpreter.py")
    if config.getoption("--compiled"):
        from tests.emulator.plugin import CompiledKernels  # imports Triton, which must not see the switch below

        config.pluginmanager.register(CompiledKernels(config))
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--compiled"):
        patch_language_once()
        skip = pytest.mark.skip(reason="needs --compiled")
        for item in items:
            if item.get_closest_marker("compiled_only"):
                item.add_marker(skip)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not config.getoption("--all-cases")
    if interpreted or config.getoption("--thinned"):
        left_out = [item for item in items if not runs_interpreted(item)]
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)


def without_kernels() -> str | None:
    """Why the kernels cannot be tested; None: they can, or they must be."""
    from varkern.ops.backend import triton_trouble

    return None if os.environ.get("VARKERN_NEED_KERNELS") == "1" else triton_trouble()


def pytest_ignore_collect(collection_path):
    """The files that import kernels."""
    kernels = collection_path.parent.name in ("kernels", "emulator") and collection_path.name.startswith("test_")
    return True if kernels and without_kernels() else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test of a kernel is skipped where no kernel can run."""
    report = yield
    error = call.excinfo and call.excinfo.value
    while error is not None and type(error).__name__ != "NoKernelsError":  # opcheck raises another error from it
        error = error.__cause__ or error.__context__
    if error is not None and without_kernels():
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, without_kernels())
    return report


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
    from varkern.ops import use_backend  # imported here, after Triton's switch is set

    with use_backend("torch"):
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub that is a folder of this machine, in the place of the client's functions."""
    from tests.standins.hub import Hub  # skips the test without huggingface_hub

    return Hub(tmp_path / "hub").install(monkeypatch)
