"""The method that LSRS (dt-3t/LSRS) adds to VAR: its arguments as a search.

``autoregressive_infer_cfg_lsrs`` gets its scorer and the number of candidates with every call. :class:`CalledSearch`
turns these arguments into a search, and the loop does the rest.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from varkern.families import Family, LSRSFamily
from varkern.fingerprints import find_difference
from varkern.literals import Sampler
from varkern.scorer import Scorer
from varkern.search import BestOfM, Candidates, Choice, PublishedScorer, Search
from varkern.search.scoring import temperature_at
from varkern.spec import is_int, is_number

WRAPPED = 4  # wrapped networks kept, so that captured generations find their scorer again


class PublishedBestOfM(BestOfM):
    """Draws among the k best as the published method does: by ``torch.multinomial``, from PyTorch's own generator."""

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`varkern.search.Search`."""
        if self.pick == "best":
            return super().choose(candidates)
        assert isinstance(self.pick, int), "the published method has no other pick"
        scores = self.score(candidates)
        temperature = temperature_at(self.temperature, self.scorer, candidates.scale)
        best = scores.topk(min(self.pick, scores.shape[1]), dim=1)
        drawn = torch.multinomial((best.values / temperature).softmax(1), 1)
        return Choice(best.indices.gather(1, drawn)[:, 0], scores)


class CalledSearch:
    """The search that a call of the published method asks for.

    Args:
        num_scales: K of the model.
        sampler: ``"philox"``: the pick among the k best is a function of the images' seeds; ``"multinomial"``: it is
            drawn as published.
    """

    def __init__(self, num_scales: int, sampler: Sampler):
        self.num_scales, self.kind = num_scales, BestOfM if sampler == "philox" else PublishedBestOfM
        self.wrapped: list[tuple[Any, PublishedScorer]] = []

    def __repr__(self) -> str:
        return "as called"

    def __call__(self, arguments: Mapping[str, Any]) -> Search | None:
        """The search of the method's arguments, by name; None if every scale has one candidate.

        Raises:
            TypeError, ValueError: naming the argument that is wrong.
        """
        scorer = self.scorer(arguments["discriminator"])
        first, stop, count = (arguments[name] for name in ("st", "ed", "m_k"))
        pick, temperature = arguments["top_k_lsrs"], arguments["temperature_lsrs"]
        for name, value in (("st", first), ("ed", stop)):
            if not is_int(value):
                raise TypeError(f"{name} must be an int, a scale counted from 0, got {value!r}")
        for name, value in (("m_k", count), ("top_k_lsrs", pick)):
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if pick == 1:  # the published method does not look at the temperature then
            temperature = 1.0
        elif not is_number(temperature) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature_lsrs must be a finite number > 0, got {temperature!r}")
        m = tuple(int(count) if first <= scale < stop else 1 for scale in range(self.num_scales))
        if max(m) == 1:
            return None
        return self.kind(scorer, m, pick="best" if pick == 1 else int(pick), temperature=temperature)

    def scorer(self, discriminator: Any) -> Scorer | PublishedScorer:
        """A discriminator as a scorer: wrapped, unless it is one of varkern's own."""
        if isinstance(discriminator, Scorer | PublishedScorer):
            return discriminator
        if not callable(discriminator) or isinstance(discriminator, type):
            raise TypeError(
                "discriminator must be a network (features[N, C, H, W], labels[N], scales[N]) -> scores[N, 1] or a "
                f"varkern.Scorer, got {discriminator!r}"
            )
        for network, wrapped in self.wrapped:
            if network is discriminator:
                return wrapped
        self.wrapped = [*self.wrapped[1 - WRAPPED :], (discriminator, PublishedScorer(discriminator))]
        return self.wrapped[-1][1]


def published_method(model: Any, family: Family) -> LSRSFamily | None:
    """The family of the method that LSRS adds, if ``model``, of ``family``, has it with its published arguments."""
    method = getattr(model, LSRSFamily.method, None)
    if family.name != LSRSFamily.name or not callable(method):
        return None
    names = set(inspect.signature(method).parameters)
    if not names >= set(LSRSFamily.arguments) or find_difference(model, LSRSFamily(), method) is not None:
        return None
    return LSRSFamily()
