"""Pictures: PNG files, labelled panels, contact sheets. They need pillow, which the ``demo`` extra brings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from varkern.files import atomically

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

TEXT = (20, 20, 20)
PAPER = (255, 255, 255)
GAP = 4  # pixels between images
TITLE_SIZE, LABEL_SIZE = 17, 14  # of the type, in pixels


def require_pillow() -> None:
    """Raise before any work if pillow is missing.

    Raises:
        ImportError: saying what to install.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need pillow: pip install 'varkern[demo]'") from error


def to_pixels(images: Tensor) -> np.ndarray:
    """Images ``[..., 3, H, W]`` in [0, 1], any float dtype and device, to ``[..., H, W, 3]`` uint8, rounded.

    Values outside are clamped; NaN becomes 0.
    """
    pixels = images.detach().float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round()
    return np.ascontiguousarray(pixels.byte().movedim(-3, -1).cpu().numpy())


def save_png(picture: Image.Image | np.ndarray, path: str | os.PathLike) -> None:
    """Write a picture, or pixels ``[H, W, 3]`` uint8, as PNG; a crash leaves no half-written file under ``path``."""
    from PIL import Image

    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    with atomically(path) as unfinished:
        picture.save(unfinished, format="PNG")


class Panel(NamedTuple):
    """One block of a figure: a title above a grid of images."""

    title: str
    images: Tensor
    """``[rows, columns, 3, H, W]`` in [0, 1]."""


def draw_panels(panels: Sequence[Panel], columns: Sequence[str], enlarge: int = 3) -> Image.Image:
    """Panels one below the other, over one row of column labels; every pixel is drawn as a square of ``enlarge``.

    Args:
        panels: all of the same number of columns and size of image.
        columns: a label for each column.
        enlarge: >= 1.

    Raises:
        ValueError: if ``columns`` or ``enlarge`` do not fit.
    """
    if enlarge < 1:
        raise ValueError(f"enlarge must be >= 1, got {enlarge}")
    for panel in panels:
        if panel.images.dim() != 5 or panel.images.shape[1] != len(columns):
            raise ValueError(
                f"a panel's images must have shape [rows, {len(columns)}, 3, H, W], got {list(panel.images.shape)}"
            )
    height, width = (side * enlarge + GAP for side in panels[0].images.shape[-2:])
    header, title = LABEL_SIZE + 2 * GAP, TITLE_SIZE + 4 * GAP
    total = header + sum(title + panel.images.shape[0] * height for panel in panels) + GAP
    picture, draw = blank(len(columns) * width + GAP, total)
    for column, label in enumerate(columns):
        write(draw, GAP + column * width + (width - GAP) // 2, header // 2, label, LABEL_SIZE, "mm")
    top = header
    for panel in panels:
        write(draw, GAP, top + title // 2, panel.title, TITLE_SIZE, "lm")
        top += title
        for row in to_pixels(panel.images):
            for column, pixels in enumerate(row):
                square = pixels.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
                paste(picture, square, GAP + column * width, top)
            top += height
    return picture


def contact_sheet(
    paths: Sequence[str | os.PathLike], captions: Sequence[str], columns: int, thumbnail: int = 128
) -> Image.Image:
    """Image files side by side, each over its caption, at about one size whatever theirs is.

    Args:
        paths: at least one image file; all of one size.
        captions: one an image.
        columns: images a row, >= 1.
        thumbnail: the most pixels that an image's longer side has on the sheet; smaller images are enlarged by a
            whole number.

    Raises:
        ValueError: if an argument does not fit.
    """
    if not paths or len(paths) != len(captions):
        raise ValueError(f"paths and captions must be as many, at least 1, got {len(paths)} and {len(captions)}")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    first = read_thumbnail(paths[0], thumbnail)
    draw = blank(1, 1)[1]
    widest = max(int(draw.textlength(caption, font=font(LABEL_SIZE))) for caption in captions)
    columns = min(columns, len(paths))
    width, height = max(first.width, widest) + GAP, first.height + LABEL_SIZE + 2 * GAP
    picture, draw = blank(columns * width + GAP, -(-len(paths) // columns) * height + GAP)
    for place, (path, caption) in enumerate(zip(paths, captions, strict=True)):
        left, top = GAP + place % columns * width, GAP + place // columns * height
        small = read_thumbnail(path, thumbnail)
        picture.paste(small, (left + (width - GAP - small.width) // 2, top))
        center = left + (width - GAP) // 2
        write(draw, center, top + small.height + GAP + LABEL_SIZE // 2, caption, LABEL_SIZE, "mm")
    return picture


def read_thumbnail(path: str | os.PathLike, longest: int) -> Image.Image:
    """An image file shrunk until no side is above ``longest``, or enlarged by the largest whole number that fits."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    factor = longest // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((longest, longest))
    return image


def blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, anchor: str) -> None:
    draw.text((x, y), text, fill=TEXT, font=font(size), anchor=anchor)


def paste(picture: Image.Image, pixels: np.ndarray, left: int, top: int) -> None:
    from PIL import Image

    picture.paste(Image.fromarray(pixels), (left, top))
