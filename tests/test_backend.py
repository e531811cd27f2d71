"""Which implementation runs, and how it is chosen."""

import os
import subprocess
import sys
import threading

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


def test_without_triton_every_tensor_gets_pytorch(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kind in ("cpu", "cuda"):
        assert backend_for(on(kind)) == "torch"
        assert explain(kind) == "torch (Triton is not installed)"
    with pytest.raises(ImportError, match="backend 'triton' needs the package triton, which is not installed"):
        use_backend("triton")
    assert backend_for(on("cuda")) == "torch"


def test_a_fresh_process_without_the_switch_runs_pytorch():
    code = "import torch; from varkern.ops.backend import backend_for; print(backend_for(torch.zeros(1)))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for extra, wanted in (({}, "torch"), ({"TRITON_INTERPRET": "1"}, "triton")):
        run = subprocess.run([sys.executable, "-c", code], env=environment | extra, capture_output=True, text=True)
        assert run.stdout.strip() == wanted, run.stderr
