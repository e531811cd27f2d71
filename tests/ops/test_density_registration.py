"""The density ops as registered operators, and their errors for bad input."""

import pytest
import torch

from tests.ops.test_density import backend, normal  # noqa: F401
from varkern.ops import bit_density, kernel_density, silverman_bandwidth, token_density
from varkern.ops.backend import use_backend

OPS = torch.ops.varkern


@pytest.mark.parametrize("groups", [0, 2])
def test_opcheck(device, backend, groups):  # noqa: F811
    x = normal(groups, 5, 3).to(device)
    h = torch.ones(groups, device=device)
    torch.library.opcheck(OPS.silverman_bandwidth.default, (x, False))
    torch.library.opcheck(OPS.kernel_density.default, (x, None, 0.0, True))
    torch.library.opcheck(OPS.kernel_density.default, (x, h, 0.0, False))
    tokens = torch.zeros(groups, 4, 3, dtype=torch.int64, device=device)
    codebook = normal(7, 2).to(device)
    torch.library.opcheck(OPS.token_density.default, (tokens, codebook, None, 0.0, True, False, False))
    torch.library.opcheck(OPS.token_density.default, (tokens, codebook, h[:, None], 0.0, False, True, False))
    bits = torch.zeros(groups, 4, 3, 5, dtype=torch.uint8, device=device)
    torch.library.opcheck(OPS.bit_density.default, (bits, None, 0.7, False, True))


def test_compiles_as_one_graph(device, backend):  # noqa: F811
    def all_of_them(x, tokens, codebook, bits):
        return (
            kernel_density(x * 2) + kernel_density(x, metric="cosine"),
            silverman_bandwidth(x),
            token_density(tokens, codebook, bandwidth="batch"),
            token_density(tokens, codebook, "map", x.new_ones(2)),
            bit_density(bits, 0.5, bandwidth=0.7),
        )

    given = (
        normal(2, 6, 3).to(device),
        torch.arange(24, device=device).reshape(2, 4, 3) % 7,
        normal(7, 2).to(device),
        (normal(2, 4, 3, 5) > 0).to(device),
    )
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(*given)
    for one, other in zip(compiled, all_of_them(*given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("form", ["triton", "torch"])
def test_replays_in_a_cuda_graph(form):
    tokens = torch.randint(0, 50, (2, 700, 4), device="cuda")
    codebook = torch.randn(50, 32, device="cuda")
    with use_backend(form):
        token_density(tokens, codebook, bandwidth="batch")  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            densities = token_density(tokens, codebook, bandwidth="batch")
        for seed in range(2):
            tokens.copy_(torch.randint(0, 50, (2, 700, 4), generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(densities, token_density(tokens, codebook, bandwidth="batch"))


X = torch.zeros(2, 4, 3)
TOKENS = torch.zeros(2, 4, 3, dtype=torch.int64)
CODEBOOK = torch.zeros(5, 3)
BITS = torch.zeros(2, 4, 3, 6, dtype=torch.uint8)
GRADIENT = torch.zeros(5, 3, requires_grad=True)
TWO = torch.ones(2, dtype=torch.int64)
BAD = [
    pytest.param(kernel_density, ([1.0],), TypeError, "x must be .* tensor, got list", id="x-list"),
    pytest.param(kernel_density, (X.long(),), TypeError, r"x must be .*, got a tensor of torch.int64", id="x-int"),
    pytest.param(kernel_density, (X[0, 0],), ValueError, r"x must have shape \[..., N, D\].*\[3\]", id="x-rank"),
    pytest.param(silverman_bandwidth, (X[:, :0],), ValueError, r"x must have .*\[2, 0, 3\]", id="no-samples"),
    pytest.param(kernel_density, (X[..., :0],), ValueError, r"x must have .*\[2, 4, 0\]", id="no-dimensions"),
    pytest.param(kernel_density, (X, 0), ValueError, "bandwidth must be finite and > 0, got 0", id="h-zero"),
    pytest.param(
        kernel_density, (X, float("nan")), ValueError, "bandwidth must be finite and > 0, got nan", id="h-nan"
    ),
    pytest.param(kernel_density, (X, "image"), TypeError, "bandwidth must be a number, got str", id="h-rule"),
    pytest.param(kernel_density, (X, TWO), TypeError, "bandwidth must be a number or a float tensor", id="h-int"),
    pytest.param(kernel_density, (X, torch.ones(3)), ValueError, r"broadcast to .* \[2\], got \[3\]", id="h-shape"),
    pytest.param(
        kernel_density, (X, None, "l1"), ValueError, "metric must be 'euclidean' or 'cosine', got 'l1'", id="l1"
    ),
    pytest.param(
        kernel_density, (GRADIENT,), RuntimeError, "kernel_density defines no gradients, but x", id="gradient"
    ),
    pytest.param(
        kernel_density, (CODEBOOK, GRADIENT[0, 0]), RuntimeError, "no gradients, but bandwidth", id="h-gradient"
    ),
    pytest.param(
        token_density, (TOKENS.int(), CODEBOOK), TypeError, "tokens must be an int64 tensor", id="tokens-int32"
    ),
    pytest.param(token_density, (TOKENS[0], CODEBOOK), ValueError, r"tokens must have .*\[4, 3\]", id="tokens-rank"),
    pytest.param(token_density, (TOKENS, CODEBOOK[0]), ValueError, r"codebook must have .*\[3\]", id="codebook-rank"),
    pytest.param(token_density, (TOKENS, TOKENS), TypeError, "codebook must be a float32", id="codebook-int"),
    pytest.param(token_density, (TOKENS, CODEBOOK, "pixel"), ValueError, "per must be 'position' or 'map'", id="per"),
    pytest.param(
        token_density, (TOKENS, CODEBOOK, "map", "all"), ValueError, "bandwidth must be 'image', .*'all'", id="rule"
    ),
    pytest.param(
        token_density, (TOKENS, CODEBOOK, "map", None), ValueError, "bandwidth must be .* got None", id="none"
    ),
    pytest.param(
        token_density,
        (TOKENS, CODEBOOK, "map", torch.ones(2, 3)),
        ValueError,
        r"or \[2, 1\], got \[2, 3\]",
        id="h-positions",
    ),
    pytest.param(token_density, (TOKENS, GRADIENT), RuntimeError, "no gradients, but codebook", id="codebook-gradient"),
    pytest.param(bit_density, (BITS.long(), 1.0), TypeError, "bits must be a uint8 or bool tensor", id="bits-int"),
    pytest.param(bit_density, (BITS[0], 1.0), ValueError, r"bits must have .*\[4, 3, 6\]", id="bits-rank"),
    pytest.param(bit_density, (BITS, -1), ValueError, "scale must be finite and > 0, got -1", id="scale"),
    pytest.param(bit_density, (BITS, "1"), TypeError, "scale must be a number, got str", id="scale-str"),
    pytest.param(
        bit_density,
        (BITS, 1.0, "map", "image", "cosine"),
        ValueError,
        "metric must be 'euclidean', got",
        id="bits-cosine",
    ),
]


@pytest.mark.parametrize(("op", "given", "error", "message"), BAD)
def test_bad_input(op, given, error, message):
    with pytest.raises(error, match=message):
        op(*given)
