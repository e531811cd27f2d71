"""``sample_tokens`` as a registered operator: opcheck, torch.compile, CUDA graphs, and constants of both forms."""

import math

import pytest
import torch

from varkern.ops import sampling
from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds
from varkern.ops.sampling import sample_tokens


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def place(backend, device):
    return device if backend == "triton" else torch.device("cpu")


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch, backend, place):
    cond, uncond = torch.randn(2, batch, 3, 40, device=place)
    strengths = torch.ones(batch, device=place)
    arguments = (cond, uncond, strengths, image_seeds(0, batch, place), 2, 0.0, 1.0, 9, 0.9, 0)
    torch.library.opcheck(torch.ops.varkern.sample_tokens.default, arguments)


def test_compiles_as_one_graph(backend, place):
    def draw(cond, uncond, seeds):
        return sample_tokens(cond * 2, 3, uncond_logits=uncond, guidance=1.5, top_k=9, top_p=0.9, seeds=seeds) + 0

    cond, uncond = torch.randn(2, 2, 3, 40, device=place)
    seeds = image_seeds(0, 2, place)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(cond, uncond, seeds)
    assert torch.equal(compiled, draw(cond, uncond, seeds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replays_in_a_cuda_graph_with_another_seed():
    logits = torch.randn(2, 9, 4096, device="cuda")
    seeds = image_seeds(0, 2, "cuda")
    options = {"top_k": 900, "top_p": 0.96}
    eager = [sample_tokens(logits, 4, seeds=image_seeds(g, 2, "cuda"), **options) for g in range(2)]
    with use_backend("triton"):
        sample_tokens(logits, 4, seeds=seeds, **options)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = sample_tokens(logits, 4, seeds=seeds, **options)
    for g in range(2):
        seeds.copy_(image_seeds(g, 2))
        graph.replay()
        assert torch.equal(tokens, eager[g])
    assert not torch.equal(eager[0], eager[1])


def test_gradients_stop_at_the_draw(backend, place):
    logits = torch.randn(1, 2, 40, device=place, requires_grad=True)
    assert not sample_tokens(logits, seeds=image_seeds(0, 1, place)).requires_grad


def test_weights_are_the_exponential():
    x = torch.cat([torch.linspace(-30, 0, 100_001), torch.tensor([-math.inf, -1e30, 0.0])])
    weights = sampling._weights(x, torch.tensor(0.0))
    wanted = x.double().exp() * 2.0**sampling.WEIGHT_BITS
    assert weights[-3:].tolist() == [0, 0, 2**sampling.WEIGHT_BITS]
    # Half a unit in the last place of x * log2(e), 1.2e-6 at 30, is the larger part of the error.
    bound = 3e-7 + x.double().abs().clamp(max=30) * 1.2e-7
    assert ((weights - wanted).abs() <= wanted * bound + 1).all()


def test_both_forms_share_their_numbers():
    from varkern.kernels import sampling_search as kernel
    from varkern.kernels import sampling_small

    assert kernel.WEIGHT_BITS.value == sampling.WEIGHT_BITS
    assert kernel.TOP_P_BITS.value == sampling.TOP_P_BITS
    assert kernel.UNIFORM_BITS.value == sampling.UNIFORM_BITS
    assert sampling_small.TOKENS.value == sampling.TOKENS
    assert (kernel.LOG2_E.value, kernel.ROUNDER.value) == (sampling._LOG2_E, sampling._ROUNDER)
    assert tuple(getattr(kernel, f"EXP2_{i}").value for i in range(1, 6)) == sampling._EXP2
