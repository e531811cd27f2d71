"""Wrappers as of adapters (PEFT): what they lack they look up in the model that they hold."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class Adapted(nn.Module):
    """Holds a model as ``base_model``; before it has its state, no other attribute can be found."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


class AdaptedTwice(Adapted):
    """A wrapper of a wrapper, as PEFT's model around its tuner is."""

    def __init__(self, model: nn.Module):
        super().__init__(Adapted(model))


class CopiesItself(nn.Module):
    """A mix-in for a class that copies its ``__dict__`` itself, by the usual recipe."""

    def __deepcopy__(self, memo: dict) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            vars(twin)[name] = copy.deepcopy(value, memo)
        return twin
