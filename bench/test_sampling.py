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
import os
import statistics
import time

import pytest
import torch

TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
if TINY and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402

from bench import measure  # noqa: E402
from varkern.ops import sample_tokens  # noqa: E402
from varkern.ops.backend import use_backend  # noqa: E402
from varkern.ops.philox import image_seeds  # noqa: E402
from varkern.published import filter_logits, sample_multinomial  # noqa: E402

SIDES, CANDIDATES = ((1, 2), (1, 4)) if TINY else ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 4, 32, 128))
V, B = (300, 2) if TINY else (4096, 24)
GUIDANCE, TOP_K, TOP_P = 1.5, (60 if TINY else 900), 0.96
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bandwidth():
    rates = measure.rates_of(DEVICE)
    return rates.bandwidth if rates else float("nan")


def wait():
    measure.synchronize(DEVICE)


def call_seconds(step):
    """Median seconds of a plain call, launches included."""
    return statistics.median(measure.call_seconds(step, DEVICE, *((0, 1) if TINY else (0.15, 3))))


def graph_seconds(step, repeats=10):
    return measure.graph_seconds(step, DEVICE, repeats)


def host_seconds(step, calls=200):
    """Host time of a call, from calls that take less time on the device than on the host."""
    step()
    wait()
    start = time.perf_counter()
    for _ in range(2 if TINY else calls):
        step()
    taken = time.perf_counter() - start
    wait()
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


def print_row(row, names):
    cells = [
        f"{row['M']:>4} {row['l']:>4} {row['bytes'] / 1e6:6.1f} {row['floor'] * 1e6:8.1f}",
        f"{row['graph'] * 1e6:9.1f} {row['bytes'] / row['graph'] / 1e9:5.0f} {row['graph'] / row['floor']:7.2f}",
        f"{row['call'] * 1e6:8.1f}",
        *(f"{row[name] * 1e6:13.1f} {row[name] / row['call']:6.1f}" for name in names),
    ]
    print(" | ".join(cells), flush=True)


def print_bars(rows, names):
    """Print the bars of the largest scale and of all cells, and whether they were met."""
    largest = {row["M"]: row for row in rows if row["l"] == rows[-1]["l"]}
    bars = [(f"M={m}: at most 2 x the floor", largest[m]["graph"] / largest[m]["floor"], 2.0, True) for m in (1, 4)]
    for m, least in ((1, 10.0), (32, 50.0)):
        if m in largest:
            ratio = largest[m].get("chain", math.nan) / largest[m]["call"]
            bars.append((f"M={m}: at least {least:.0f} x the chain", ratio, least, False))
    last, first = largest[CANDIDATES[-1]], largest[CANDIDATES[0]]
    bars.append((f"M={last['M']}: at most 3 x M={first['M']}", last["graph"] / first["graph"], 3.0, True))
    slowest = min(row[name] / row["call"] for row in rows for name in names)
    bars.append(("every cell: faster than every peer", slowest, 1.0, False))
    for text, came, bar, at_most in bars:
        print(f"{text:<36} {came:7.2f}  {'met' if (came <= bar if at_most else came >= bar) else 'NOT MET'}")


def test_scales(benchmark):
    steps = peers(torch.compile(published, dynamic=True) if DEVICE.type == "cuda" else None)
    heads = [f"{'M':>4} {'l':>4} {'MB':>6} {'floor us':>8}", f"{'graph us':>9} {'GB/s':>5} x floor", f"{'call us':>8}"]
    print("\n" + " | ".join(heads + [f"{name + ' us':>13}      x" for name in steps]))
    rows = []
    seeds = image_seeds(0, B, DEVICE)
    options = {"guidance": GUIDANCE, "top_k": TOP_K, "top_p": TOP_P, "seeds": seeds}
    with torch.no_grad(), use_backend("triton"):
        for m in CANDIDATES:
            for side in SIDES:
                both = logits_of(side * side)

                def ours(both=both, m=m):
                    return sample_tokens(both[:B], m, uncond_logits=both[B:], **options)

                row = {"M": m, "l": side * side, "bytes": both.numel() * 4, "floor": both.numel() * 4 / bandwidth()}
                row |= {"graph": graph_seconds(ours), "call": call_seconds(ours)}
                row |= {name: call_seconds(lambda step=step: step(both, m)) for name, step in steps.items()}  # noqa: B023
                rows.append(row)
                print_row(row, steps)
        small = logits_of(1)
        print(f"host time of a call: {host_seconds(lambda: ours(small, 4)) * 1e6:.1f} us")
        print_bars(rows, steps)
        print(f"torch {torch.__version__}, triton {triton.__version__}")
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(lambda: (ours(), wait()), rounds=1 if TINY else 20, warmup_rounds=1)


VOCABULARIES = (2, 300) if TINY else (2, 256, 4096, 8912, 16384, 65536, 262144)


@pytest.mark.parametrize("tokens_and_filter", ["filtered", "unfiltered"])
def test_vocabularies(tokens_and_filter):
    """Device time over the floor for other vocabularies, without guidance, for about 200 MB of logits."""
    print(f"\n{'V':>7} {'rows':>8} {'M':>4} | {'graph us':>9} {'GB/s':>5} x floor ({tokens_and_filter})")
    top_k, top_p = (TOP_K, TOP_P) if tokens_and_filter == "filtered" else (0, 0.0)
    with torch.no_grad(), use_backend("triton"):
        for vocab in VOCABULARIES:
            length = max(1, (2**10 if TINY else 5 * 2**20) // max(vocab, 32))
            logits = torch.randn(2 if TINY else 10, length, vocab, device=DEVICE) * 2
            seeds = image_seeds(0, len(logits), DEVICE)
            for m in (1, 16):
                taken = graph_seconds(lambda: sample_tokens(logits, m, top_k=top_k, top_p=top_p, seeds=seeds), 3)  # noqa: B023
                moved = logits.numel() * 4
                rate, over = moved / taken / 1e9, taken / (moved / bandwidth())
                print(f"{vocab:>7} {logits.numel() // vocab:>8} {m:>4} | {taken * 1e6:9.1f} {rate:5.0f} {over:7.2f}")
