"""A folder of images, one folder a class, and how an image becomes what the VQ-VAE takes."""

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
RESIZE = 1.125  # VAR's utils/data.py, build_dataset: the short side is brought to 1.125 times the crop


class BrokenImageError(ValueError):
    """A file that is there but holds no readable image."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, in order of class and name.

    Args:
        root: the folder.
        classes: the names of the class folders, by index.
        paths: the images' paths below ``root``.
        labels: their classes' indices.
        digest: sha256 of all labels, paths and file sizes.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]
    digest: str

    @classmethod
    def open(cls, root: str | os.PathLike, class_names: Sequence[str] | None = None) -> ImageFolder:
        """List a folder's images.

        Args:
            root: has one folder a class, which may have folders in it; files with other suffixes than images' and
                names that begin with a dot are left out.
            class_names: which name has which index; they need not all have a folder. None: the sorted names.

        Raises:
            ValueError, OSError: if there are no class folders, a class folder has no image, or its class is unknown.
        """
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"images must be a folder, got {root}")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise ValueError(f"{root} has no class folders: it must have one folder a class")
        classes = list(found if class_names is None else class_names)
        if len(set(classes)) != len(classes):
            raise ValueError(f"class names must differ, got {next(n for n in classes if classes.count(n) > 1)!r} twice")
        index = {name: number for number, name in enumerate(classes)}
        digest, paths, labels = hashlib.sha256(), [], []
        for name in found:
            if name not in index:
                raise ValueError(f"class {name!r}, a folder of {root}, is unknown: it is not among the class names")
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
    """The images in ``root / folder`` and the folders in it: path below ``root``, size in bytes; in any order."""
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


def read_image(path: str | os.PathLike, size: int, resize: float = RESIZE) -> np.ndarray:
    """An image as VAR's validation transform has it (``build_dataset`` in its ``utils/data.py``).

    The short side is brought to ``round(resize * size)`` with Lanczos, the long one in proportion, rounded down; then
    the centre is cropped. Modes other than RGB are converted, which drops alpha; EXIF orientation is not applied, as
    it is not there.

    Args:
        path: the file.
        size: side of the crop.
        resize: at least 1.

    Returns:
        ``[3, size, size]`` uint8.

    Raises:
        OSError: if the file cannot be opened.
        BrokenImageError: if it holds no readable image.
    """
    from PIL import Image

    content = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as file:
            picture = file.convert("RGB")
        return centre_crop(picture, size, round(resize * size))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds of errors
        raise BrokenImageError(f"{path} is no readable image: {type(error).__name__}: {error}") from error


def centre_crop(picture, size: int, short: int) -> np.ndarray:
    """A picture's centre ``[3, size, size]`` uint8 after bringing its short side to ``short``."""
    from PIL import Image

    width, height = picture.size
    scale = short / min(width, height)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * scale * height * scale > 2 * limit:
        raise ValueError(f"it is too elongated to be resized: {width}x{height}")
    width, height = (short if s == min(width, height) else int(short * s / min(width, height)) for s in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return rearrange(np.asarray(picture.crop((left, top, left + size, top + size))), "h w c -> c h w")
