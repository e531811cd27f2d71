"""Which scales decide an image: one scale is replaced by random tokens and the change is measured (LSRS, Fig. 1).

As in the paper, the image is generated first. Then the token map of one scale is replaced and all maps are decoded
again. The maps of the other scales stay the same: the model does not generate them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varkern.families import recognise
from varkern.generation import generate
from varkern.progress import progress_bar

from .pictures import Row, Tile, draw_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Perturbed:
    """Images, and how far they move when a scale is replaced.

    Args:
        sides: side of the token map per scale.
        labels: classes, ``[B]``.
        images: the images as generated, ``[B, 3, H, W]`` in [0, 1].
        examples: the images after the first replacement of each scale, ``[K, B, 3, H, W]`` in [0, 1].
        changes: root mean square difference, over pixels and colours, between an image and the same image with scale k
            replaced, ``[R, K, B]`` float64: by replacement, scale and image. 1 is the full range of a colour.
    """

    sides: tuple[int, ...]
    labels: tuple[int, ...]
    images: Tensor
    examples: Tensor
    changes: Tensor


@torch.no_grad()
def perturb(
    model: Any,
    labels: Tensor,
    seeds: Tensor,
    replacements: int = 16,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Perturbed:
    """Replace each scale of generated images by uniformly random tokens and measure how far the images move.

    Args:
        model: a VAR model.
        labels: classes ``[B]`` int64.
        seeds: the images' seeds, ``[B]`` int64.
        replacements: R, number of random token maps per scale and image, >= 1.
        seed: seed of the random tokens.
        options: further arguments of :func:`varkern.generate`.

    Raises:
        ValueError, TypeError: if an argument is wrong, before any work.

    Source:
        LSRS, section 3.2 and Fig. 1.
    """
    if replacements < 1:
        raise ValueError(f"replacements must be >= 1, got {replacements}")
    family = recognise(model)
    if family.name != "VAR":
        raise ValueError(f"perturbing needs a VAR model, whose scales add up to the image, got {type(model).__name__}")
    spec, vae = family.spec(model), model.vae_proxy[0]
    tokens = generate(model, labels, seeds=seeds, **(options or {})).tokens
    generator = torch.Generator().manual_seed(seed)

    def decode(maps: list[Tensor]) -> Tensor:
        return vae.idxBl_to_img(maps, same_shape=True, last_one=True).float().add(1).mul(0.5).cpu()

    images = decode(list(tokens))
    examples, changes = [], torch.zeros(replacements, spec.num_scales, len(labels), dtype=torch.float64)
    with progress_bar() as progress:
        task = progress.add_task("replacing scales", total=replacements * spec.num_scales, note="")
        for replacement in range(replacements):
            for scale in range(spec.num_scales):
                noise = torch.randint(spec.vocabulary, tokens[scale].shape, generator=generator)
                disturbed = decode([*tokens[:scale], noise.to(tokens[scale].device), *tokens[scale + 1 :]])
                changes[replacement, scale] = (disturbed - images).double().square().mean((1, 2, 3)).sqrt()
                if replacement == 0:
                    examples.append(disturbed)
                progress.advance(task)
    return Perturbed(spec.sides, tuple(labels.tolist()), images, torch.stack(examples), changes)


def draw(found: Perturbed, title: str, most: int = 4) -> Figure:
    """A row for each of the first ``most`` images: as generated, then with each scale replaced and the change below."""
    rows = []
    for number, label in enumerate(found.labels[:most]):
        changes = 100 * found.changes[0, :, number]
        tiles = [Tile(found.images[number], "as generated")]
        tiles += [Tile(found.examples[k, number], f"{changes[k]:.1f} %") for k in range(len(found.sides))]
        rows.append(Row(f"class {label}", tiles))
    headings = [f"scale {k}: {side}x{side}" for k, side in enumerate(found.sides)]
    return draw_rows(rows, ["", *headings], title=title)


def as_json(found: Perturbed, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The changes as JSON values: per scale, the mean over images and replacements, and the mean of each image.

    ``standard_error`` is the standard error of the mean over images; None if there is one image.
    """
    by_image = found.changes.mean(0)  # [K, B]
    count = by_image.shape[1]
    scales = [
        {
            "scale": k,
            "side": side,
            "change": float(by_image[k].mean()),
            "standard_error": float(by_image[k].std() / count**0.5) if count > 1 else None,
            "by_image": by_image[k].tolist(),
        }
        for k, side in enumerate(found.sides)
    ]
    measure = "root mean square difference of pixels, as a share of the full range"
    return {"settings": dict(settings), "measure": measure, "scales": scales}
