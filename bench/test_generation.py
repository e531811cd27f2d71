"""Whole generations, patched and unpatched, timed in the same run.

    python -m pytest bench/test_generation.py -q -s                     # on a GPU: under four minutes
    python -m pytest bench/test_generation.py -q -s --upstream DIR      # also times the published class of a checkout
    VARKERN_BENCH_TINY=1 ...                                            # a rehearsal with tiny models

On a GPU: VAR of the published sizes with random weights, d16 to d30, B in 1, 8, 24, M in 1, 4, 16, 128, guidance,
top_k=900, top_p=0.96, float16 autocast and float32 weights, as users call it. From the second scale on, a bfloat16
scorer chooses the best of M. On a CPU: depth 8, two images, M in 1, 4. The baseline is the published loop: eager
sampling of every scale, caches that grow by concatenation, PyTorch's fused attention.

In a cell, all ways of generating take turns, alternately in both orders, so that clocks and heat affect all of them.
The time of a generation is measured on the host, from an idle device to an idle device. The first generation of each
way is not timed, because it compiles and captures; its peak memory is measured.

A cell of its own times block resampling beside best-of-M with the same number of scored maps at every scale.

``$VARKERN_BENCH_OUT`` (default: the working folder) gets blocks.json, generation.json and parts.json, which are written
after every cell. The cells that have bars come first: 24 images, then one image, of d16 and d30. If a cell fails, its
error is printed and the other cells run.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
import traceback
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import varkern
from bench.blame import find_kernel
from bench.measure import BATCH, DEVICE, TINY, Table, device_name, synchronize
from bench.models import as_published, random_models, upstream_model
from bench.parts import timing_parts
from varkern.ops.backend import use_backend

CUDA = DEVICE.type == "cuda"
DEPTHS = (2,) if TINY else (16, 30, 20, 24) if CUDA else (8,)
BATCHES = (2,) if TINY or not CUDA else (BATCH, 1, 8)
CANDIDATES = (1, 4) if TINY or not CUDA else (1, 4, 128, 16)
SAMPLING = {"cfg": 1.5, "top_k": 20 if TINY else 900, "top_p": 0.96}
BUDGET = 0.0 if TINY else 0.9 if CUDA else 60.0  # seconds per way of generating and cell
LEAST, MOST = (1, 1) if TINY else (3, 15)
METHOD = "autoregressive_infer_cfg"
OUT = Path(os.environ.get("VARKERN_BENCH_OUT", "."))


@pytest.fixture(autouse=True)
def plain_forms_on_a_cpu():
    with use_backend("auto" if CUDA else "torch"):
        yield


def autocast():
    return torch.autocast("cuda", torch.float16) if CUDA else nullcontext()


def generate(model, batch, seed):
    labels = torch.arange(batch, device=DEVICE) % model.num_classes
    with torch.inference_mode(), autocast():
        images = model.autoregressive_infer_cfg(batch, labels, g_seed=seed, **SAMPLING)
    synchronize()
    return images


def timed(model, batch, seed):
    start = time.perf_counter()
    generate(model, batch, seed)
    return time.perf_counter() - start


def own_bytes(*modules):
    """Bytes of all weights and buffers; shared ones count once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def peak_bytes(model, scorer, batch):
    """Peak memory of one generation: its models and its allocations, without anything else on the device."""
    if not CUDA:
        generate(model, batch, 0)
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(model, batch, 0)
    return torch.cuda.max_memory_allocated() - before + own_bytes(model, model.vae_proxy[0], scorer)


def taking_turns(ways, batch):
    """{name: sorted seconds} of ways to generate, each a (model, context) pair, which take turns."""
    times = {name: [] for name in ways}
    for seed in range(1, MOST + 1):
        for name, (model, context) in list(ways.items())[:: 1 if seed % 2 else -1]:
            with context():
                times[name].append(timed(model, batch, seed))
        if seed >= LEAST and max(map(sum, times.values())) > BUDGET:
            break
    return {name: sorted(found) for name, found in times.items()}


def capture(var, search):
    """A context in which ``var`` replays captured generations. All contexts share one patch and so its captures."""
    varkern.patch(var, search, cuda_graph=True)
    method = vars(var)[METHOD]
    varkern.unpatch(var)

    @contextmanager
    def patched():
        vars(var)[METHOD] = method
        try:
            yield var
        finally:
            del vars(var)[METHOD]

    return patched


def ways_of(var, scorer, m, upstream):
    """The baseline and the patched ways for ``m`` candidates."""
    search = varkern.BestOfM(scorer, m=m) if m > 1 else None
    ways = {"published": (var, partial(as_published, var)), "patched": (var, partial(varkern.patched, var, search))}
    if CUDA:
        ways["graph"] = (var, capture(var, search))
    if upstream is not None:
        ways["upstream"] = (upstream, nullcontext)
        ways["upstream patched"] = (upstream, partial(varkern.patched, upstream, search))
    return ways


def cell(depth, batch, m, folder):
    var, scorer, upstream = models(depth, folder)
    ways, peaks = ways_of(var, scorer, m, upstream), {}
    for name, (model, context) in ways.items():
        with context():
            peaks[name] = peak_bytes(model, scorer, batch)
    return {"depth": depth, "B": batch, "M": m, "seconds": taking_turns(ways, batch), "peak": peaks}


@cache
def models(depth, folder):
    var, scorer = random_models(depth, DEVICE, small=TINY)
    return var, scorer, upstream_model(folder, var) if folder else None


def in_order(depths):
    """(depth, B, M) of all cells. Those of the first two depths, two batch sizes and three M come first."""
    cells = [(depth, batch, m) for batch in BATCHES for depth in depths for m in CANDIDATES]

    def is_core(cell):
        depth, batch, m = cell
        return depth in depths[:2] and batch in BATCHES[:2] and m in CANDIDATES[:3]

    return sorted(cells, key=is_core, reverse=True)  # the sort is stable


def parts_of(depth, batch, m, folder=None):
    var, scorer, _ = models(depth, folder)
    search = varkern.BestOfM(scorer, m=m) if m > 1 else None
    with varkern.patched(var, search):
        generate(var, batch, 0)
        with timing_parts(var, DEVICE) as seconds:
            generate(var, batch, 1)
    return dict(seconds)


def print_row(row, table):
    base = statistics.median(row["seconds"]["published"])
    cells = {"depth": row["depth"], "B": row["B"], "M": row["M"]}
    for name, times in row["seconds"].items():
        cells |= {f"{name} ms": statistics.median(times) * 1e3, f"{name} x": statistics.median(times) / base}
        if row["peak"].get(name) is not None:
            cells[f"{name} GiB"] = row["peak"][name] / 2**30
    table.add(cells)


def write(rows, parts, finished):
    """Write the results so far; a run that is stopped leaves complete files."""
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    versions |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    content = {"device": device_name(), **versions, "sampling": SAMPLING, "finished": finished, "rows": rows}
    OUT.mkdir(parents=True, exist_ok=True)
    for name, saved in (("generation.json", content), ("parts.json", parts)):
        unfinished = OUT / f"{name}.partial"
        unfinished.write_text(json.dumps(saved, indent=1) + "\n")
        unfinished.replace(OUT / name)


def attempt(what, failures, do, *arguments):
    """``do(*arguments)``, or None if it fails; then the error, and the kernel if a launch failed, are printed."""
    try:
        return do(*arguments)
    except Exception as error:
        traceback.print_exc()
        kernel = find_kernel(error.__traceback__)
        if kernel is not None:
            print(f"failed kernel: {kernel}, in {what}", flush=True)
        failures.append(f"{what}: {type(error).__name__}: {error}")
        return None


def blocks_cell(depth, batch):
    """Block resampling beside best-of-M with as many scored maps at every scale."""
    var, scorer, _ = models(depth, None)
    blocks = varkern.BlockResample(scorer)
    grids = [(side, side) for side in var.patch_nums]
    scored = [blocks.num_scored(k, grid) if k >= blocks.first_scale else 1 for k, grid in enumerate(grids)]
    best = varkern.BestOfM(scorer, m=scored, pick="resample")
    ways = {}
    for name, search in (("best of M", best), ("blocks", blocks)):
        ways[name] = (var, partial(varkern.patched, var, search))
        if CUDA:
            ways[f"{name}, graph"] = (var, capture(var, search))
    for model, context in ways.values():
        with context():
            generate(model, batch, 0)
    return {"depth": depth, "B": batch, "M": scored, "seconds": taking_turns(ways, batch)}


def test_blocks_beside_best_of_m():
    """A block's maps depend on the choice before, so they are scored few at a time; this is what that costs."""
    table, rows = Table(), []
    print(f"\n{device_name()}, torch {torch.__version__}; x: time of blocks / time of best-of-M, equal scored maps")
    for batch in BATCHES[:2]:
        row = blocks_cell(DEPTHS[0], batch)
        rows.append(row)
        cells = {"depth": row["depth"], "B": batch, "maps": sum(row["M"])}
        for kind in ("", ", graph") if CUDA else ("",):
            best, blocks = (statistics.median(row["seconds"][name + kind]) for name in ("best of M", "blocks"))
            cells |= {f"best of M{kind} ms": best * 1e3, f"blocks{kind} ms": blocks * 1e3, f"x{kind}": blocks / best}
        table.add(cells)
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "blocks.json").write_text(json.dumps(rows, indent=1) + "\n")


def test_generations(benchmark, request):
    chosen = request.config.getoption("--depths")
    depths = tuple(int(part) for part in chosen.split(",")) if chosen else DEPTHS
    folder = request.config.getoption("--upstream")
    rows, parts, failures, table = [], {}, [], Table()
    print(f"\n{device_name()}, torch {torch.__version__}; x: time / median time of the published loop")
    for key in in_order(depths):
        row = attempt("d{} B={} M={}".format(*key), failures, cell, *key, folder)
        if row is not None:
            rows.append(row)
            print_row(row, table)
            write(rows, parts, finished=False)
    for row in rows:
        key = row["depth"], row["B"], row["M"]
        name = "d{} B={} M={}".format(*key)
        found = attempt(f"the parts of {name}", failures, parts_of, *key, folder)
        if found is not None:
            parts[name] = found
            write(rows, parts, finished=False)
    write(rows, parts, finished=not failures)
    assert not failures, "\n".join(failures)
    var, scorer, _ = models(depths[0], folder)
    with varkern.patched(var, varkern.BestOfM(scorer, m=max(CANDIDATES))):
        benchmark.pedantic(lambda: generate(var, max(BATCHES), 0), rounds=1 if TINY else 3)
    for row in rows:
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)


@pytest.mark.parametrize("m", CANDIDATES)
def test_the_parts_make_up_the_generation(m):
    """Every part is timed, and no time is negative."""
    parts = parts_of(DEPTHS[0], BATCHES[0], m)
    assert {"blocks", "head", "sampler", "winner", "decoder"} <= set(parts)
    assert min(parts.values()) >= 0
    assert ("scorer" in parts and "F" in parts) == (m > 1)
