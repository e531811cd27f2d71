"""Sets of images, read batch by batch, and the mistakes in making them that their pixels show."""

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

SHEET = "sheet.png"  # the contact sheet in a folder of `varkern sample`
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg", ".webp")
READERS = 4  # threads that decode image files


class ImageSet(Protocol):
    """Images of one size in a fixed order."""

    name: str
    size: tuple[int, int]  # H, W

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, ``[N, 3, H, W]`` uint8 on the CPU, in batches."""
        ...

    def describe(self, number: int) -> str:
        """A name of image ``number`` that a user understands."""
        ...

    def warnings(self) -> list[str]:
        """Problems in how the images are stored that change the figures."""
        ...


class ImageFiles:
    """Image files of one size.

    Args:
        paths: at least one path, in the order of the images.
        name: name of the set; None: the folder of the first image.

    Raises:
        ImportError: if pillow is missing.
        ValueError: if the sizes differ, or a file is not an RGB image.
    """

    def __init__(self, paths: Sequence[Path], name: str | None = None):
        require_pillow("measure")
        self.paths, self.name = paths, str(paths[0].parent) if name is None else name
        self.size = read_size(self.paths[0])
        for path in self.paths[1:]:
            if (size := read_size(path)) != self.size:
                raise ValueError(
                    f"{self.name} must have images of one size, got {sides(self.size)} pixels for "
                    f"{self.paths[0].name} and {sides(size)} for {path.name}"
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
            f"{lossy} of the {len(self)} images in {self.name} are JPEG or WebP: compression changes the features and "
            "FID; write PNG"
        ]


def in_folder(folder: Path) -> ImageFiles:
    """The image files in a folder and its subfolders, in the order of their paths.

    The contact sheet of ``varkern sample`` is left out.

    Raises:
        ValueError: if there are none, the sizes differ, or a file is not an RGB image.
    """
    sheet = {folder / SHEET} if (folder / SETTINGS).exists() else set()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path not in sheet)
    if not paths:
        raise ValueError(f"{folder} must have images (files ending in {', '.join(SUFFIXES)}), got none")
    return ImageFiles(paths, str(folder))


def open_images(path: str | os.PathLike[str]) -> ImageFiles | ImageArray:
    """The images at ``path``, a folder or an ``.npz``.

    Raises:
        ValueError: if ``path`` does not exist, or has no images of this kind.
    """
    path = Path(path)
    if path.is_dir():
        return in_folder(path)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a folder of images or an .npz file")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} must be a folder of images or an .npz file")
    return ImageArray(path)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, read from its header.

    Raises:
        ValueError: if it is not an RGB image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, size = image.mode, (image.height, image.width)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or not an image: {error}") from error
    if mode != "RGB":
        kind = " (greyscale)" if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;") else ""
        raise ValueError(f"{path} must have mode RGB, got {mode}{kind}: convert it first")
    return size


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of an RGB image file, ``[H, W, 3]`` uint8.

    Raises:
        ValueError: if it is truncated or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


def as_batch(pixels: Sequence[np.ndarray]) -> Tensor:
    """Stack images ``[H, W, 3]`` uint8 to a batch ``[N, 3, H, W]``."""
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1).contiguous()


def sides(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


class PixelFacts:
    """Facts about the pixels of a set that show mistakes in making it: repeated images and the range of values."""

    def __init__(self) -> None:
        self.seen: dict[bytes, int] = {}
        self.repeats: list[tuple[int, int]] = []  # an image and the first image that is equal to it
        self.count, self.highest, self.total, self.pixels = 0, 0, 0, 0

    def add(self, batch: Tensor) -> None:
        """Add the next images, ``[N, 3, H, W]`` uint8."""
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
                f"{images.describe(again)} of {images.describe(first)}), usually because a seed was used for more than "
                "one batch: FID is too high, Inception score and recall are too low"
            )
        if self.highest <= 1:
            found.append(
                f"no pixel in {images.name} is above {self.highest} of 255: images in [0, 1] were not multiplied by "
                "255, so all images are black"
            )
        return found
