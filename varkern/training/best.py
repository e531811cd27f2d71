"""The weights with the best validation so far, kept while training continues."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

LARGER_IS_BETTER = {"accuracy": True, "loss": False}


class BestWeights:
    """A copy of a model's state at its best validation. It consists of tensors, which a checkpoint can hold.

    Args:
        model: the model that is trained.
        by: ``"accuracy"`` or ``"loss"``: the validation figure to compare, averaged over the scales.
        num_scales: number of scales that are validated.
    """

    def __init__(self, model: nn.Module, by: str, num_scales: int):
        self.by, self.sign = by, 1.0 if LARGER_IS_BETTER[by] else -1.0
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.step = torch.zeros((), dtype=torch.int64)
        self.figures = {name: torch.full((num_scales,), math.nan, dtype=torch.float64) for name in LARGER_IS_BETTER}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of this object, by name."""
        state = {f"best.{name}": tensor for name, tensor in self.state.items()}
        return state | {f"best_{name}": tensor for name, tensor in self.figures.items()} | {"best_step": self.step}

    def offer(self, model: nn.Module, step: int, validation: Mapping[str, Sequence[float]]) -> None:
        """Keep the model's state if its validation after ``step`` steps is better than every earlier one, not equal."""
        before, now = float(self.figures[self.by].mean()), torch.tensor(validation[self.by], dtype=torch.float64)
        if self.step and not self.sign * float(now.mean()) > self.sign * before:
            return
        self.step.fill_(step)
        for name, tensor in self.figures.items():
            tensor.copy_(torch.tensor(validation[name], dtype=torch.float64))
        for name, tensor in model.state_dict().items():
            self.state[name].copy_(tensor)

    def restore(self, model: nn.Module) -> dict[str, object]:
        """Load the best state into ``model``; returns its step and its validation, by scale."""
        model.load_state_dict(self.state)
        validation = {name: tensor.tolist() for name, tensor in self.figures.items()}
        return {"best_step": int(self.step), "validation": validation}
