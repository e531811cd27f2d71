"""``varkern demo``: the ten digits without a search and with three searches, from the same seeds, in one picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from varkern.extras import require_matplotlib
from varkern.generation import Generation, generate
from varkern.models import VAR, load_var
from varkern.ops import image_seeds
from varkern.runs import check_file
from varkern.scorer import Scorer
from varkern.search import BestOfM, BlockResample
from varkern.studies.pictures import Row, Tile, draw_rows, save_png

from .digits import NUM_CLASSES
from .train import SAMPLING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Result:
    """One run of the demo: its title, images ``[10, n, 3, H, W]`` in [0, 1], mean scores ``[10]`` and seconds."""

    title: str
    images: Tensor
    scores: Tensor
    seconds: float


def load_demo(device: torch.device | str = "cpu") -> tuple[VAR, Scorer]:
    """The digits model and its scorer, which ship with the package."""
    return load_var("demo", device=device), Scorer.from_pretrained(WEIGHTS / "scorer.safetensors", device=device)


@torch.inference_mode()
def score_images(model: VAR, scorer: Scorer, labels: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """The scores of finished images, ``[B]`` float32: those of the fused features after the last scale.

    Args:
        model: the model that generated the images.
        scorer: the scorer of this model.
        labels: classes ``[B]`` int64.
        tokens: the kept token map ``[B, l]`` per scale, as :attr:`varkern.Generation.tokens`.
    """
    quantizer = model.vae_quant_proxy[0]
    codes = [quantizer.codes(scale_tokens, scale) for scale, scale_tokens in enumerate(tokens)]
    f_hat = quantizer.embed_to_fhat(codes, last_one=True)
    return scorer(labels.to(f_hat.device), f_hat.unsqueeze(1), len(tokens) - 1)[:, 0]


def run(
    out: Path, seed: int = 0, m: int = 8, num_per_class: int = 4, device: torch.device | str = "cpu"
) -> list[Result]:
    """Generate every digit with one candidate per scale and with three searches.

    The searches keep the best of ``m`` candidates, one of ``m`` resampled, or one of ``m`` resampled and then improved
    with the blocks of ``m`` other candidates.

    Args:
        out: the ``.png`` file for the picture.
        seed: seed of all runs; an image has the same first candidates in each of them.
        m: candidates per scale, >= 2.
        num_per_class: images per digit, >= 1.
        device: the models' device.

    Raises:
        ImportError, OSError, ValueError: if an argument is wrong or matplotlib is missing, before any work.
    """
    require_matplotlib("demo")
    if m < 2:
        raise ValueError(f"m must be >= 2, got {m}")
    if num_per_class < 1:
        raise ValueError(f"num_per_class must be >= 1, got {num_per_class}")
    check_file("out", out, ".png")
    labels = torch.arange(NUM_CLASSES).repeat_interleave(num_per_class)
    seeds = image_seeds(seed, len(labels))
    model, scorer = load_demo(device)
    searches = {
        "M=1: the model alone": None,
        f"M={m}, greedy: the candidate with the highest score, from the second scale on": BestOfM(scorer, m),
        f"M={m}, resample: a candidate drawn by the softmax of the scores": BestOfM(scorer, m, pick="resample"),
        f"M={m}, blocks: the same, then each block is drawn again, with {m} others beside it": (
            BlockResample(scorer, m, proposals=m)
        ),
    }
    generate(model, labels[:1], seeds=seeds[:1], **SAMPLING)  # warm-up
    results = []
    for title, search in searches.items():
        start = time.perf_counter()
        generation: Generation = generate(model, labels, search=search, seeds=seeds, **SAMPLING)
        images = generation.images.cpu()
        seconds = time.perf_counter() - start
        scores = score_images(model, scorer, labels, generation.tokens).view(NUM_CLASSES, num_per_class).mean(1).cpu()
        results.append(Result(title, images.unflatten(0, (NUM_CLASSES, num_per_class)), scores, seconds))
    save_png(draw(results), out)
    return results


def draw(results: Sequence[Result]) -> Figure:
    """The images of every run, a column per digit, under the run's title."""
    rows = []
    for result in results:
        for number, images in enumerate(result.images.unbind(1)):
            rows.append(Row("", [Tile(image) for image in images], "" if number else result.title))
    return draw_rows(rows, [str(digit) for digit in range(NUM_CLASSES)], tile=72)


def as_table(results: Sequence[Result], m: int) -> Table:
    """The demo's scores and seconds, as a table to print."""
    table = Table(title="Mean score of the finished images", caption="log-odds of being real + a constant per digit")
    table.add_column("digit")
    for name in ("M=1", f"M={m} greedy", f"M={m} resample", f"M={m} blocks"):
        table.add_column(name, justify="right")
    for digit in range(NUM_CLASSES):
        table.add_row(str(digit), *(f"{result.scores[digit]:+.2f}" for result in results))
    table.add_section()
    table.add_row("all", *(f"{result.scores.mean():+.2f}" for result in results))
    table.add_row("seconds", *(f"{result.seconds:.2f}" for result in results))
    return table
