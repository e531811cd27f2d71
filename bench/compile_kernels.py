"""Compile the kernels of the generation benchmark on all cores, before any stage is timed.

    python -m bench.compile_kernels

This runs every cell of ``bench/test_generation.py`` with a transformer of one narrow block, because no launch depends
on the transformer's depth and width. Each launch only compiles its kernel, into Triton's cache on disk. Only PyTorch's
own kernels run, on uninitialized results. Several processes go through all launches, and each compiles its share;
threads would not help, because Triton's compiler holds Python's lock. The number of compiled variants and the seconds
per kernel are printed, and the failures (exit code 1).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

import varkern
from varkern.models import VAR, VQVAE
from varkern.scorer import Scorer


def launch_all(device: torch.device, batches: Iterable[int], candidates: Iterable[int], sampling: dict) -> None:
    """Launch all kernels of generations of the published sizes."""
    with torch.device(device):
        vae = VQVAE(ch=32)
        var = VAR(vae, depth=1, embed_dim=64, num_heads=1).eval().requires_grad_(False)
    scorer = Scorer().to(device, torch.bfloat16).eval().requires_grad_(False)
    for batch in batches:
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        searches = [varkern.BestOfM(scorer, m=m) if m > 1 else None for m in candidates]
        for search in [*searches, varkern.BlockResample(scorer, blocks=lambda scale, side: side)]:
            with torch.inference_mode():
                varkern.generate(var, labels, search=search, seeds=0, decode=False, **sampling)


def compile_share(launches: Callable[[], None], share: int, shares: int) -> list[tuple[str, float, str]]:
    """Call ``launches``, but compile every ``shares``-th kernel from number ``share`` on instead of running it.

    Returns:
        name, seconds and error (empty: none) of each compiled kernel.
    """
    from triton.runtime.jit import JITFunction

    run, compile_one, seen, done = JITFunction.run, JITFunction._do_compile, {}, []

    def only_compile(self, *arguments, grid, warmup, **options):
        run(self, *arguments, grid=grid, warmup=True, **options)

    def compile_own(self, key, *rest):
        place = seen.setdefault((self.__name__, key), len(seen))
        if place % shares != share or place in compiled:
            return None
        compiled.add(place)
        began, error = time.perf_counter(), ""
        try:
            return compile_one(self, key, *rest)
        except Exception as raised:
            error = f"{type(raised).__name__}: {(str(raised).strip().splitlines() or [''])[-1]}"
        finally:
            done.append((self.__name__, time.perf_counter() - began, error))

    compiled: set[int] = set()
    JITFunction.run, JITFunction._do_compile = only_compile, compile_own
    try:
        launches()
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_one
    return done


def main(arguments: list[str]) -> int:
    from bench.test_generation import BATCHES, CANDIDATES, CUDA, DEVICE, SAMPLING

    if not CUDA:
        print("no GPU: nothing to compile")
        return 0
    if arguments:
        share, shares = map(int, arguments)
        for result in compile_share(lambda: launch_all(DEVICE, BATCHES, CANDIDATES, SAMPLING), share, shares):
            print("\t".join(map(str, result)))
        return 0
    began, shares = time.perf_counter(), min(16, os.cpu_count() or 1)
    command = [sys.executable, "-m", "bench.compile_kernels"]
    started = [
        subprocess.Popen([*command, str(i), str(shares)], stdout=subprocess.PIPE, text=True) for i in range(shares)
    ]
    outputs = [process.communicate()[0] for process in started]
    results = [line.split("\t") for output in outputs for line in output.splitlines() if line.count("\t") == 2]
    counts, seconds = Counter(name for name, *_ in results), Counter()
    for name, taken, _ in results:
        seconds[name] += float(taken)
    for name, count in counts.most_common():
        print(f"{count:4d} {name}: {seconds[name]:.1f} s")
    wall = time.perf_counter() - began
    print(f"{counts.total()} kernels, {seconds.total():.0f} s of compiling, by {shares} processes in {wall:.0f} s")
    failed = [f"failed kernel: {name}: {error}" for name, _, error in results if error]
    failed += [f"process {i} ended with {p.returncode}" for i, p in enumerate(started) if p.returncode]
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
