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
import os
import statistics

import pytest
import torch

TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
if TINY and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench import measure  # noqa: E402
from tests.references.density import chain  # noqa: E402
from varkern.ops import bit_density, kernel_density, silverman_bandwidth, token_density  # noqa: E402
from varkern.ops.backend import use_backend  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# B, N, D
SIZES = [(2, 20, 8), (1, 30, 5)] if TINY else [
    (24, 20, 32), (24, 50, 32), (24, 100, 32), (64, 100, 32), (24, 100, 128), (1, 507, 32), (24, 1000, 32),
    (1, 3000, 32), (24, 3000, 32), (1, 3000, 128), (1, 4096, 32), (1, 4096, 1024), (24, 100, 8192), (1, 1000, 8192),
    (1, 4096, 8192),
]  # fmt: skip
# Float32 instructions per second: lanes times the boost clock, half of the data sheets' operations.
INSTRUCTIONS = {"H100": 33.5e12, "H200": 33.5e12, "A100": 9.75e12, "B200": 37e12}


def instructions():
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((rate for key, rate in INSTRUCTIONS.items() if key in name), float("nan"))


def wait():
    measure.synchronize(DEVICE)


def call_seconds(step):
    """Median seconds of a plain call, launches included; often of one call, because the largest chain is slow."""
    return statistics.median(measure.call_seconds(step, DEVICE, 0 if TINY else 0.2, 1))


def graph_seconds(step):
    return measure.graph_seconds(step, DEVICE)


def peak_bytes(step):
    """Peak memory of a call, without the memory that was in use before; NaN without a GPU."""
    if DEVICE.type != "cuda":
        return float("nan")
    step()
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    wait()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


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


def row_of(ours, others, operations, flops=1.5):
    """A row of a table; ``flops``: operations per instruction, 1.5 for a subtraction and a multiply-add."""
    row = {"floor": operations / instructions(), "graph": graph_seconds(ours), "call": call_seconds(ours)}
    row |= {"tflops": flops * operations / row["graph"] / 1e12, "peak": peak_bytes(ours)}
    for name, step in others.items():
        timed = call_seconds if name == "pykeops" else graph_seconds
        row |= {name: timed(step), f"{name} peak": peak_bytes(step)}
    return row


def print_row(label, row, names):
    cells = [
        f"{label:>26}",
        f"{row['floor'] * 1e6:8.1f} {row['graph'] * 1e6:9.1f} {row['graph'] / row['floor']:7.2f} {row['tflops']:7.2f}",
        f"{row['call'] * 1e6:9.1f} {row['peak'] / 1e6:8.2f}",
        *(
            f"{row[n] * 1e6:11.1f} {row[n] / row['graph']:6.1f} {row[f'{n} peak'] / 1e6:8.1f}"
            for n in names
            if n in row
        ),
    ]
    print(" | ".join(cells), flush=True)


def print_head(names):
    heads = [f"{'':>26}", f"{'floor us':>8} {'graph us':>9} x floor {'TFLOP/s':>7}", f"{'call us':>9} {'peak MB':>8}"]
    print("\n" + " | ".join(heads + [f"{name + ' us':>11}      x  peak MB" for name in names]))


def test_samples(benchmark):
    print_head(["chain", "compiled", "pykeops"] if importlib.util.find_spec("pykeops") else ["chain", "compiled"])
    rows = []
    with torch.no_grad(), use_backend("triton"):
        for batch, n, d in SIZES:
            x = torch.randn(batch, n, d, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(n))
            exact = chain(x[:1, :, None].double())[0]
            error = ((kernel_density(x)[0].double() - exact).abs() / exact).max().item()
            assert error < 1e-4, f"B={batch}, N={n}, D={d}: relative error {error}"
            steps = peers(x)
            row = row_of(lambda: kernel_density(x), steps, batch * n * (n + 1) * d)  # noqa: B023
            rows.append({"B": batch, "N": n, "D": d, "error": error, **row})
            print_row(f"B={batch} N={n} D={d}", row, steps)
        large = [row for row in rows if row["N"] == 3000]
        for row in large:
            share = row["peak"] / row["chain peak"]
            print(
                f"bar, B={row['B']} N=3000 D={row['D']}: {row['chain'] / row['graph']:.1f} times the chain "
                f"(bar: 10), peak memory {share:.1%} of it (bar: below 5%)"
            )
        print(f"largest relative error {max(row['error'] for row in rows):.1e}; torch {torch.__version__}")
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(lambda: (kernel_density(x), wait()), rounds=1 if TINY else 20, warmup_rounds=1)


# B, N, l, V, C
MAPS = [(2, 20, 4, 50, 8)] if TINY else [
    (24, 20, 4, 4096, 32), (24, 50, 4, 4096, 32), (24, 100, 4, 4096, 32), (24, 100, 9, 4096, 32),
    (24, 100, 256, 4096, 32), (1, 3000, 4, 4096, 32),
]  # fmt: skip


@pytest.mark.parametrize("per", ["position", "map"])
def test_token_maps(per):
    """The density computation of a search at its scale, without sampling the candidates; scale 1 has l=4."""
    print_head(["chain"])
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

            row = row_of(ours, {"chain": released}, batch * n * (n + 1) * length * width)
            print_row(f"{per} B={batch} N={n} l={length}", row, ["chain"])
            if (batch, n, length, per) == (24, 100, 4, "position"):
                print(f"bar, N=100, B=24, scale 1: {row['graph'] * 1e6:.1f} us (bar: below 30)")


# B, N, l, d
BITS = [(2, 20, 2, 8)] if TINY else [(1, 500, 4, 32), (1, 3000, 4, 32), (24, 3000, 4, 32), (1, 4096, 64, 32)]


def test_bits():
    """Infinity's codes. The floor counts an exclusive or, a bit count and an exponential per pair of words."""
    print_head(["chain"])
    with torch.no_grad(), use_backend("triton"):
        for batch, n, length, d in BITS:
            bits = torch.randint(0, 2, (batch, n, length, d), device=DEVICE, dtype=torch.uint8)

            def ours(bits=bits, d=d):
                return bit_density(bits, d**-0.5)

            def released(bits=bits):
                return chain(bits.float())

            others = {"chain": released} if length <= 4 else {}
            words = -(-d // 32)
            row = row_of(ours, others, batch * n * (n + 1) / 2 * length * (9 * words + 18), flops=0)
            print_row(f"bits B={batch} N={n} l={length} d={d}", row, others)
            if "chain" in row and n == 3000:
                share = row["peak"] / row["chain peak"]
                print(f"bar: {row['chain'] / row['graph']:.1f} times the chain, peak memory {share:.1%} of it")
