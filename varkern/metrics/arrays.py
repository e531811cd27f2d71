"""Images in the format of the published evaluation suite: an ``.npz`` with ``arr_0``, ``[N, H, W, 3]`` uint8.

They are read and written batch by batch, because 50,000 images of 256x256 pixels take 9.8 GB.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import torch
from torch import Tensor

from varkern.runs import atomically

ARRAY = "arr_0"


class ImageArray:
    """Images in an ``.npz`` of the published suite's format; only one batch is in memory at a time.

    Raises:
        ValueError: if the file has another format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.name = str(path)
        with self._open() as (shape, _):
            self.count, self.size = shape[0], (shape[1], shape[2])

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
        """Open ``arr_0``; yields its shape and the file, after the header."""
        try:
            with zipfile.ZipFile(self.name) as archive:
                names = archive.namelist()
                if f"{ARRAY}.npy" not in names:
                    found = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                    raise ValueError(f"{self.name} must have {ARRAY}, the images [N, H, W, 3] uint8, got {found}")
                with archive.open(f"{ARRAY}.npy") as file:
                    yield self._read_shape(file), file
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.name} is damaged or not an .npz file: {error}") from error

    def _read_shape(self, file: IO[bytes]) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{self.name}: {ARRAY} is damaged: {error}") from error
        if dtype != np.uint8:
            raise ValueError(
                f"{self.name}: {ARRAY} must be uint8 in 0..255, got {dtype}: first multiply images in [0, 1] by 255 "
                "and round them"
            )
        if len(shape) != 4 or shape[3] != 3 or fortran_order or shape[0] == 0:
            raise ValueError(f"{self.name}: {ARRAY} must have shape [N, H, W, 3] in C order, got {list(shape)}")
        return shape

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        height, width = self.size
        with self._open() as (_, file):
            for start in range(0, self.count, batch_size):
                count = min(batch_size, self.count - start)
                data = file.read(count * height * width * 3)
                if len(data) < count * height * width * 3:
                    raise ValueError(f"{self.name} is truncated: {ARRAY} must have {self.count} images, got fewer")
                pixels = np.frombuffer(bytearray(data), np.uint8).reshape(count, height, width, 3)
                yield torch.from_numpy(pixels).movedim(-1, 1).contiguous()

    def describe(self, number: int) -> str:
        return f"{ARRAY}[{number}]"

    def warnings(self) -> list[str]:
        return []


def write_array(path: str | os.PathLike[str], count: int, size: tuple[int, int], batches: Iterable[Tensor]) -> None:
    """Write images in the format of the published suite: an ``.npz`` with ``arr_0``, ``[N, H, W, 3]`` uint8.

    Only one batch is in memory at a time. The file has a temporary name until it is complete.

    Args:
        path: the file to write.
        count: N, number of images.
        size: H and W.
        batches: batches ``[n, 3, H, W]`` uint8 with N images in total.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
    with atomically(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        # Stored without compression, as np.savez does.
        with file.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches:
                member.write(np.ascontiguousarray(batch.movedim(1, -1).numpy()).data)
