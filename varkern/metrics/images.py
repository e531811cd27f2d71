"""Sets of images to be measured, read batch by batch, and what their pixels tell about mistakes in making them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varkern.extras import require_pillow
from varkern.prefetching import prefetch
from varkern.runs import SETTINGS

from .arrays import ImageArray

SHEET = "sheet.png"  # beside the images of `varkern sample`
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg", ".webp")
READERS = 4  # threads that decode image files


class ImageSet(Protocol):
    """Images of one size, in an order that stays."""

    name: str
    size: tuple[int, int]  # H, W

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, ``[N, 3, H, W]`` uint8 on the CPU, in batches."""
        ...

    def describe(self, number: int) -> str:
        """Which image ``number`` is, in a user's words."""
        ...

    def warnings(self) -> list[str]:
        """What in the way the set is stored harms the figures."""
        ...


class ImageFiles:
    """Image files of one size.

    Args:
        paths: at least one, in the order that the images shall have.
        name: of the set.

    Raises:
        ImportError: without pillow.
        ValueError: if they differ in size, or one is no RGB image: by file.
    """

    def __init__(self, paths: Sequence[Path], name: str | None = None):
        require_pillow()
        self.paths, self.name = paths, str(paths[0].parent) if name is None else name
        self.size = read_size(self.paths[0])
        for path in self.paths[1:]:
            if (size := read_size(path)) != self.size:
                raise ValueError(
                    f"{self.name} holds images of several sizes: {self.paths[0].name} has {sides(self.size)} pixels, "
                    f"{path.name} {sides(size)}; features of resized images are not comparable"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        pixels = prefetch(read_pixels, self.paths, READERS, batch_size)
        while batch := list(islice(pixels, batch_size)):
            yield as_batch(batch)

    def describe(self, number: int) -> str:
        return self.paths[number].name

    def warnings(self) -> list[str]:
        lossy = sum(path.suffix.lower() in LOSSY for path in self.paths)
        if not lossy:
            return []
        return [
            f"{lossy} of the {len(self)} images in {self.name} are JPEG or WebP: compression changes their features "
            "and so FID; write PNG"
        ]


def in_folder(folder: Path) -> ImageFiles:
    """The image files in a folder and below, in the order of their paths; the contact sheet of ``varkern sample`` is
    left out.

    Raises:
        ValueError: if there are none, or :class:`ImageFiles` refuses them.
    """
    sheet = {folder / SHEET} if (folder / SETTINGS).exists() else set()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path not in sheet)
    if not paths:
        raise ValueError(f"{folder} holds no images: files ending in {', '.join(SUFFIXES)} are wanted")
    return ImageFiles(paths, str(folder))


def open_images(path: str | os.PathLike) -> ImageFiles | ImageArray:
    """The images at ``path``, a folder or an ``.npz``.

    Raises:
        ValueError: if there is nothing there, or no such images.
    """
    path = Path(path)
    if path.is_dir():
        return in_folder(path)
    if not path.exists():
        raise ValueError(f"there is no {path}: a folder of images or an .npz file is wanted")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    return ImageArray(path)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, by its header.

    Raises:
        ValueError: if it is no image, or none of three colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, size = image.mode, (image.height, image.width)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or no image: {error}") from error
    if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;"):
        raise ValueError(f"{path} is greyscale (mode {mode}): the features are those of RGB images, convert it first")
    if mode != "RGB":
        raise ValueError(f"{path} has mode {mode}, wanted RGB: convert it first")
    return size


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of an RGB image file, ``[H, W, 3]`` uint8.

    Raises:
        ValueError: if it is cut short or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


def as_batch(pixels: Sequence[np.ndarray]) -> Tensor:
    """Images ``[H, W, 3]`` to a batch ``[N, 3, H, W]``, uint8."""
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1).contiguous()


def sides(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


class PixelFacts:
    """What the pixels of a set tell about mistakes in making it: repeated images, and their range."""

    def __init__(self) -> None:
        self.seen: dict[bytes, int] = {}
        self.repeats: list[tuple[int, int]] = []  # an image, and the first one that it equals
        self.count, self.highest, self.total, self.pixels = 0, 0, 0, 0

    def add(self, batch: Tensor) -> None:
        """Look at the next images, ``[N, 3, H, W]`` uint8."""
        for image in batch.numpy():
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            first = self.seen.setdefault(digest, self.count)
            if first != self.count:
                self.repeats.append((self.count, first))
            self.count += 1
        if batch.numel():
            self.highest = max(self.highest, int(batch.max()))
            self.total += int(batch.sum(dtype=torch.int64))
            self.pixels += batch.numel()

    @property
    def brightness(self) -> float:
        """The mean over all pixels and colours, in 0..255."""
        return self.total / max(self.pixels, 1)

    def warnings(self, images: ImageSet) -> list[str]:
        found = []
        if self.repeats:
            again, first = self.repeats[0]
            found.append(
                f"{len(self.repeats)} of the {self.count} images in {images.name} are exact copies of others (first: "
                f"{images.describe(again)} of {images.describe(first)}), most often because a seed was used for more "
                "than one batch: the set is smaller than it looks, FID too high, Inception score and recall too low"
            )
        if self.highest <= 1:
            found.append(
                f"no pixel in {images.name} is above {self.highest} of 255: images in [0, 1] were stored without being "
                "multiplied by 255, and all features are those of black"
            )
        return found
