"""Pictures: PNG files, labelled panels, contact sheets. They need pillow, which the ``demo`` extra brings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from varkern.runs import atomically

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

TEXT = (20, 20, 20)
PAPER = (255, 255, 255)
FRAME = (214, 39, 40)
GAP = 4  # pixels between images
TITLE_SIZE, LABEL_SIZE = 17, 14  # of the type, in pixels
LINE = LABEL_SIZE + GAP
FRAME_WIDTH = 3


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


class Tile(NamedTuple):
    """One image of a :class:`Row` with the words under it."""

    image: Tensor
    """``[3, H, W]`` in [0, 1]."""
    caption: str = ""
    framed: bool = False


class Row(NamedTuple):
    """One row of a figure: lines of words at its left, then tiles; None leaves a place empty."""

    label: Sequence[str]
    tiles: Sequence[Tile | None]


def draw_rows(
    rows: Sequence[Row], columns: Sequence[str], tile: int = 96, title: str = "", rules: int = 0
) -> Image.Image:
    """Rows of captioned images, one below the other, under column headings; a framed image stands out.

    Args:
        rows: at least one; all with as many tiles as there are ``columns``.
        columns: a heading each.
        tile: the most pixels that an image's longer side takes; smaller images are enlarged by a whole number.
        title: above all.
        rules: a vertical rule sets off the last so many columns; 0: none.

    Raises:
        ValueError: if a row has another number of tiles, or there is no image at all.
    """
    for row in rows:
        if len(row.tiles) != len(columns):
            raise ValueError(f"a row must have {len(columns)} tiles, one a column, got {len(row.tiles)}")
    lay = layout(rows, columns, tile, title)
    picture, draw = blank(lay.width, lay.header + lay.step * len(rows) + GAP)
    if title:
        write(draw, GAP, GAP + TITLE_SIZE // 2, title, TITLE_SIZE, "lm")
    for column, heading in enumerate(columns):
        write(draw, lay.center(column), lay.header - LINE // 2 - GAP // 2, heading, LABEL_SIZE, "mm")
    if rules:
        x = lay.margin + (len(columns) - rules) * lay.wide
        draw.line((x, lay.header - LINE, x, lay.header + lay.step * len(rows)), fill=TEXT)
    for number, row in enumerate(rows):
        top = lay.header + number * lay.step
        for place, text in enumerate(row.label):
            middle = top + lay.high // 2 + round((place - (len(row.label) - 1) / 2) * LINE)
            write(draw, GAP, middle, text, LABEL_SIZE, "lm")
        for column, entry in enumerate(row.tiles):
            if entry is not None:
                draw_tile(picture, draw, entry, (lay.center(column), top, lay.high), tile)
    return picture


class Layout(NamedTuple):
    """Where the parts of :func:`draw_rows` stand, in pixels."""

    width: int  # of the whole
    header: int  # height of the title and the headings
    margin: int  # width of the row labels
    wide: int  # of a column
    high: int  # of the images of a row, frames included
    step: int  # from row to row

    def center(self, column: int) -> int:
        return self.margin + column * self.wide + self.wide // 2


def layout(rows: Sequence[Row], columns: Sequence[str], tile: int, title: str) -> Layout:
    """Columns wide enough for the widest of images, captions and headings; rows high enough for the highest image."""
    tiles = [entry for row in rows for entry in row.tiles if entry is not None]
    if not tiles:
        raise ValueError("rows must have at least one tile, got none")
    sizes = [fitted(to_pixels(entry.image), tile).size for entry in tiles]
    captions = [entry.caption for entry in tiles]
    wide = max(max(width for width, _ in sizes), widest([*captions, *columns])) + 2 * GAP + 2 * FRAME_WIDTH
    high = max(height for _, height in sizes) + 2 * FRAME_WIDTH
    margin = widest([text for row in rows for text in row.label]) + 3 * GAP
    header = LINE + GAP + (TITLE_SIZE + 2 * GAP if title else 0)
    width = max(margin + wide * len(columns), widest([title], TITLE_SIZE) + GAP) + GAP
    return Layout(width, header, margin, wide, high, high + (LINE if any(captions) else 0) + 2 * GAP)


def widest(texts: Sequence[str], size: int = LABEL_SIZE) -> int:
    """Pixels that the longest of ``texts`` takes."""
    draw = blank(1, 1)[1]
    return max((int(draw.textlength(text, font=font(size))) + 1 for text in texts), default=0)


def draw_tile(
    picture: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, place: tuple[int, int, int], longest: int
) -> None:
    """One tile in its ``place``: the middle of its column, the top and the height of its row's images."""
    center, top, high = place
    image = fitted(to_pixels(tile.image), longest)
    left, upper = center - image.width // 2, top + (high - image.height) // 2
    if tile.framed:
        corner = (left - FRAME_WIDTH, upper - FRAME_WIDTH)
        opposite = (left + image.width + FRAME_WIDTH - 1, upper + image.height + FRAME_WIDTH - 1)
        draw.rectangle((*corner, *opposite), fill=FRAME)
    picture.paste(image, (left, upper))
    write(draw, center, top + high + LINE // 2, tile.caption, LABEL_SIZE, "mm")


def fitted(pixels: np.ndarray, longest: int) -> Image.Image:
    """Pixels ``[H, W, 3]`` as an image whose longer side is about ``longest``; see :func:`read_thumbnail`."""
    from PIL import Image

    return resized(Image.fromarray(pixels), longest)


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
        return resized(file.convert("RGB"), longest)


def resized(image: Image.Image, longest: int) -> Image.Image:
    """An image shrunk until no side is above ``longest``, or enlarged by the largest whole number that fits."""
    from PIL import Image

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
