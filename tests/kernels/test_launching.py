"""Every kernel is launched through one function, which makes the GPU of its tensors the current one."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from varkern.kernels import launching

KERNELS = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


class Stub:
    """A kernel that records the current device at each launch."""

    def __init__(self, current, *arg_names):
        self.current, self.arg_names, self.launches = current, arg_names, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.current[-1], grid, arguments, options))


@pytest.fixture
def current(monkeypatch):
    """A list whose last item is the current device that ``torch.cuda.device`` set."""
    devices = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(wanted):
        devices.append(torch.device(wanted))
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_the_tensors_gpu_is_current_in_a_launch_and_not_after(current):
    kernel = Stub(current)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    launching.launch(kernel, (2,), None, x, 5, BLOCK=4)
    assert kernel.launches == [(torch.device("cuda:1"), (2,), (None, x, 5), {"BLOCK": 4, "enable_fp_fusion": False})]
    assert current == [torch.device("cuda:0")]


def test_tensors_on_a_cpu_change_no_device(current):
    kernel = Stub(current, "INTERPRETED")
    launching.launch(kernel, (1,), torch.zeros(3), enable_fp_fusion=True)
    assert kernel.launches[0][0] == torch.device("cuda:0")
    assert kernel.launches[0][3].keys() == {"enable_fp_fusion", "INTERPRETED"}
    assert kernel.launches[0][3]["enable_fp_fusion"]


def launches_of_its_own(tree: ast.AST) -> list[int]:
    """Lines on which something is launched as ``kernel[grid](...)``."""
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]


@pytest.mark.parametrize("file", KERNELS, ids=lambda path: path.stem)
def test_nothing_else_launches_a_kernel(file):
    found = launches_of_its_own(ast.parse(file.read_text()))
    assert len(found) == (1 if file.stem == "launching" else 0), (
        f"{file.name}, lines {found}: use launch(kernel, grid, ...)"
    )


def test_a_launch_beside_it_is_seen():
    assert launches_of_its_own(ast.parse("def f(x):\n    add_kernel[(4,)](x, BLOCK=2)")) == [2]


def test_every_kernel_is_launched():
    """Every kernel is launched through ``launch``, since the test above cannot see others."""
    kernels, launched = set(), set()
    for file in KERNELS:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                launched.add(node.args[0].id)
    assert launched == kernels and len(kernels) >= 14
