"""What a step of block resampling costs, part by part: its floor on a device, its launches, its time on this CPU.

    python -m bench.block_steps --device H200      # floors and launches
    python -m bench.block_steps --measure          # processor time of one thread, plain PyTorch forms

A step composes B x P maps, fuses and scores them, and keeps one of each image. P composed maps of an image differ from
its current map in a block only. Fusing could therefore add the difference of the block's codes, resized and convolved,
to the current features ("difference"). The step would then also have to write the current features of the next step.
Composed features must be written whole in both forms, because the scorer reads them whole. Its convolutions and norms
read every pixel.

The floors are those of ``bench/roofline.py``. Blocks lie elsewhere in every image, as the search has them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import DEVICES, Rates
from bench.roofline import Part, counting, empty
from varkern import ops
from varkern.demo.run import load_demo
from varkern.models import PATCH_NUMS_256
from varkern.ops import use_backend
from varkern.ops.fusion_tables import axis_matrix, folded_phi
from varkern.scorer import Scorer, ScorerConfig
from varkern.search import BlockResample, Candidates
from varkern.search.block_resample import usual_block
from varkern.tables import markdown_table

PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
BATCH, PROPOSALS = 24, 8
PARTS = ("compose", "F", "F by difference", "scorer", "keep")
ROUNDS = 9
FREE = {"detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view"}


@dataclass(frozen=True)
class Sizes:
    """What a step's cost depends on, at one scale: see :class:`varkern.ScorerConfig`."""

    batch: int
    scale: int
    side: int
    size: int
    channels: int
    proposals: int = PROPOSALS

    @property
    def block(self) -> tuple[int, int]:
        """First position and end, along an axis, of a block in the middle of the map."""
        count = -(-self.side // usual_block(self.side))
        middle = count // 2
        return middle * self.side // count, (middle + 1) * self.side // count

    @property
    def window(self) -> tuple[int, int]:
        """First pixel and end, along an axis, of the features that this block reaches through resizing and phi."""
        first, end = reach(axis_matrix(self.side, self.size, "bicubic"), *self.block)
        return max(first - 1, 0), min(end + 1, self.size)

    @property
    def share(self) -> float:
        """The part of the features that lies in the window."""
        return ((self.window[1] - self.window[0]) / self.size) ** 2


def reach(resize: Tensor, first: int, end: int) -> tuple[int, int]:
    """First pixel and end of what the positions ``first`` to ``end`` reach through the matrix ``[size, side]``."""
    reached = resize[:, first:end].ne(0).any(1).nonzero().flatten()
    return int(reached[0]), int(reached[-1]) + 1


def count_step(scorer: Scorer, sizes: Sizes) -> dict[str, Part]:
    """Operations and bytes of every part of a step; the scorer is on the meta device."""
    parts = {name: Part() for name in PARTS}
    batch, maps, length = sizes.batch, sizes.batch * sizes.proposals, sizes.side**2
    pixels, changed = sizes.size**2, (sizes.block[1] - sizes.block[0]) ** 2
    parts["compose"].steps.append((0, 8 * (batch * length + maps * changed + maps * length)))
    operations = 2 * 9 * sizes.channels**2 * pixels * maps
    moved = maps * (pixels * sizes.channels * 2 + length * 8) + batch * pixels * sizes.channels * 4
    parts["F"].steps.append((operations, moved))
    window = sizes.share * batch * pixels * sizes.channels * 4
    parts["F by difference"].steps.append((operations * sizes.share, moved - 8 * maps * (length - changed) + window))
    labels = torch.empty(batch, dtype=torch.int64, device="meta")
    shape = (batch, sizes.proposals, sizes.channels, sizes.size, sizes.size)
    with counting(parts["scorer"]):
        scorer(labels, empty(*shape, dtype=next(scorer.parameters()).dtype), sizes.scale)
    parts["keep"].steps.append((0, 8 * maps + batch * (8 + 2 * 8 * length)))
    return parts


def published() -> Iterator[tuple[str, ScorerConfig, tuple[int, ...]]]:
    """Name, scorer and sides of VAR at 256 and at 512 px and of the demo."""
    yield "VAR, 256 px", ScorerConfig(), PATCH_NUMS_256
    yield "VAR, 512 px", ScorerConfig(size=32), PATCH_NUMS_512
    var, scorer = load_demo()
    yield "demo", scorer.config, tuple(var.patch_nums)


def steps_of(config: ScorerConfig, sides: Sequence[int], batch: int) -> Iterator[Sizes]:
    for scale, side in enumerate(sides):
        if scale > 0:
            yield Sizes(batch, scale, side, config.size, config.channels)


def floors(config: ScorerConfig, sides: Sequence[int], batch: int, rates: Rates) -> str:
    """A Markdown table with a row per searched scale."""
    with torch.device("meta"):
        scorer = Scorer(config).bfloat16()
    lines = []
    for sizes in steps_of(config, sides, batch):
        found = {name: part.floor(rates) for name, part in count_step(scorer, sizes).items()}
        step = sum(found.values()) - found["F by difference"]
        cells = [f"{found[name] * 1e6:.2f} ({found[name] / step:.1%})" for name in PARTS]
        saved = f"{(found['F'] - found['F by difference']) / step:.1%}"
        lines.append([str(sizes.side), f"{sizes.share:.2f}", *cells, f"{step * 1e6:.2f}", saved])
    return markdown_table(["side", "window", *PARTS, "step", "saved"], lines)


class Launches(TorchDispatchMode):
    """Counts the operations that launch kernels while it is active; of varkern's ops, each launches one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().split("::")[1].split(".")[0]
        if not function.is_view and name not in FREE:
            self.found[name] += 1
        return function(*arguments, **(options or {}))


def count_launches(config: ScorerConfig) -> tuple[Counter[str], Counter[str]]:
    """What the scorer launches on a GPU in one step of block resampling, and what else the step launches."""
    batch, side, steps = 2, config.size, 5
    # On the meta device nothing runs, and each op of varkern is one call; the norm is told to take its kernel.
    with torch.device("meta"), torch.no_grad(), patch("varkern.ops.norm._kernels_take", return_value=True):
        scorer = Scorer(config).bfloat16().eval().requires_grad_(False)
        labels, codebook = torch.zeros(batch, dtype=torch.int64), torch.zeros(64, config.channels)
        fuse = partial(ops.fuse_tokens, codebook=codebook, side=side, size=side)

        def count(steps: int) -> Counter[str]:
            search = BlockResample(scorer, 1, PROPOSALS, blocks=lambda scale, side: -(-side // steps))
            search.num_blocks = lambda scale, grid: (1, steps)
            tokens = torch.zeros(batch, 1 + PROPOSALS, side**2, dtype=torch.int64)
            offered = Candidates(
                1,
                config.num_scales,
                labels,
                tokens,
                fuse=lambda start, stop, **wanted: fuse(tokens[:, start:stop], **wanted),
                uniforms=lambda draw=0: torch.zeros(tokens.shape[:2]),
                codebook=codebook,
                fuse_maps=fuse,
                grid=(side, side),
                step_uniforms=lambda number, steps: torch.zeros(batch, number, steps),
            )
            with Launches() as launches:
                search.choose(offered)
            return launches.found

        features = torch.zeros(batch, PROPOSALS, side, side, config.channels, dtype=torch.bfloat16)
        score = partial(scorer, labels, features.permute(0, 1, 4, 2, 3), 1)
        score()  # which converts weights once
        with Launches() as of_scorer:
            score()
        several, one = count(1 + steps), count(1)
        several.subtract(one)
        each = Counter({name: count // steps for name, count in several.items()})
        return of_scorer.found, each - of_scorer.found


def make_difference(
    sizes: Sizes, starts: Tensor, codebook: Tensor, phi: tuple[Tensor, Tensor, float], current: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function ``(fresh[B, P, l], kept[B, l]) -> features[B, P, C, H, W]``: ``current`` plus a block's difference.

    Shapes do not depend on where the blocks lie, so the windows of all images are as large as the largest.

    Args:
        sizes: of the blocks; all have the same size.
        starts: the first row and column of every image's block, ``[B, 2]``.
        codebook: ``[V, C]`` float32.
        phi: as for ``fuse_tokens``.
        current: features ``[B, C, H, W]`` of ``kept``, channels-last.
    """
    B, P, C, side, size = sizes.batch, sizes.proposals, sizes.channels, sizes.side, sizes.size
    count = sizes.block[1] - sizes.block[0]
    resize = axis_matrix(side, size, "bicubic").float()
    spans = [reach(resize, start, start + count) for start in range(side - count + 1)]
    window = min(max(end - first for first, end in spans) + 2, size)
    tops = (torch.tensor([first for first, _ in spans])[starts] - 1).clamp(0, size - window)  # [B, 2]
    resize = F.pad(resize, (0, 0, 1, 1))  # phi pads with zeros
    weight = folded_phi(*phi)[0].float().contiguous(memory_format=torch.channels_last)

    def difference(fresh: Tensor, kept: Tensor) -> Tensor:
        inside = starts.unsqueeze(2) + torch.arange(count)  # [B, 2, count]
        place = (inside[:, 0, :, None] * side + inside[:, 1, None]).view(B, 1, -1)
        new, old = fresh.gather(2, place.expand(B, P, -1)), kept.unsqueeze(1).gather(2, place)
        x = F.embedding(new, codebook) - F.embedding(old, codebook)
        padded = tops.unsqueeze(2) + torch.arange(window + 2)
        rows, columns = resize[padded.unsqueeze(3), inside.unsqueeze(2)].unbind(1)  # [B, window + 2, count]
        x = torch.matmul(rows.unsqueeze(1), x.view(B, P, count, -1)).view(B, P, window + 2, count, C)
        x = torch.matmul(columns[:, None, None], x).flatten(0, 1).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight).permute(0, 2, 3, 1).reshape(-1, C)
        features = current.new_empty(B * P, size, size, C)
        features.view(B, P, size, size, C).copy_(current.permute(0, 2, 3, 1).unsqueeze(1))
        pixels = tops.unsqueeze(2) + torch.arange(window)
        place = (pixels[:, 0, :, None] * size + pixels[:, 1, None]).view(B, 1, -1)
        place = place + torch.arange(B * P).view(B, P, 1) * size * size
        features.view(-1, C).index_add_(0, place.flatten(), x)
        return features.view(B, P, size, size, C).permute(0, 1, 4, 2, 3)

    return difference


def parts_on_cpu(scorer: Scorer, sizes: Sizes) -> tuple[dict[str, Callable[[], object]], Tensor, Tensor]:
    """Every part of a step as a call; and the features of the composed maps, whole and by difference."""
    B, P, C, side, size = sizes.batch, sizes.proposals, sizes.channels, sizes.side, sizes.size
    codebook, f_hat = torch.randn(4096, C), torch.randn(B, C, size, size)
    phi = torch.randn(C, C, 3, 3) * 0.1, torch.randn(C), 0.5
    fresh, kept = torch.randint(0, 4096, (B, P, side**2)), torch.randint(0, 4096, (B, side**2))
    labels, noise, images = torch.arange(B) % scorer.config.num_classes, torch.rand(B, P + 1), torch.arange(B)
    count = sizes.block[1] - sizes.block[0]
    starts = torch.randint(0, side - count + 1, (B, 2))
    along = [(torch.arange(side) - starts[:, axis, None]).div(count, rounding_mode="floor") == 0 for axis in (0, 1)]
    inside = (along[0].unsqueeze(2) & along[1].unsqueeze(1)).view(B, 1, -1)
    options = {"side": side, "size": size, "f_hat": f_hat, "phi": phi, "channels_last": True}

    def compose() -> Tensor:
        return torch.where(inside, fresh, kept.unsqueeze(1))

    def fuse(maps: Tensor) -> Tensor:
        return ops.fuse_tokens(maps, codebook, **options)

    def update() -> Tensor:
        features = difference(fresh, kept)
        features[images, picked].contiguous(memory_format=torch.channels_last)
        return features

    def keep() -> Tensor:
        chosen = (torch.cat((scores[:, :1], scores), 1) + noise).argmax(-1)
        return torch.cat((kept.unsqueeze(1), maps), 1)[images, chosen]

    maps, picked = compose(), torch.randint(0, P, (B,))
    features = fuse(maps)
    current = fuse(kept.unsqueeze(1))[:, 0].contiguous(memory_format=torch.channels_last)
    difference = make_difference(sizes, starts, codebook, phi, current)
    scores = scorer(labels, features, sizes.scale)
    score = partial(scorer, labels, features, sizes.scale)
    calls = (compose, partial(fuse, maps), update, score, keep)
    return dict(zip(PARTS, calls, strict=True)), features, difference(fresh, kept)


def times_of(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of processor time; the parts take turns, so that the machine's other work meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(ROUNDS + 1):
        for name, call in parts.items():
            start = time.process_time()
            call()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure(config: ScorerConfig, sides: Sequence[int], batch: int) -> str:
    """A Markdown table with a row per searched scale."""
    torch.manual_seed(0)
    scorer, lines = Scorer(config).eval().requires_grad_(False), []
    for sizes in steps_of(config, sides, batch):
        found = times_of(parts_on_cpu(scorer, sizes)[0])
        step = sum(found.values()) - found["F by difference"]
        cells = [f"{found[name] * 1e3:.2f} ({found[name] / step:.1%})" for name in PARTS]
        saved = f"{(found['F'] - found['F by difference']) / step:.1%}"
        lines.append([str(sizes.side), f"{sizes.share:.2f}", *cells, f"{step * 1e3:.2f}", saved])
    return markdown_table(["side", "window", *PARTS, "step", "saved"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="H200")
    parser.add_argument("--measure", action="store_true", help="measure on this CPU instead, in ms")
    parser.add_argument("--batch", type=int, help="number of images, default: 24, on a CPU 8")
    arguments = parser.parse_args()
    for name, config, sides in published():
        batch = arguments.batch or (8 if arguments.measure else BATCH)
        if arguments.measure:
            torch.set_num_threads(1)
            with torch.no_grad(), use_backend("torch"):
                print(f"### {name}, {batch} images, ms\n\n{measure(config, sides, batch)}", flush=True)
        else:
            table = floors(config, sides, batch, DEVICES[arguments.device])
            print(f"### {name}, {batch} images, {arguments.device}, µs\n\n{table}")
            of_scorer, others = count_launches(config)
            print(f"Launches per step: {of_scorer.total()} of the scorer, {others.total()} others: {dict(others)}.\n")


if __name__ == "__main__":
    main()
