"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
import typer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(help="From which every image's own seed is made")]


def require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def parse_classes(text: str) -> list[int]:
    """Classes such as ``207,88`` or ``0-9,20``, in the order given.

    Raises:
        ValueError: if ``text`` is no such list.
    """
    classes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= 1_000_000:
            raise ValueError(f"classes must be numbers and ranges such as 207,88 or 0-9, got {text!r}")
        classes.extend(range(first, last + 1))
    return classes
