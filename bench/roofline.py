"""The floor of every part of a generation on a device: the least time that its operations and bytes can take.

    python -m bench.roofline --device H200                       # d16, d20, d24, d30 at 24 images, M in 1, 4, 128
    python -m bench.roofline --device H200 --depth 30 --batch 1 --m 4

The parts are the transformer's blocks, its head, the sampler, F(.) of the candidates, the scorer, the step that keeps
the winner, and the decoder. Every matrix product, convolution and attention must at least do its multiplications, read
its operands once and write its result once. Its floor is the larger of bytes / bandwidth and operations / rate of the
matrix units. A part's floor is the sum over its steps. Norms, activations and residuals count as free, as if they were
fused, so the true floor is slightly higher. Weights and activations are in half precision and logits in float32, as
under float16 autocast with half weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bench.measure import DEVICES, Rates
from varkern.models import VAR, VQVAE
from varkern.scorer import Scorer, ScorerConfig
from varkern.tables import markdown_table

PARTS = ("blocks", "head", "sampler", "F", "scorer", "winner", "decoder")


@dataclass
class Part:
    """Operations and bytes of each step of a part."""

    steps: list[tuple[float, float]] = field(default_factory=list)  # (operations, bytes)

    @property
    def operations(self) -> float:
        return sum(operations for operations, _ in self.steps)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.steps)

    def floor(self, rates: Rates) -> float:
        """The least time in seconds."""
        return sum(max(operations / rates.half, moved / rates.bandwidth) for operations, moved in self.steps)

    def bound(self, rates: Rates) -> str:
        """The cause of more than half of the floor: ``"operations"`` or ``"bytes"``."""
        by_bytes = sum(m / rates.bandwidth for o, m in self.steps if m / rates.bandwidth > o / rates.half)
        return "bytes" if 2 * by_bytes > self.floor(rates) else "operations"


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Tally(TorchFunctionMode):
    """Counts matrix products, convolutions and attentions while it is active; also works on the meta device."""

    def __init__(self, part: Part):
        self.part = part

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = arguments[:3]
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            count = 2 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
            self.part.steps.append((count, size_of(q, k, v, out)))
            return out
        out = function(*arguments, **options)
        if function is F.linear:
            x, weight = arguments[:2]
            self.part.steps.append((2 * x.numel() * weight.shape[0], size_of(x, weight, out)))
        elif function is F.conv2d or function is torch.conv2d:
            x, weight = arguments[:2]
            self.part.steps.append((2 * out.numel() * prod(weight.shape[1:]), size_of(x, weight, out)))
        return out


@contextmanager
def counting(part: Part) -> Iterator[None]:
    with torch.no_grad(), Tally(part):
        yield


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def count_model(
    var: VAR, scorer: nn.Module, batch: int, m: int, first_scale: int = 1, guided: bool = True
) -> dict[str, Part]:
    """The parts of one generation of ``batch`` images by models on the meta device, best of ``m`` from a scale on."""
    parts = {name: Part() for name in PARTS}
    rows = batch * (2 if guided else 1)
    vae, size = var.vae_proxy[0], var.patch_nums[-1]
    pixels, channels = size * size, var.Cvae
    dtype, scorer_dtype = var.head.weight.dtype, next(scorer.parameters()).dtype
    cond = empty(rows, var.C, dtype=dtype)
    block, alike = var.blocks[0], Part()  # all blocks do the same work, so only one is counted
    block.attn.kv_caching(True)
    for k, side in enumerate(var.patch_nums):
        length = side * side
        x = empty(rows, length, var.C, dtype=dtype)
        with counting(parts["blocks"]):
            modulation = var.shared_ada_lin(cond)
        with counting(alike):
            block(x=x, cond_BD=modulation, attn_bias=None)
        with counting(parts["head"]):
            var.head(var.head_nm(x, cond))
        count = m if k >= first_scale else 1
        parts["sampler"].steps.append((0, rows * length * var.V * 4 + batch * count * length * 8))
        if count > 1:
            maps = batch * count
            written = maps * pixels * channels * 2 + maps * length * 8 + batch * pixels * channels * 4
            parts["F"].steps.append((2 * 9 * channels * channels * pixels * maps, written))
            with counting(parts["scorer"]):
                labels = torch.empty(batch, dtype=torch.int64, device="meta")
                scorer(labels, empty(batch, count, channels, size, size, dtype=scorer_dtype), k)
        following = var.patch_nums[min(k + 1, len(var.patch_nums) - 1)] ** 2
        moved = 4 * batch * channels * (3 * pixels + following)  # f_hat is read, written, and read for the next input
        parts["winner"].steps.append((2 * 9 * channels * channels * pixels * batch, moved))
    block.attn.kv_caching(False)
    parts["blocks"].steps += alike.steps * len(var.blocks)
    with counting(parts["decoder"]):
        vae.decoder(vae.post_quant_conv(empty(batch, channels, size, size, dtype=dtype)))
    return parts


def published_models(depth: int) -> tuple[VAR, Scorer]:
    """VAR of the published sizes at 256 px and its scorer, on the meta device."""
    with torch.device("meta"):
        var = VAR(VQVAE(), depth=depth).half()
        var.vae_proxy[0].half()
        return var, Scorer(ScorerConfig()).bfloat16()


def table(depth: int, batch: int, candidates: list[int], rates: Rates) -> str:
    """Markdown with one row per part: for each M its operations, bytes and floor."""
    var, scorer = published_models(depth)
    counts = {m: count_model(var, scorer, batch, m) for m in candidates}
    head, lines = ["part"], []
    for m in candidates:
        head += [f"M={m} Gop", "MB", "floor ms"]
    totals = {m: 0.0 for m in candidates}
    for name in PARTS:
        cells = [name]
        for m in candidates:
            part = counts[m][name]
            floor = part.floor(rates)
            totals[m] += floor
            cells += [f"{part.operations / 1e9:,.0f}", f"{part.bytes / 1e6:,.0f}", f"{floor * 1e3:.3f}"]
        lines.append(cells)
    floors = ", ".join(f"M={m} {totals[m] * 1e3:.2f} ms ({totals[m] / totals[candidates[0]]:.3f})" for m in candidates)
    table = markdown_table(head, lines)
    return f"### d{depth}, {batch} images\n\n{table}\nSum of floors (over M={candidates[0]}): {floors}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="H200")
    parser.add_argument("--depth", type=int, nargs="+", default=[16, 20, 24, 30])
    parser.add_argument("--batch", type=int, nargs="+", default=[24])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 128])
    arguments = parser.parse_args()
    for depth in arguments.depth:
        for batch in arguments.batch:
            print(table(depth, batch, arguments.m, DEVICES[arguments.device]))


if __name__ == "__main__":
    main()
