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

import torch
import torch.nn.functional as F
from varkern.kernels.fusion import multiplies

from bench.measure import DEVICE, RATES, TINY, Table, call_seconds, graph_seconds, synchronize
from tests.references.fusion import SIDES_256, case, chain
from varkern.ops import commit_tokens, fuse_tokens, resize_features
from varkern.ops.backend import use_backend
from varkern.ops.fusion_tables import TILE, tile_inputs

SIDES, SIZE, C, V = ((2, 4), 4, 8, 64) if TINY else (SIDES_256, 16, 32, 4096)
B, CANDIDATES = (2, (1, 2)) if TINY else (24, (1, 4, 32, 128))


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


def fuse(tokens, codebook, side, f_hat, phi):
    options = {"side": side, "size": SIZE, "f_hat": f_hat, "phi": phi}
    return fuse_tokens(tokens, codebook, dtype=torch.bfloat16, channels_last=True, **options)


def compare(side, table):
    """Check and time one scale at every M; returns the rows of the table."""
    _, codebook, f_hat, phi = case(DEVICE, side, SIZE, B=B, M=1, V=V, C=C)
    others, rows = peers(side, codebook, f_hat, phi), []
    for M in CANDIDATES:
        tokens = torch.randint(0, V, (B, M, side * side), device=DEVICE)
        ours = functools.partial(fuse, tokens, codebook, side, f_hat, phi)
        exact = chain(tokens[:, :1], codebook, side, SIZE, f_hat, phi)
        error = ((ours()[:, :1].double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-2, f"side {side}, M={M}: relative error {error}"
        moved, operations = work(side, M)
        floor, taken = max(moved / RATES.bandwidth, operations / RATES.half), graph_seconds(ours)
        row = {"side": side, "M": M, "MB": moved / 1e6, "Gop": operations / 1e9, "floor us": floor * 1e6}
        row |= {"ours us": taken * 1e6, "GB/s": moved / taken / 1e9, "x floor": taken / floor}
        for name, step in others.items():
            theirs = graph_seconds(functools.partial(step, tokens))
            row |= {f"{name} us": theirs * 1e6, f"{name} x": theirs / taken}
        rows.append(row)
        table.add(row)
    return rows


def test_scales(benchmark):
    table = Table()
    with torch.no_grad(), use_backend("triton"):
        rows = [row for side in SIDES for row in compare(side, table)]
        for M in CANDIDATES:
            print_sum(f"all sides, M={M}", [row for row in rows if row["M"] == M])
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(generation_of_candidates(CANDIDATES[-1]), rounds=1 if TINY else 20, warmup_rounds=1)


def print_sum(title, rows):
    """Print the sum of every column of times."""
    sums = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith(" us")}
    Table().add({"": title, **sums})


def generation_of_candidates(M):
    """A function that computes F(.) of all candidates of one generation and waits for the device."""
    cases = [(side, *case(DEVICE, side, SIZE, B=B, M=M, V=V, C=C)) for side in SIDES]

    def run():
        for side, tokens, codebook, f_hat, phi in cases:
            fuse(tokens, codebook, side, f_hat, phi)
        synchronize()

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
    rows, table = [], Table()
    with torch.no_grad(), use_backend("triton"):
        for side, next_side in zip(SIDES, (*SIDES[1:], None), strict=True):
            tokens, codebook, f_hat, phi = case(DEVICE, side, SIZE, B=B, M=1, V=V, C=C)
            row = {"side": side}
            for name, step in (("ours", winner_step), ("unpatched", unpatched_step)):
                call = functools.partial(step, tokens[:, 0], f_hat, codebook, side, next_side, phi)
                row |= {f"{name} us": graph_seconds(call) * 1e6, f"{name} call us": call_seconds(call) * 1e6}
            rows.append(row)
            table.add(row)
    print_sum("all sides", rows)
