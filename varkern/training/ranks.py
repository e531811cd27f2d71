"""Several processes that train together, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Args:
        rank: its number, from 0.
        size: how many there are.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def agree(self, name: str, fact: bool) -> None:
        """Raise ``ValueError`` on every rank unless ``fact`` is the same on all."""
        count = int(self.sum(torch.tensor(int(fact), device=self.device)))
        if count not in (0, self.size):
            raise ValueError(f"{name}: true on {count} of {self.size} ranks, which must share their storage")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, by its environment variables; without it this process alone.

    Args:
        device: of a single process; under ``torchrun`` on GPUs each rank takes the one of its ``LOCAL_RANK``.
    """
    if distributed.is_initialized():  # by the caller, who also ends it
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
        return
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()
