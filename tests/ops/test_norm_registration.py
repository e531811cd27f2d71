"""``map_norm`` as a registered operator: opcheck, torch.compile, CUDA graphs, very large input."""

import pytest
import torch

from varkern.ops import map_norm
from varkern.ops.backend import use_backend


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def place(backend, device):
    return device if backend == "triton" else torch.device("cpu")


def arguments(place, dtype=torch.float32, residual=True, asking=True):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 12, 3, 4)
    x, other = torch.randn(2, *shape, generator=generator).to(place, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(2, *shape[1:], generator=generator).to(place)
    given = [x, vectors[0], vectors[1], other if residual else None]
    return [tensor if tensor is None else tensor.clone().requires_grad_(asking) for tensor in given]


@pytest.mark.thinned(every=2, dtype=(torch.float32, torch.bfloat16))  # float64 takes the PyTorch form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["all", "norm alone"])
def test_opcheck(backend, place, dtype, residual):
    given = arguments(place, dtype, residual)
    torch.library.opcheck(torch.ops.varkern.map_norm.default, (*given, 0.2 if residual else 1.0, 1e-5))
    grad = torch.ones_like(given[0])
    given = [tensor if tensor is None else tensor.detach() for tensor in given]
    torch.library.opcheck(torch.ops.varkern.map_norm_backward.default, (grad, *given, 0.2, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_compiled_as_one_graph(backend, place, dtype):
    def step(x, weight, bias, residual):
        y = map_norm(x * 2, weight, bias, residual=residual, negative_slope=0.2)
        return (y.float() ** 2).sum()

    given = arguments(place, dtype)
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        result = function(*given)
        found.append([result.detach(), *torch.autograd.grad(result, given)])
    for eager, compiled in zip(*found, strict=True):
        assert eager.dtype == compiled.dtype
        largest = eager.abs().max().item()
        assert torch.allclose(compiled, eager, atol=largest * (1e-6 if dtype == torch.float32 else 1e-2), rtol=1e-6)


def test_one_gradient_only(backend, place):
    """Under autocast too, and on weights that are shared."""
    x, weight, bias, *_ = arguments(place)
    for names in (("weight",), ("x", "weight")):
        given = {"x": x.detach(), "weight": weight.detach(), "bias": bias.detach()}
        for name in names:
            given[name] = given[name].clone().requires_grad_()
        with torch.autocast(place.type, dtype=torch.bfloat16):
            y = map_norm(**given) + map_norm(given["x"] * 2, given["weight"], given["bias"])
        assert y.dtype == torch.float32
        y.sum().backward()
        assert all(given[name].grad is not None for name in names) and given["bias"].grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replays_in_a_cuda_graph():
    given = arguments("cuda", asking=False)

    def step():
        return map_norm(*given[:3], residual=given[3], negative_slope=0.2)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with use_backend("triton"), torch.cuda.graph(graph):
        y = step()
    given[0].normal_()
    graph.replay()
    replayed = y.clone()
    assert torch.equal(replayed, step())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="eighteen gigabytes of features")
def test_beyond_two_to_the_31_elements():
    count = 2**31 // (32 * 256) + 3
    x = torch.empty(count, 32, 16, 16, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
    x[:-3].zero_()
    x[-3:].normal_()
    weight, bias = torch.ones(2, 32, 16, 16, device="cuda")
    with use_backend("triton"):
        y, end = map_norm(x, weight, bias), map_norm(x[-3:], weight, bias)
        assert torch.equal(y[-3:], end) and (y[:3] == 1).all()
        gradient = torch.ops.varkern.map_norm_backward(y, x, weight, bias, None, 1.0, 1e-5)[0]
        at_end = torch.ops.varkern.map_norm_backward(end, x[-3:], weight, bias, None, 1.0, 1e-5)[0]
    assert torch.equal(gradient[-3:], at_end)
