"""PNG files, and figures of images with captions. They need pillow and matplotlib (extra ``plots``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from varkern.runs import atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
POINT = DPI / 72  # pixels
FRAME = "#d55e00"  # vermilion of Okabe and Ito's palette, which colour-blind people can distinguish from black and grey
FRAME_WIDTH = 6  # this and all sizes below are in pixels
GAP = 8
LINK_HEIGHT = 44
LINE = 12 * POINT  # distance between two lines of text
CHARACTER = 5.2 * POINT  # average width of a character at 8 points


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert images ``[..., 3, H, W]`` in [0, 1], any float dtype and device, to ``[..., H, W, 3]`` uint8, rounded.

    Values outside [0, 1] are clamped; NaN becomes 0.
    """
    pixels = images.detach().float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round()
    return np.ascontiguousarray(pixels.byte().movedim(-3, -1).cpu().numpy())


def save_png(picture: Figure | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a figure, or pixels ``[H, W, 3]`` uint8, as PNG. A crash leaves no incomplete file at ``path``."""
    with atomically(path) as unfinished:
        if isinstance(picture, np.ndarray):
            from PIL import Image

            Image.fromarray(picture).save(unfinished, format="PNG")
        else:
            from matplotlib.transforms import Bbox

            # The box begins and ends at whole pixels: all pixels of an enlarged image are drawn at the same size.
            box = picture.get_tightbbox().get_points() * DPI
            box = np.array([np.floor(box[0]) - GAP, np.ceil(box[1]) + GAP]) / DPI
            picture.savefig(unfinished, format="png", bbox_inches=Bbox(box))


class Tile(NamedTuple):
    """One image of a :class:`Row`, with the caption below it."""

    image: Tensor | np.ndarray
    """``[3, H, W]`` in [0, 1], or pixels ``[H, W, 3]`` uint8."""
    caption: str = ""
    framed: bool = False


class Link(NamedTuple):
    """A line from a tile to one of the next row."""

    row: int
    """The row of the upper tile."""
    start: int
    """The column of the upper tile."""
    end: int
    """The column of the lower tile."""
    leads: bool = False
    """Whether the line has the colour of frames."""


class Row(NamedTuple):
    """One row of a figure: a label at its left, then tiles; None leaves a place empty."""

    label: str
    tiles: Sequence[Tile | None]
    title: str = ""
    """Text above the row."""


def draw_rows(
    rows: Sequence[Row],
    columns: Sequence[str] = (),
    title: str = "",
    tile: int = 144,
    rules: int = 0,
    links: Sequence[Link] = (),
) -> Figure:
    """A figure with rows of captioned images under column headings.

    Args:
        rows: at least one; all images must have one size.
        columns: one heading per column; empty: no headings.
        title: text above the whole figure.
        tile: longer side of a drawn image in pixels, at most; smaller images are enlarged by a whole number.
        rules: number of columns at the right that a vertical line separates from the others; 0: no line.
        links: lines from tiles to tiles of the next row; the rows are then farther apart.

    Raises:
        ValueError: if a row has another number of tiles than there are headings, or if there is no image.
    """
    from matplotlib.figure import Figure

    for row in rows:
        if columns and len(row.tiles) != len(columns):
            raise ValueError(f"a row must have {len(columns)} tiles, one per column, got {len(row.tiles)}")
    tiles = [entry for row in rows for entry in row.tiles if entry is not None]
    if not tiles:
        raise ValueError("rows must have at least one tile, got none")
    shape = pixels_of(tiles[0]).shape[:2]
    height, width = displayed_size(shape, tile)
    smooth = "nearest" if height >= shape[0] else "antialiased"
    words = max(map(len, [*columns, *(entry.caption for entry in tiles)]), default=0) * CHARACTER
    edge = FRAME_WIDTH if any(entry.framed for entry in tiles) else 0
    step = round(max(width + 2 * edge, words)) + GAP
    under = LINE if any(entry.caption for entry in tiles) else 0
    figure = Figure(dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))  # in pixels; text outside of it makes the saved picture larger
    axis.set_axis_off()
    small = {"fontsize": 8, "linespacing": 1.4}
    top, tops = 0, []
    for row in rows:
        if row.title:
            top += round(2 * LINE)
            axis.text(0, top - LINE, row.title, fontsize=9, va="center")
        tops.append(top)
        axis.text(-2 * GAP, top + height / 2, row.label, ha="right", va="center", **small)
        for column, entry in enumerate(row.tiles):
            if entry is None:
                continue
            left = column * step + (step - width) // 2
            draw_tile(axis, entry, (left, top, width, height), smooth)
            place = left + width / 2, top + height + edge + 2
            axis.text(*place, entry.caption, ha="center", va="top", **small)
        top += round(height + 2 * edge + under) + GAP + (LINK_HEIGHT if links else 0)
    top -= LINK_HEIGHT if links else 0  # none after the last row
    for number, start, end, leads in links:
        below, above = tops[number] + height + edge + under + 4, tops[number + 1] - edge - 2
        style = {"color": FRAME, "linewidth": 2} if leads else {"color": "grey", "linewidth": 1}
        axis.plot([(start + 0.5) * step, (end + 0.5) * step], [below, above], **style)
    count = max(len(row.tiles) for row in rows)
    for column, heading in enumerate(columns):
        axis.text((column + 0.5) * step, -GAP, heading, ha="center", va="bottom", **small)
    axis.text(0, -GAP - (2 if any(columns) else 0.5) * LINE, title, fontsize=10, va="bottom")
    if rules:
        axis.axvline((count - rules) * step, color="grey", linewidth=0.8)
    axis.set_xlim(0, count * step)
    axis.set_ylim(top, 0)
    figure.set_size_inches(count * step / DPI, top / DPI)
    return figure


def draw_tile(axis: Axes, tile: Tile, place: tuple[int, int, int, int], interpolation: str) -> None:
    """Draw the image of a tile and its frame; ``place``: left, top, width and height of the image in pixels."""
    from matplotlib.patches import Rectangle

    left, top, width, height = place
    extent = left, left + width, top + height, top
    axis.imshow(pixels_of(tile), interpolation=interpolation, extent=extent, aspect="auto")
    if tile.framed:
        corner, line = (left - FRAME_WIDTH / 2, top - FRAME_WIDTH / 2), FRAME_WIDTH / POINT
        sides = width + FRAME_WIDTH, height + FRAME_WIDTH
        axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=FRAME, linewidth=line, clip_on=False))


def pixels_of(tile: Tile) -> np.ndarray:
    return tile.image if isinstance(tile.image, np.ndarray) else to_pixels(tile.image)


def displayed_size(shape: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width at which an image of ``shape`` is drawn: enlarged by a whole number, or shrunk."""
    factor = longest / max(shape)
    factor = int(factor) if factor >= 1 else factor
    return round(shape[0] * factor), round(shape[1] * factor)


def contact_sheet(
    paths: Sequence[str | os.PathLike[str]], captions: Sequence[str], columns: int, thumbnail: int = 144
) -> Figure:
    """A figure of image files with captions below them.

    Args:
        paths: at least one image file; all images must have one size.
        captions: one per image.
        columns: images per row, >= 1.
        thumbnail: longer side of a drawn image in pixels, at most; smaller images are enlarged by a whole number.

    Raises:
        ValueError: if ``paths`` is empty, ``captions`` has another length, or ``columns`` is below 1.
    """
    if not paths or len(paths) != len(captions):
        raise ValueError(f"paths and captions must be equally many, >= 1, got {len(paths)} and {len(captions)}")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    tiles = [Tile(read_thumbnail(path, thumbnail), caption) for path, caption in zip(paths, captions, strict=True)]
    return draw_rows([Row("", tiles[at : at + columns]) for at in range(0, len(tiles), columns)], tile=thumbnail)


def read_thumbnail(path: str | os.PathLike[str], longest: int) -> np.ndarray:
    """Pixels of an image file, ``[H, W, 3]`` uint8, shrunk so that no side is longer than ``longest``."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((longest, longest))
    return np.asarray(image)
