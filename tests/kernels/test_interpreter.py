"""``tests/interpreter.py`` saves only repeated work: the language is patched for a launch, and for no longer.

Of thinned tests it keeps a part of the kernels' cases in which every value occurs.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import runs_interpreted
from varkern.ops.backend import interpreting

if not interpreting():
    pytest.skip("kernels are compiled", allow_module_level=True)


@triton.jit
def doubled(x):
    return tl.sum(x, 0) * 2


@triton.jit
def doubles_kernel(x_ptr, out_ptr, CALLS: tl.constexpr):
    for call in range(CALLS):
        place = tl.program_id(0) * CALLS + call
        tl.store(out_ptr + place, doubled(tl.load(x_ptr + place * 4 + tl.arange(0, 4))))


def doubles(programs, calls):
    x = torch.arange(programs * calls * 4.0)
    out = torch.empty(programs * calls)
    doubles_kernel[programs,](x, out, calls)
    return out, x.view(-1, 4).sum(1) * 2


def test_results_stay_and_the_language_is_patched_once_per_module(monkeypatch):
    patches, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *given: patches.append(given) or patch(*given))
    doubles(1, 1)  # the first launch finds fewer names to patch
    counts = []
    for programs, calls in ((1, 1), (3, 4), (1, 1)):
        patches.clear()
        found, wanted = doubles(programs, calls)
        assert torch.equal(found, wanted)
        counts.append(len(patches))
    assert counts[0] == counts[1] == counts[2] > 0


def test_the_language_is_restored_after_every_launch():
    load = tl.load
    doubles(1, 2)
    assert tl.load is load
    with pytest.raises(interpreter.InterpreterError):
        doubles_kernel[1,](torch.zeros(4), None, 1)
    assert tl.load is load
    found, wanted = doubles(2, 2)
    assert torch.equal(found, wanted)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.thinned(every=2, colour=("red", "blue"))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("colour, number", [("red", 0), ("green", 1), ("blue", 2)])
def test_a_thinned_grid(request, backend, size, colour, number):
    """Which cases there are is itself the test."""
    cases = [item for item in request.session.items if item.originalname == "test_a_thinned_grid"]
    kept = {(c.params["backend"], c.params["size"], c.params["colour"]) for c in (case.callspec for case in cases)}
    assert runs_interpreted(request.node)
    whole = {("torch", size, colour) for size in (1, 2, 3) for colour in ("red", "green", "blue")}
    part = {("triton", size, colour) for size in (1, 3) for colour in ("red", "blue")}
    if not request.config.getoption("--all-cases") and len(cases) > 1:
        assert kept == whole | part
