"""M draws from one read of the logits, compared with other samplers, per scale.

    python -m pytest bench/test_sampling.py -q -s       # prints the tables; under ninety seconds on one GPU
    VARKERN_BENCH_TINY=1 ...                            # a rehearsal of two small scales in the interpreter

The work: VAR at 256 px, 24 images, guidance, float32 logits of 4096 tokens, top_k=900, top_p=0.96, M in 1, 4, 32, 128.
The peers: VAR's published chain once per candidate ("chain"), the same with one ``multinomial(num_samples=M)``
("once"), the latter under ``torch.compile``, and flashinfer if it is installed, which samples by rejection and must be
called once per candidate. The floor is one read of the logits of both halves. ``graph`` is device time from a CUDA
graph; ``call`` and the peers are plain calls, launches included.
"""

import importlib.util
import math
import time

import pytest
import torch

from bench.measure import (
    BATCH,
    DEVICE,
    RATES,
    SIDES,
    TINY,
    Table,
    bar,
    call_seconds,
    graph_seconds,
    synchronize,
)
from varkern.ops import sample_tokens
from varkern.ops.backend import use_backend
from varkern.ops.philox import image_seeds
from varkern.published import filter_logits, sample_multinomial

CANDIDATES = (1, 4) if TINY else (1, 4, 32, 128)
V, B = (300 if TINY else 4096), BATCH
GUIDANCE, TOP_K, TOP_P = 1.5, (60 if TINY else 900), 0.96


def host_seconds(step, calls=200):
    """Host time of a call, from calls that take less time on the device than on the host."""
    step()
    synchronize()
    start = time.perf_counter()
    for _ in range(2 if TINY else calls):
        step()
    taken = time.perf_counter() - start
    synchronize()
    return taken / (2 if TINY else calls)


def logits_of(length):
    """Logits of both halves in one tensor [2B, l, V]; their standard deviation is that of a trained VAR, about 2.5."""
    both = torch.randn(2 * B, length, V, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(length)) * 2.5
    both[B:] = 0.8 * both[:B] + 0.6 * both[B:]  # the unconditional half follows the conditional one
    return both


def published(both, num_candidates):
    filtered = filter_logits((1 + GUIDANCE) * both[:B] - GUIDANCE * both[B:], TOP_K, TOP_P)
    return sample_multinomial(filtered, num_candidates)


def flashinfer_once(both):
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    guided = (1 + GUIDANCE) * both[:B] - GUIDANCE * both[B:]
    return top_k_top_p_sampling_from_logits(guided.flatten(0, 1), TOP_K, TOP_P, filter_apply_order="top_k_first")


def peers(compiled):
    """{name: step(both, M)}."""

    def chain(both, num_candidates):
        return [published(both, 1) for _ in range(num_candidates)]

    steps = {"chain": chain, "once": published}
    if compiled is not None:
        steps["compiled"] = compiled
    if importlib.util.find_spec("flashinfer"):
        steps["flashinfer"] = lambda both, m: [flashinfer_once(both) for _ in range(m)]
    for name in list(steps):
        try:
            steps[name](logits_of(1), 1)
        except Exception as error:  # such as a peer that does not compile here; the others are timed
            print(f"\nleft out: {name}, {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            del steps[name]
    return steps


def print_bars(rows, names):
    """Print the bars of the largest scale and of all cells, and whether they were met."""
    largest = {row["M"]: row for row in rows if row["l"] == rows[-1]["l"]}
    for m in (1, 4):
        bar(f"M={m}, over the floor", largest[m]["x floor"], 2)
    for m, least in ((1, 10), (32, 50)):
        if m in largest:
            bar(f"M={m}, times of the chain over ours", largest[m].get("chain x", math.nan), least, at_most=False)
    last, first = largest[CANDIDATES[-1]], largest[CANDIDATES[0]]
    bar(f"M={last['M']} over M={first['M']}", last["graph us"] / first["graph us"], 3)
    bar("every peer over ours, the least", min(row[f"{n} x"] for row in rows for n in names), 1, at_most=False)


def test_scales(benchmark):
    steps = peers(torch.compile(published, dynamic=True) if DEVICE.type == "cuda" else None)
    rows, table, seeds = [], Table(), image_seeds(0, B, DEVICE)
    options = {"guidance": GUIDANCE, "top_k": TOP_K, "top_p": TOP_P, "seeds": seeds}
    with torch.no_grad(), use_backend("triton"):
        for m in CANDIDATES:
            for side in SIDES:
                both = logits_of(side * side)

                def ours(both=both, m=m):
                    return sample_tokens(both[:B], m, uncond_logits=both[B:], **options)

                row = {"M": m, "l": side * side, **timed(ours, both.numel() * 4), "call us": call_seconds(ours) * 1e6}
                for name, step in steps.items():
                    theirs = call_seconds(lambda step=step: step(both, m)) * 1e6  # noqa: B023
                    row |= {f"{name} us": theirs, f"{name} x": theirs / row["call us"]}
                rows.append(row)
                table.add(row)
        small = logits_of(1)
        print(f"host time of a call: {host_seconds(lambda: ours(small, 4)) * 1e6:.1f} us")
        print_bars(rows, steps)
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(lambda: (ours(), synchronize()), rounds=1 if TINY else 20, warmup_rounds=1)


def timed(step, moved):
    """Columns of the device time of a step that must move ``moved`` bytes."""
    taken, floor = graph_seconds(step), moved / RATES.bandwidth
    row = {"MB": moved / 1e6, "floor us": floor * 1e6, "graph us": taken * 1e6}
    return row | {"GB/s": moved / taken / 1e9, "x floor": taken / floor}


VOCABULARIES = (2, 300) if TINY else (2, 256, 4096, 8912, 16384, 65536, 262144)


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "unfiltered"])
def test_vocabularies(filtered):
    """Device time over the floor for other vocabularies, without guidance, for about 200 MB of logits."""
    table, options = Table(), {"top_k": TOP_K if filtered else 0, "top_p": TOP_P if filtered else 0.0}
    with torch.no_grad(), use_backend("triton"):
        for vocab in VOCABULARIES:
            length = max(1, (2**10 if TINY else 5 * 2**20) // max(vocab, 32))
            logits = torch.randn(2 if TINY else 10, length, vocab, device=DEVICE) * 2
            seeds = image_seeds(0, len(logits), DEVICE)
            for m in (1, 16):
                step = lambda: sample_tokens(logits, m, seeds=seeds, **options)  # noqa: B023, E731
                table.add({"V": vocab, "rows": logits.numel() // vocab, "M": m, **timed(step, logits.numel() * 4)})
