"""The method that LSRS (dt-3t/LSRS) adds to VAR: its guidance and its random token maps.

Its search is in :mod:`varkern.lsrs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from varkern.spec import Logits, Request, is_int

from .base import Draws, check_cfg, check_options
from .var import VARFamily, VARSession

SEARCH_ARGUMENTS = ("discriminator", "st", "ed", "m_k", "top_k_lsrs", "temperature_lsrs")


class LSRSFamily(VARFamily):
    """See :class:`.base.Family`; the arguments of the search are not part of its requests."""

    method = "autoregressive_infer_cfg_lsrs"
    arguments: tuple[str, ...] = (*VARFamily.arguments, *SEARCH_ARGUMENTS, "rand_list")
    required: tuple[str, ...] = ("B", "label_B", "discriminator")

    def request(self, arguments: Mapping[str, Any]) -> Request:
        """``more_smooth`` has no effect, as in the published method.

        Raises:
            TypeError: if ``rand_list`` is neither None nor a list of scales.
        """
        known = {k: v for k, v in arguments.items() if k not in (*SEARCH_ARGUMENTS, "more_smooth", "rand_list")}
        scales = arguments.get("rand_list")
        if scales is not None and (not isinstance(scales, Collection) or not all(map(is_int, scales))):
            raise TypeError(f"rand_list must be None or a list of scales, counted from 0, got {scales!r}")
        return super().request({**known, "rand_list": tuple(sorted({int(scale) for scale in scales or ()}))})

    def check(self, model: Any, request: Request) -> None:
        check_options(self, request, ("cfg", "rand_list"))
        check_cfg(request.options.get("cfg", 1.5), request.batch_size)

    def open(self, model: Any, labels: Tensor, request: Request, draws: Draws) -> LSRSSession:
        return LSRSSession(model, labels, request, draws)


class LSRSSession(VARSession):
    """One generation by the method that LSRS adds; see :class:`.base.Session`."""

    def __init__(self, model: Any, labels: Tensor, request: Request, draws: Draws):
        super().__init__(model, labels, request, draws)
        self.draws = draws

    def logits(self, scale: int) -> Logits:
        found = super().logits(scale)
        if not self.reproduces_upstream or found.uncond is None:
            return found
        # The same guidance in another order of operations, which rounds differently.
        guided = found.uncond + (1 + found.guidance) * (found.cond - found.uncond)
        return found._replace(cond=guided, uncond=None, guidance=0.0)

    def maps(self, scale: int, drawn: Tensor) -> Tensor:
        if scale not in self.request.options["rand_list"]:
            return drawn
        _, candidates, length = drawn.shape
        return self.draws.uniform_tokens(scale, candidates, length, len(self.codebook))
