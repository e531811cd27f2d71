"""F(.) of M candidates compared with PyTorch's chain of operations, per scale, and the step that keeps the winner.

    python -m pytest bench/test_fusion.py -q -s       # prints the tables; under two minutes on one GPU
    VARKERN_BENCH_TINY=1 ...                          # a rehearsal of two small scales in the interpreter

The work: VAR at 256 px, 24 images, M in 1, 4, 32, 128, result bfloat16 channels-last with ``f_hat`` added. The peers:
the chain (embedding, interpolate, conv2d with its blend, add) in float32, in bfloat16 channels-last, and the latter
under ``torch.compile``. Times are those of CUDA graphs, without launch overhead; the last table also has the wall-clock
time of plain calls. The floor is the larger of bytes / memory bandwidth and operations / rate of the matrix units, for
the operations that the kernels execute.
"""

import functools
import os
import time

import torch
import torch.nn.functional as F

TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
if TINY and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from varkern.kernels.fusion import multiplies  # noqa: E402

from bench import measure  # noqa: E402
from tests.references.fusion import SIDES_256, case, chain  # noqa: E402
from varkern.ops import commit_tokens, fuse_tokens, resize_features  # noqa: E402
from varkern.ops.backend import use_backend  # noqa: E402
from varkern.ops.fusion_tables import TILE, tile_inputs  # noqa: E402

SIDES, SIZE, C, V = ((2, 4), 4, 8, 64) if TINY else (SIDES_256, 16, 32, 4096)
B, CANDIDATES = (2, (1, 2)) if TINY else (24, (1, 4, 32, 128))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peaks():
    """Bytes per second, half-precision operations per second."""
    rates = measure.rates_of(DEVICE)
    return (rates.bandwidth, rates.half) if rates else (float("nan"), float("nan"))


def seconds(step):
    return measure.graph_seconds(step, DEVICE)


def wall_seconds(step, repeats=20):
    """Seconds of a plain call, launches included."""
    repeats = 1 if TINY else repeats
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def work(side, M):
    """(bytes that must move, operations on the matrix units) per call."""
    N, pixels = B * M, SIZE * SIZE
    rows_read = min(V, N * side * side) * (1 if side == SIZE else 9)
    moved = N * side * side * 8 + N * pixels * C * 2 + B * pixels * C * 4 + rows_read * C * 2
    if side == SIZE:
        multiply = multiplies(C, torch.float16)
        return moved, N * pixels * 9 * C * C * 2 if multiply else 0
    places, _ = tile_inputs(side, SIZE, "bicubic", 3, DEVICE, torch.float16)
    tiles, steps = len(places) ** 2, places.shape[2] // TILE
    return moved, N * tiles * (steps * steps + steps) * 2 * TILE * TILE * TILE * C


def peers(side, codebook, f_hat, phi):
    """{name: step(tokens)}: what a user without the op would run."""
    half = torch.bfloat16
    weight, bias, blend = phi
    phi_half = (weight.to(half, memory_format=torch.channels_last), bias.to(half), blend)
    codebook_half, f_hat_half = codebook.to(half), f_hat.to(half, memory_format=torch.channels_last)

    def eager_float32(tokens):
        return chain(tokens, codebook, side, SIZE, f_hat, phi, dtype=torch.float32)

    def eager_bfloat16(tokens):
        return chain(tokens, codebook_half, side, SIZE, f_hat_half, phi_half, dtype=half)

    steps = {"float32": eager_float32, "bfloat16": eager_bfloat16}
    if DEVICE.type == "cuda":
        torch._dynamo.reset()
        steps["compiled"] = torch.compile(eager_bfloat16, dynamic=True)
    return steps


def compare(side, rows):
    """Check and time one scale at every M; append the rows of the table to ``rows``."""
    bandwidth, rate = peaks()
    _, codebook, f_hat, phi = case(DEVICE, side, SIZE, B=B, M=1, V=V, C=C)
    others = peers(side, codebook, f_hat, phi)
    for M in CANDIDATES:
        tokens = torch.randint(0, V, (B, M, side * side), device=DEVICE)

        def ours(tokens=tokens):
            return fuse_tokens(
                tokens, codebook, side=side, size=SIZE, f_hat=f_hat, phi=phi, dtype=torch.bfloat16, channels_last=True
            )

        exact = chain(tokens[:, :1], codebook, side, SIZE, f_hat, phi)
        error = ((ours()[:, :1].double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-2, f"side {side}, M={M}: relative error {error}"
        moved, operations = work(side, M)
        times = {"ours": seconds(ours)}
        for name, step in others.items():
            times[name] = seconds(lambda step=step: step(tokens))  # noqa: B023
        rows.append({"M": M, "side": side, "bytes": moved, "operations": operations, "error": error, **times})
        rows[-1]["floor"] = max(moved / bandwidth, operations / rate)
        rows[-1]["bound"] = "bytes" if moved / bandwidth > operations / rate else "ops"


def print_table(rows):
    names = [name for name in ("float32", "bfloat16", "compiled") if name in rows[0]]
    heads = [
        f"{'M':>4} {'side':>4}",
        f"{'MB':>6} {'Gop':>6} {'floor us':>8} by   ",
        f"{'ours us':>8} {'GB/s':>5} x floor",
    ]
    print("\n" + " | ".join(heads + [f"{name + ' us':>11}     x" for name in names]))
    for M in CANDIDATES:
        of_m = [row for row in rows if row["M"] == M]
        keys = ("bytes", "operations", "floor", "ours", *names)
        total = {"M": M, "side": "all", "bound": "", **{key: sum(row[key] for row in of_m) for key in keys}}
        for row in (*of_m, total):
            cells = [
                f"{row['M']:>4} {row['side']:>4}",
                f"{row['bytes'] / 1e6:6.1f} {row['operations'] / 1e9:6.1f} {row['floor'] * 1e6:8.1f} {row['bound']:<5}",
                f"{row['ours'] * 1e6:8.1f} {row['bytes'] / row['ours'] / 1e9:5.0f} {row['ours'] / row['floor']:7.2f}",
            ]
            print(" | ".join(cells + [f"{row[name] * 1e6:11.1f} {row[name] / row['ours']:5.1f}" for name in names]))


def test_scales(benchmark):
    rows = []
    with torch.no_grad(), use_backend("triton"):
        for side in SIDES:
            compare(side, rows)
        print_table(rows)
        print(f"largest relative error {max(row['error'] for row in rows):.1e}; torch {torch.__version__}, {peaks()}")
        generation = generation_of_candidates(CANDIDATES[-1])
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(generation, rounds=1 if TINY else 20, warmup_rounds=1)


def generation_of_candidates(M):
    """A function that computes F(.) of all candidates of one generation and waits for the device."""
    cases = [(side, *case(DEVICE, side, SIZE, B=B, M=M, V=V, C=C)) for side in SIDES]

    def run():
        for side, tokens, codebook, f_hat, phi in cases:
            fuse_tokens(
                tokens, codebook, side=side, size=SIZE, f_hat=f_hat, phi=phi, dtype=torch.bfloat16, channels_last=True
            )
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def unpatched_step(tokens, f_hat, codebook, side, next_side, phi):
    """The published quantizer's step after a scale: add the map's features, and pool the next scale's input."""
    weight, bias, blend = phi
    x = F.embedding(tokens, codebook).transpose(1, 2).reshape(B, C, side, side)
    if side != SIZE:
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic")
    f_hat.add_(x.mul(1 - blend) + F.conv2d(x, weight, bias, padding=1).mul_(blend))
    return f_hat if next_side is None else F.interpolate(f_hat, size=(next_side, next_side), mode="area")


def winner_step(tokens, f_hat, codebook, side, next_side, phi):
    commit_tokens(tokens, f_hat, codebook, side=side, phi=phi)
    return f_hat if next_side is None else resize_features(f_hat, size=next_side, channels_last=True)


def test_winner():
    """Two launches per scale compared with the unpatched step, in float32: device time and wall-clock time."""
    print("\nside | commit + resize us | unpatched us    x | wall-clock us | unpatched us    x")
    sums = [0.0] * 4
    with torch.no_grad(), use_backend("triton"):
        for side, next_side in zip(SIDES, (*SIDES[1:], None), strict=True):
            tokens, codebook, f_hat, phi = case(DEVICE, side, SIZE, B=B, M=1, V=V, C=C)
            given = (tokens[:, 0], f_hat, codebook, side, next_side, phi)
            steps = [functools.partial(step, *given) for step in (winner_step, unpatched_step)]
            found = [measure(step) for measure in (seconds, wall_seconds) for step in steps]
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            print_winner(side, found)
    print_winner("all", sums)


def print_winner(side, found):
    ours, theirs, wall, their_wall = (1e6 * t for t in found)
    print(
        f"{side:>4} | {ours:18.1f} | {theirs:12.1f} {theirs / ours:4.1f} | "
        f"{wall:13.1f} | {their_wall:12.1f} {their_wall / wall:4.1f}"
    )
