"""One training loop: AdamW, linear warm-up and cosine decay, progress, and checkpoints that survive a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from varkern.files import atomically
from varkern.progress import progress_bar

SECONDS_BETWEEN_CHECKPOINTS = 60.0


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at ``step``: linear from 0 over ``warmup`` steps, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def save_atomically(state: dict, path: Path) -> None:
    with atomically(path) as unfinished:
        torch.save(state, unfinished)


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
    max_norm: float = 1.0,
    after_step: Callable[[int], None] | None = None,
    carried: Mapping[str, Tensor] | None = None,
) -> None:
    """Train ``model`` in place for ``steps`` steps, going on from ``checkpoint`` if there is one.

    PyTorch's default generator is seeded anew from ``seed`` and the step before each step, so that a run that was
    killed and taken up again draws the same batches as an unbroken one.

    Args:
        name: what the progress bar says.
        model: trained in place.
        batch_loss: step number -> scalar loss; draws its batch from PyTorch's default generator.
        steps, learning_rate, warmup, weight_decay, max_norm: the usual; ``max_norm`` clips the gradient.
        seed: of the whole run.
        checkpoint: file for the state in between, written about once a minute and removed at the end.
        after_step: called with the step number after each update.
        carried: further tensors that the run changes in place and that a checkpoint must hold.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=next(model.parameters()).device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for key, tensor in (carried or {}).items():
            tensor.copy_(state["carried"][key])
        start = state["step"]
    model.train()
    saved = time.monotonic()
    average = None
    with progress_bar() as progress:
        task = progress.add_task(name, total=steps, completed=start, note="")
        for step in range(start, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps, warmup)
            loss = batch_loss(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            if step % 10 == 0:
                value = loss.item()
                average = value if average is None else 0.9 * average + 0.1 * value
                progress.update(task, completed=step + 1, note=f"loss {average:.4f}")
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                state["carried"] = dict(carried or {})
                save_atomically(state, checkpoint)
                saved = time.monotonic()
        progress.update(task, completed=steps)
    checkpoint.unlink(missing_ok=True)
    model.eval()
