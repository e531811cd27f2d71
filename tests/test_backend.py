"""Which implementation runs, and how it is chosen."""

import functools
import os
import re
import sys
import threading
import types

import pytest
import torch

from varkern import use_backend
from varkern.ops import backend
from varkern.ops.backend import backend_for, explain, interpreting


def on(kind):
    """A stand-in for a tensor on a device that this machine may not have."""
    return type("Tensor", (), {"is_cuda": kind == "cuda", "device": torch.device(kind)})()


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.setattr(backend, "takes_cpu_tensors", interpreting)  # with --compiled, something else is there
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(backend, "triton_trouble", functools.cache(backend.triton_trouble.__wrapped__))
    monkeypatch.setattr(backend, "_warn", functools.cache(backend._warn.__wrapped__))
    with use_backend("auto"):
        yield


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("chosen", ["auto", "torch", "triton"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "meta"])
def test_rules(kind, chosen, switch, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", switch)
    reachable = kind == "cuda" or (kind == "cpu" and switch == "1")
    with use_backend(chosen):
        if chosen == "triton" and not reachable:
            with pytest.raises(RuntimeError, match=f"backend 'triton' needs a tensor on a GPU, got one on {kind}"):
                backend_for(on(kind))
        else:
            wanted = ("triton" if reachable else "torch") if chosen == "auto" else chosen
            assert backend_for(on(kind)) == wanted


@pytest.mark.parametrize(
    "value, wanted",
    [(None, False), ("", False), ("0", False), ("1", True), ("true", True), ("ON", True), ("no", False)],
)
def test_the_interpreters_switch(value, wanted, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is wanted


def test_as_a_context_manager_it_nests_and_survives_exceptions():
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("triton"):
            assert explain("cpu") == "triton (chosen with use_backend)"
            raise KeyError
        assert explain("cpu") == "torch (chosen with use_backend)"
        with use_backend("auto"):
            assert "chosen" not in explain("cpu")
        assert explain("cpu") == "torch (chosen with use_backend)"
    assert "chosen" not in explain("cpu")


def test_as_a_function_it_holds_from_then_on():
    use_backend("torch")
    assert backend_for(on("cuda")) == "torch"
    use_backend("auto")
    assert backend_for(on("cuda")) == "triton"


def test_an_old_or_missing_triton_means_pytorch_with_one_warning(monkeypatch):
    for version, trouble in (
        ("3.5.1", "the kernels need Triton 3.6 or newer, got 3.5.1"),
        ("2.1.0", "the kernels need Triton 3.6 or newer, got 2.1.0"),
        (None, "the kernels need Triton 3.6 or newer, but importing it failed: ModuleNotFoundError: .*triton.*"),
    ):
        module = None if version is None else types.SimpleNamespace(__version__=version)  # None: import raises
        monkeypatch.setitem(sys.modules, "triton", module)
        for cached in (backend.triton_trouble, backend._warn):
            cached.cache_clear()
        with pytest.warns(UserWarning, match=f"{trouble}; the ops run in plain PyTorch") as seen:
            assert [backend_for(on("cuda")) for _ in range(3)] == ["torch"] * 3
        assert len(seen) == 1
        assert re.fullmatch(rf"torch \({trouble}\)", explain("cuda"))
        assert backend_for(on("mps")) == "torch"
        with pytest.raises(backend.NoKernelsError, match=f"backend 'triton' cannot be used: {trouble}; use 'auto'"):
            use_backend("triton")
        assert backend.chosen_backend() == "auto"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.1", "4.0.0+git", "3.6.0.post1"])
def test_new_tritons_are_used(version, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    backend.triton_trouble.cache_clear()
    assert backend_for(on("cuda")) == "triton"


def test_a_bad_name_changes_nothing():
    use_backend("torch")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton', got 'cuda'"):
        use_backend("cuda")
    assert backend_for(on("cuda")) == "torch"


def test_other_threads_keep_their_choice():
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backend_for(on("cuda"))))
        thread.start()
        thread.join()
    assert seen == ["triton"]


@pytest.mark.parametrize(
    "kind, switch, wanted",
    [
        ("cuda", "0", "triton (tensors on a GPU)"),
        ("cpu", "0", "torch (tensors on cpu)"),
        ("cpu", "1", "triton (TRITON_INTERPRET is set: kernels run in the interpreter)"),
        ("mps", "1", "torch (tensors on mps)"),
    ],
)
def test_explanations(kind, switch, wanted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", switch)
    assert explain(kind) == wanted


def test_the_switch_alone_lets_a_cpu_run_the_kernels(monkeypatch):
    """That a fresh process has the backend "auto" and no kernels on the CPU: ``tests/test_platforms.py``."""
    with use_backend("auto"):  # the process of the tests has the switch, unless there is a GPU
        switched = os.environ.get("TRITON_INTERPRET") == "1"
        assert backend_for(torch.zeros(1)) == ("triton" if switched else "torch")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert backend_for(torch.zeros(1)) == "torch"
