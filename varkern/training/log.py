"""What a training leaves to read: a CSV, TensorBoard's files where it is installed, and where the time went."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from varkern.runs import atomically

SAMPLED_EVERY = 16  # on a GPU measuring a step waits for it, so few are measured


class Log:
    """One row every so many steps: ``path`` as CSV, and scalars for TensorBoard beside it.

    Args:
        path: the CSV; TensorBoard's folder has its name with ``.tensorboard`` for the suffix.
        columns: of the CSV; the first is ``step``.
        start: rows of later steps, which a killed run did beyond its last checkpoint, are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], start: int):
        self.path, self.columns = path, list(columns)
        rows = [row for row in read_rows(path, self.columns) if int(row["step"]) <= start]
        with atomically(path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.board = open_tensorboard(path.with_suffix(".tensorboard"), start)

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; columns that it lacks stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(
                {name: value if isinstance(value, int) else f"{value:.8g}" for name, value in row.items()}
            )
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The whole rows of a CSV that :class:`Log` wrote; a row that a kill cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        content = file.read()
    with_end = content[: content.rfind("\n") + 1]
    rows = csv.DictReader(with_end.splitlines())
    if rows.fieldnames != list(columns):
        return []
    return [row for row in rows if None not in row and row["step"].isdecimal() and None not in row.values()]


def open_tensorboard(folder: Path, start: int):
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


class Stopwatch:
    """How the time of a step is shared out among its phases: all steps on a CPU, one in sixteen on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, {}, None

    def start(self, step: int) -> None:
        if self.device.type == "cuda" and step % SAMPLED_EVERY:
            self.last = None
            return
        self.last = self._now()

    def lap(self, phase: str) -> None:
        """The time since ``start`` or the last lap went to ``phase``."""
        if self.last is not None:
            now = self._now()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
            self.last = now

    def shares(self) -> dict[str, float]:
        """The share of each phase, summing to 1; empty if nothing was measured."""
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()} if total else {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
