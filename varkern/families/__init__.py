"""The kinds of model that varkern supports, recognised by structure and not by class name."""

from __future__ import annotations

from varkern.errors import UnsupportedModelError

from .base import Family, Session
from .flexvar import FlexVARFamily
from .infinity import InfinityFamily
from .var import VARFamily
from .var_lsrs import LSRSFamily

FAMILIES: tuple[Family, ...] = (VARFamily(), FlexVARFamily(), InfinityFamily())

__all__ = ["FAMILIES", "Family", "LSRSFamily", "Session", "recognise"]


def recognise(model: object) -> Family:
    """The family that ``model`` belongs to.

    Raises:
        UnsupportedModelError: if it fits none; the message lists for each family what the model lacks.
    """
    lacking = {family.name: family.missing(model) for family in FAMILIES}
    for family in FAMILIES:
        if not lacking[family.name]:
            return family
    found = "; ".join(f"{name} needs {', '.join(names)}" for name, names in lacking.items())
    raise UnsupportedModelError(f"{type(model).__name__} fits no family of models: {found}")
