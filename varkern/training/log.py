"""The log of a training: a CSV file, TensorBoard files if TensorBoard is installed, and shares of time."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from varkern.runs import atomically

SAMPLED_EVERY = 16  # on a GPU, measuring a step waits for the device, so only a few steps are measured


class Log:
    """Writes rows to a CSV file, and the same values as scalars for TensorBoard.

    Args:
        path: the CSV file; TensorBoard's folder has the same name with the suffix ``.tensorboard``.
        columns: columns of the CSV; the first is ``step``.
        start: the step at which the run starts. Rows of later steps, which a killed run wrote after its last
            checkpoint, are removed.
    """

    def __init__(self, path: Path, columns: Sequence[str], start: int):
        self.path, self.columns = path, list(columns)
        self.rows = [row for row in read_rows(path, self.columns) if int(row["step"]) <= start]
        self.save()
        self.board = open_tensorboard(path.with_suffix(".tensorboard"), start)

    def save(self) -> None:
        """Write all rows, so that a killed run leaves no incomplete one."""
        with atomically(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; missing columns stay empty."""
        self.rows.append({name: value if isinstance(value, int) else f"{value:.8g}" for name, value in row.items()})
        self.save()
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV that :class:`Log` wrote; none if it has other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return list(rows) if rows.fieldnames == list(columns) else []


def open_tensorboard(folder: Path, start: int):
    """Return TensorBoard's writer, or None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


class Stopwatch:
    """Measures the share of each phase in the time of a step: all steps on a CPU, one of sixteen on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, {}, None

    def start(self, step: int) -> None:
        if self.device.type == "cuda" and step % SAMPLED_EVERY:
            self.last = None
            return
        self.last = self._now()

    def lap(self, phase: str) -> None:
        """Add the time since ``start`` or the last lap to ``phase``."""
        if self.last is not None:
            now = self._now()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
            self.last = now

    def shares(self) -> dict[str, float]:
        """The share of each phase; they sum to 1. Empty if nothing was measured."""
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()} if total else {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
