"""Whole generations, patched against unpatched, side by side in one run: the figures that count.

    python -m pytest bench/test_generation.py -q -s                     # on a GPU: under four minutes
    python -m pytest bench/test_generation.py -q -s --upstream DIR      # and the published class from a checkout
    VARKERN_BENCH_TINY=1 ...                                            # tiny models: a rehearsal, times mean nothing

On a GPU: VAR of the published sizes with random weights, d16 to d30, B in 1, 8, 24, M in 1, 4, 16, 128, guidance,
top_k=900, top_p=0.96, float16 autocast, weights in float32, as users call it; from the second scale on the best of M by
a bfloat16 scorer. On a CPU: depth 8, two images, M in 1, 4. The baseline is the published loop: eager sampling of every
scale, caches that grow by concatenation, PyTorch's fused attention. Baseline and patched generations take turns, so
that what slows one slows the other. ``$VARKERN_BENCH_OUT`` (default: the working folder) gets generation.json and
parts.json, which hold what is done so far after every cell; the cells that bars are set for come first.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import varkern
from bench.measure import device_name, synchronize
from bench.models import as_published, random_models, upstream_model
from bench.parts import timing_parts

TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
DEPTHS = (2,) if TINY else (16, 30, 20, 24) if CUDA else (8,)
BATCHES = (2,) if TINY or not CUDA else (24, 1, 8)
CANDIDATES = (1, 4) if TINY or not CUDA else (1, 4, 128, 16)
SAMPLING = {"cfg": 1.5, "top_k": 20 if TINY else 900, "top_p": 0.96}
BUDGET = 0.0 if TINY else 0.9 if CUDA else 60.0  # seconds a way of generating gets in each cell
LEAST, MOST = (1, 1) if TINY else (3, 15)
OUT = Path(os.environ.get("VARKERN_BENCH_OUT", "."))


def autocast():
    return torch.autocast("cuda", torch.float16) if CUDA else nullcontext()


def generate(model, batch, seed):
    labels = torch.arange(batch, device=DEVICE) % model.num_classes
    with torch.inference_mode(), autocast():
        images = model.autoregressive_infer_cfg(batch, labels, g_seed=seed, **SAMPLING)
    synchronize(DEVICE)
    return images


def timed(model, batch, seed):
    start = time.perf_counter()
    generate(model, batch, seed)
    return time.perf_counter() - start


def peak_bytes(model, batch):
    if not CUDA:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    generate(model, batch, 0)
    return torch.cuda.max_memory_allocated()


def taking_turns(ways, batch):
    """{name: sorted seconds} of ways to generate, each a (model, context) pair, one after the other in every round."""
    times = {name: [] for name in ways}
    for model, context in ways.values():
        with context():
            generate(model, batch, 0)
    for seed in range(1, MOST + 1):
        for name, (model, context) in ways.items():
            with context():
                times[name].append(timed(model, batch, seed))
        if seed >= LEAST and max(map(sum, times.values())) > BUDGET:
            break
    return {name: sorted(found) for name, found in times.items()}


def ways_of(var, scorer, m, upstream):
    """The baseline and the patched ways for ``m`` candidates."""
    search = varkern.BestOfM(scorer, m=m) if m > 1 else None
    ways = {"published": (var, lambda: as_published(var)), "patched": (var, lambda: varkern.patched(var, search))}
    if upstream is not None:
        ways["upstream"] = (upstream, nullcontext)
        ways["upstream patched"] = (upstream, lambda: varkern.patched(upstream, search))
    return ways


def graph_way(var, scorer, m, batch):
    """Times of the captured generation, which stays patched between calls, and the peak while it is captured.

    A replay allocates nothing but copies of what it wrote, so that its own peak would leave the graph's memory out.
    """
    search = varkern.BestOfM(scorer, m=m) if m > 1 else None
    varkern.patch(var, search, cuda_graph=True)
    try:
        peak = peak_bytes(var, batch)
        times = []
        for seed in range(1, MOST + 1):
            times.append(timed(var, batch, seed))
            if seed >= LEAST and sum(times) > BUDGET:
                break
        return sorted(times), peak
    finally:
        varkern.unpatch(var)


def cell(var, scorer, batch, m, upstream):
    ways = ways_of(var, scorer, m, upstream)
    row = {"depth": var.depth, "B": batch, "M": m, "seconds": taking_turns(ways, batch), "peak": {}}
    for name, (model, context) in ways.items():
        with context():
            row["peak"][name] = peak_bytes(model, batch)
    if CUDA:
        row["seconds"]["graph"], row["peak"]["graph"] = graph_way(var, scorer, m, batch)
    return row


def parts_of(var, scorer, batch, m):
    search = varkern.BestOfM(scorer, m=m) if m > 1 else None
    with varkern.patched(var, search):
        generate(var, batch, 0)
        with timing_parts(var, DEVICE) as seconds:
            generate(var, batch, 1)
    return dict(seconds)


def print_row(row):
    base = statistics.median(row["seconds"]["published"])
    cells = []
    for name, times in row["seconds"].items():
        median, low, high = statistics.median(times), times[0], times[-1]
        peak = row["peak"].get(name)
        memory = "" if peak is None else f" {peak / 2**30:5.2f} GiB"
        cells.append(f"{name} {median * 1e3:8.1f} ms ({low * 1e3:.1f}-{high * 1e3:.1f}) x{median / base:.3f}{memory}")
    print(f"d{row['depth']} B={row['B']:<2} M={row['M']:<3} | " + " | ".join(cells), flush=True)


def write(rows, parts, finished):
    """What is done so far; a run that is cut off leaves whole files."""
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    versions |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    told = {"device": device_name(DEVICE), **versions, "sampling": SAMPLING, "finished": finished, "rows": rows}
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in (("generation.json", told), ("parts.json", parts)):
        unfinished = OUT / f"{name}.partial"
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(OUT / name)


def test_generations(benchmark, request):
    chosen = request.config.getoption("--depths")
    depths = tuple(int(part) for part in chosen.split(",")) if chosen else DEPTHS
    folder = request.config.getoption("--upstream")
    rows, parts = [], {}
    print(f"\n{device_name(DEVICE)}, torch {torch.__version__}; times over the published loop's median")
    for depth in depths:
        var, scorer = random_models(depth, DEVICE, small=TINY)
        upstream = upstream_model(folder, var) if folder else None
        for batch in BATCHES:
            for m in CANDIDATES:
                rows.append(cell(var, scorer, batch, m, upstream))
                print_row(rows[-1])
                parts[f"d{depth} B={batch} M={m}"] = parts_of(var, scorer, batch, m)
                write(rows, parts, finished=False)
        last = var, scorer
    write(rows, parts, finished=True)
    with varkern.patched(last[0], varkern.BestOfM(last[1], m=max(CANDIDATES))):
        benchmark.pedantic(lambda: generate(last[0], max(BATCHES), 0), rounds=1 if TINY else 3)
    for row in rows:
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)


@pytest.mark.parametrize("m", CANDIDATES)
def test_the_parts_make_up_the_generation(m):
    """No part is negative, and together they are most of a generation's time."""
    var, scorer = random_models(DEPTHS[0], DEVICE, small=TINY)
    parts = parts_of(var, scorer, BATCHES[0], m)
    assert {"blocks", "head", "sampler", "winner", "decoder"} <= set(parts)
    assert min(parts.values()) >= 0
    assert ("scorer" in parts and "F" in parts) == (m > 1)
