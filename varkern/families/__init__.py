"""The kinds of model that varkern supports, recognised by structure and not by class name."""

from __future__ import annotations

from varkern.errors import UnsupportedModelError

from .base import Family, Session
from .flexvar import FlexVARFamily
from .infinity import InfinityFamily
from .var import VARFamily
from .var_lsrs import LSRSFamily
from .watching import WATCHES, Watch

SHOWN = 16  # missing attributes in an error message
FAMILIES: tuple[Family, ...] = (VARFamily(), FlexVARFamily(), InfinityFamily())

__all__ = ["FAMILIES", "WATCHES", "Family", "LSRSFamily", "Session", "Watch", "recognise"]


def recognise(model: object) -> Family:
    """The family that ``model`` belongs to.

    Raises:
        UnsupportedModelError: if it fits none; the message names the nearest family and what the model lacks.
    """
    lacking = {family: family.missing(model) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(lacking[family]) / len(family.missing(object())))
    if not lacking[nearest]:
        return nearest
    for name in ("module", "_orig_mod", "base_model"):
        inner = getattr(model, name, None)
        if any(inner is not None and not family.missing(inner) for family in FAMILIES):
            raise UnsupportedModelError(f"{type(model).__name__} wraps a model of a known family: pass model.{name}")
    names = lacking[nearest]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UnsupportedModelError(
        f"{type(model).__name__} fits no family of models: {nearest.name} needs {', '.join(names[:SHOWN])}{more}"
    )
