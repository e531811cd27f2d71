"""Kernel densities compared with chains of ``torch.cdist``: time over the floor, and peak memory.

    python -m pytest bench/test_density.py -q -s      # prints the tables; about three minutes on one GPU
    VARKERN_BENCH_TINY=1 ...                          # a rehearsal of two small sizes in the interpreter

The work: samples ``x[B, N, D]`` with Silverman's bandwidths, token maps as in a search, and binary codes. The peers:
the chain of the released VAR-Scaling code (cdist, power, exp, sum), the same under ``torch.compile``, and pykeops if
it is installed, which is given the bandwidth. The floor is arithmetic: two float32 instructions per pair and
coordinate, each pair once, at the data sheet's rate. Times are device times of CUDA graphs; those of pykeops are of
plain calls. The bars of the op are printed as lines.
"""

import importlib.util

import pytest
import torch

from bench.measure import DEVICE, RATES, TINY, Table, bar, call_seconds, graph_seconds, peak_bytes, synchronize
from tests.references.density import chain
from varkern.ops import bit_density, kernel_density, silverman_bandwidth, token_density
from varkern.ops.backend import use_backend

# B, N, D
SIZES = [(2, 20, 8), (1, 30, 5)] if TINY else [
    (24, 20, 32), (24, 50, 32), (24, 100, 32), (64, 100, 32), (24, 100, 128), (1, 507, 32), (24, 1000, 32),
    (1, 3000, 32), (24, 3000, 32), (1, 3000, 128), (1, 4096, 32), (1, 4096, 1024), (24, 100, 8192), (1, 1000, 8192),
    (1, 4096, 8192),
]  # fmt: skip


def keops_density(x, h):
    from pykeops.torch import LazyTensor

    squares = ((LazyTensor(x[:, :, None, :]) - LazyTensor(x[:, None, :, :])) ** 2).sum(-1)
    return (-squares / LazyTensor((2 * h**2).view(-1, 1, 1, 1))).exp().sum(2)


def peers(x):
    """{name: step()}: what a user without the op would run on ``x[B, N, D]``."""
    codes = x[:, :, None]
    steps = {"chain": lambda: chain(codes)}
    if DEVICE.type == "cuda" and x.shape[2] <= 128:  # compiling takes some seconds per size
        torch._dynamo.reset()
        compiled = torch.compile(chain)
        steps["compiled"] = lambda: compiled(codes)
    if importlib.util.find_spec("pykeops"):
        h = silverman_bandwidth(x)
        steps["pykeops"] = lambda: keops_density(x, h)
    return steps


def measured(work, ours, others, operations):
    """A row: floor, times and peak memory of ours; then those of the others, and their times over ours."""
    floor, taken = operations / RATES.instructions, graph_seconds(ours)
    row = {"work": f"{work:<26}", "floor us": floor * 1e6, "graph us": taken * 1e6, "x floor": taken / floor}
    row |= {"call us": call_seconds(ours) * 1e6, "peak MB": peak_bytes(ours) / 1e6}
    for name, step in others.items():
        theirs = (call_seconds if name == "pykeops" else graph_seconds)(step)
        row |= {f"{name} us": theirs * 1e6, f"{name} x": theirs / taken, f"{name} MB": peak_bytes(step) / 1e6}
    return row


def test_samples(benchmark):
    rows, table = [], Table()
    with torch.no_grad(), use_backend("triton"):
        for batch, n, d in SIZES:
            x = torch.randn(batch, n, d, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(n))
            exact = chain(x[:1, :, None].double())[0]
            error = ((kernel_density(x)[0].double() - exact).abs() / exact).max().item()
            assert error < 1e-4, f"B={batch}, N={n}, D={d}: relative error {error}"
            ours = lambda: kernel_density(x)  # noqa: B023, E731
            rows.append(measured(f"B={batch} N={n} D={d}", ours, peers(x), batch * n * (n + 1) * d))
            table.add(rows[-1])
            if n == 3000:
                bar("times of the chain over ours", rows[-1]["chain x"], 10, at_most=False)
                bar("peak memory over that of the chain", rows[-1]["peak MB"] / rows[-1]["chain MB"], 0.05)
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(lambda: (ours(), synchronize()), rounds=1 if TINY else 20, warmup_rounds=1)


# B, N, l, V, C
MAPS = [(2, 20, 4, 50, 8)] if TINY else [
    (24, 20, 4, 4096, 32), (24, 50, 4, 4096, 32), (24, 100, 4, 4096, 32), (24, 100, 9, 4096, 32),
    (24, 100, 256, 4096, 32), (1, 3000, 4, 4096, 32),
]  # fmt: skip


@pytest.mark.parametrize("per", ["position", "map"])
def test_token_maps(per):
    """The density computation of a search at its scale, without sampling the candidates; scale 1 has l=4."""
    table = Table()
    with torch.no_grad(), use_backend("triton"):
        for batch, n, length, vocabulary, width in MAPS:
            codebook = torch.randn(vocabulary, width, device=DEVICE)
            tokens = torch.randint(0, vocabulary, (batch, n, length), device=DEVICE)
            tokens = torch.where(torch.rand(tokens.shape, device=DEVICE) < 0.5, tokens, tokens[:, :1])

            def ours(tokens=tokens, codebook=codebook):
                return token_density(tokens, codebook, per)

            def released(tokens=tokens, codebook=codebook):
                codes = codebook[tokens]
                return chain(codes if per == "position" else codes.flatten(2)[:, :, None])

            operations = batch * n * (n + 1) * length * width
            row = measured(f"{per} B={batch} N={n} l={length}", ours, {"chain": released}, operations)
            table.add(row)
            if (batch, n, length, per) == (24, 100, 4, "position"):
                bar("scale 1, us", row["graph us"], 30)


# B, N, l, d
BITS = [(2, 20, 2, 8)] if TINY else [(1, 500, 4, 32), (1, 3000, 4, 32), (24, 3000, 4, 32), (1, 4096, 64, 32)]


def test_bits():
    """Infinity's codes. The floor counts an exclusive or, a bit count and an exponential per pair of words."""
    table = Table()
    with torch.no_grad(), use_backend("triton"):
        for batch, n, length, d in BITS:
            bits = torch.randint(0, 2, (batch, n, length, d), device=DEVICE, dtype=torch.uint8)

            def ours(bits=bits, d=d):
                return bit_density(bits, d**-0.5)

            def released(bits=bits):
                return chain(bits.float())

            operations = batch * n * (n + 1) / 2 * length * (9 * -(-d // 32) + 18)
            others = {"chain": released} if length <= 4 else {}
            table.add(measured(f"bits B={batch} N={n} l={length} d={d}", ours, others, operations))
