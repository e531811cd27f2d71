"""A training loop: AdamW, linear warm-up and cosine decay, a progress bar, and checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkern.progress import progress_bar
from varkern.runs import check_settings, write_checkpoint

SECONDS_BETWEEN_CHECKPOINTS = 60.0


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning rate at ``step`` divided by its peak: linear over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@dataclass
class Checkpoint:
    """The state of an unfinished run: model, optimizer, further tensors, and the number of finished steps.

    The schedule and the random numbers depend only on the step, so the checkpoint does not hold them.

    Args:
        path: the file.
        model, optimizer: saved and loaded.
        carried: further tensors that the run changes in place.
        settings: settings of the run, JSON values; a checkpoint with other settings is refused.
    """

    path: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> int:
        """Load the file; returns the number of finished steps, 0 if there is no file.

        Raises:
            ValueError: if the file cannot be read, or was made with other settings.
        """
        if not self.path.exists():
            return 0
        device = next(self.model.parameters()).device
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            former = dict(state["settings"])
        except Exception as error:
            raise ValueError(f"{self.path} is not a readable checkpoint, remove it to start again: {error}") from error
        check_settings(self.path, former, self.settings, "remove it to start again")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in self.carried.items():
            tensor.copy_(state["carried"][name])
        return state["step"]

    def save(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
        write_checkpoint(self.path, state | {"carried": dict(self.carried), "settings": dict(self.settings)})


def fit(
    name: str,
    model: nn.Module,
    batch_loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    warmup: int = 100,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    max_norm: float | None = 1.0,
    after_step: Callable[[int], None] | None = None,
    carried: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    begin: Callable[[int], None] | None = None,
    finish: Callable[[], None] | None = None,
    main: bool = True,
) -> None:
    """Train ``model`` in place for ``steps`` steps, continuing from ``checkpoint`` if it exists.

    Before each step PyTorch's default generator is seeded with ``seed`` and the step. A resumed run therefore draws the
    same batches as an uninterrupted one.

    Args:
        name: description of the progress bar.
        model: the model, trained in place; only parameters that require gradients are changed.
        batch_loss: step number -> scalar loss; draws its batch from PyTorch's default generator.
        steps, learning_rate, warmup, weight_decay, betas, eps: number of steps, and settings of AdamW and its schedule.
            Without weight decay AdamW is Adam.
        max_norm: largest norm of the gradient, to which it is clipped; None means no clipping.
        seed: seed of the run.
        checkpoint: file for the state of the run, written about once a minute and removed at the end.
        after_step: called with the step number after each update.
        carried: further tensors that the run changes in place and that a checkpoint must hold.
        settings: settings of the run, JSON values; a checkpoint with other settings is refused.
        begin: called once with the number of the first step, after the checkpoint is loaded.
        finish: called at the end, before the checkpoint is removed, to save the model.
        main: False for all processes except the first, which shows progress and writes files.

    Raises:
        ValueError: if the checkpoint cannot be read or was made with other settings.
        OSError: if a checkpoint cannot be written; the previous one is kept.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
    state = Checkpoint(checkpoint, model, optimizer, carried or {}, settings or {})
    start = state.load()
    if begin is not None:
        begin(start)
    model.train()
    saved = time.monotonic()
    average = None
    with progress_bar(quiet=not main) as progress:
        task = progress.add_task(name, total=steps, completed=start, note="")
        for step in range(start, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps, warmup)
            loss = batch_loss(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            if step % 10 == 0:
                value = loss.item()
                average = value if average is None else 0.9 * average + 0.1 * value
                progress.update(task, completed=step + 1, note=f"loss {average:.4f}")
            if main and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                state.save(step + 1)
                saved = time.monotonic()
        progress.update(task, completed=steps)
    model.eval()
    if main:
        if finish is not None:
            finish()
        checkpoint.unlink(missing_ok=True)
