"""Folders of images, with one folder per class, and the conversion of an image to the VQ-VAE's input."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
RESIZE = 1.125  # VAR's utils/data.py, build_dataset: the short side is resized to 1.125 times the crop


class BrokenImageError(ValueError):
    """The file exists but does not hold a readable image."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, sorted by class and name.

    Args:
        root: the folder.
        classes: names of the classes, by index.
        paths: paths of the images, relative to ``root``.
        labels: class index of each image.
        digest: sha256 of all labels, paths and file sizes.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]
    digest: str

    @classmethod
    def open(cls, root: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> ImageFolder:
        """List a folder's images.

        Args:
            root: a folder with one folder per class, which may have subfolders. Files that do not have the suffix of
                an image and names that begin with a dot are ignored.
            class_names: names of the classes, by index; a class needs no folder. None means the sorted folder names.

        Raises:
            ValueError: if there are no class folders, or a class folder has no image or is not in ``class_names``.
            OSError: if a folder cannot be read.
        """
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"images must be a folder, got {root}")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise ValueError(f"images must be a folder with one folder per class, got {root} without folders")
        classes = list(found if class_names is None else class_names)
        if len(set(classes)) != len(classes):
            raise ValueError(f"class_names must differ, got {next(n for n in classes if classes.count(n) > 1)!r} twice")
        index = {name: number for number, name in enumerate(classes)}
        digest, paths, labels = hashlib.sha256(), [], []
        for name in found:
            if name not in index:
                raise ValueError(f"class_names must hold every class folder of {root}, got none for {name!r}")
            files = sorted(images_below(root, name))
            if not files:
                raise ValueError(f"class folder {root / name} has no images")
            for path, size in files:
                digest.update(f"{index[name]}\t{path}\t{size}\n".encode(errors="surrogateescape"))
                paths.append(path)
                labels.append(index[name])
        return cls(root, classes, paths, labels, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.paths)


def images_below(root: Path, folder: str) -> list[tuple[str, int]]:
    """List the images in ``root / folder`` and its subfolders as (path relative to ``root``, bytes), in any order."""
    found = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += images_below(root, f"{folder}/{entry.name}")
            elif entry.name.lower().endswith(SUFFIXES):
                found.append((f"{folder}/{entry.name}", entry.stat().st_size))
    return found


def read_image(path: str | os.PathLike[str], size: int, resize: float = RESIZE) -> np.ndarray:
    """Read an image as VAR's validation transform does (``build_dataset`` in its ``utils/data.py``).

    The short side is resized to ``round(resize * size)`` with Lanczos and the long side in proportion, rounded down.
    Then the centre is cropped. Other modes are converted to RGB, which drops alpha. As in VAR, EXIF orientation is
    ignored.

    Args:
        path: the image file.
        size: side of the crop, in pixels.
        resize: short side of the resized image divided by ``size``; at least 1.

    Returns:
        ``[3, size, size]`` uint8.

    Raises:
        OSError: if the file cannot be opened.
        BrokenImageError: if the file does not hold a readable image.
    """
    from PIL import Image

    content = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as file:
            image = file.convert("RGB")
        return crop_centre(image, size, round(resize * size))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds of errors
        raise BrokenImageError(f"{path} is not a readable image: {type(error).__name__}: {error}") from error


def crop_centre(image, size: int, short: int) -> np.ndarray:
    """Resize the short side of a Pillow image to ``short`` and crop its centre, ``[3, size, size]`` uint8."""
    from PIL import Image

    width, height = image.size
    scale = short / min(width, height)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * scale * height * scale > 2 * limit:
        raise ValueError(f"too elongated to be resized, {width}x{height}")
    width, height = (short if s == min(width, height) else int(short * s / min(width, height)) for s in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return rearrange(np.asarray(image.crop((left, top, left + size, top + size))), "h w c -> c h w")
