"""Best of M: a scorer judges every candidate token map (LSRS, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from varkern.literals import Pick, Temperature
from varkern.ops.philox import gumbel
from varkern.spec import ModelSpec, is_int

from .base import Candidates, Choice, Scorer
from .scorers import check_scorer, describe_scorer
from .scoring import (
    check_scales,
    check_scales_exist,
    check_scorer_fits,
    check_scorer_knows,
    check_scoring,
    score_maps,
    temperature_at,
)


class BestOfM:
    """Draw M candidates per scale and keep one by its score.

    ``pick="best"`` keeps the highest score (the paper's eq. 6). ``pick=k`` draws among the k highest with probability
    softmax(score / temperature) (the paper's appendix G). ``pick="resample"`` draws among all M that way.

    Resampling has the better limit, for this reason. Both losses of the paper (eq. 4 and 5) are minimal for the scorer
    ``S(c, e, k) = log p_real(e | c, k) - log p_model(e | c, k) + const(c, k)``. The pointwise loss is a logistic
    regression of real against generated features, whose optimum is the log-odds. The pairwise loss has the same
    optimum, up to the constant. The M candidates of one image share all their earlier scales and are drawn from
    ``p_model(r_k | r_<k, c)``. Therefore, up to a factor that they share,

        exp S = p_real(r_<=k) / p_model(r_<=k)  ~  p_real(r_k | r_<k) / p_model(r_k | r_<k),

    which is the importance weight of the real conditional distribution against the model's. Drawing one candidate with
    probability proportional to exp S is sampling importance resampling: as M grows, its distribution tends to
    ``p_real(r_k | r_<k, c)``. The highest score instead tends to the one map with the largest ratio, which is the same
    for every seed. For this reason greedy picks get worse again at large M (the paper's Table 5), and already at small
    M at the first scale, which decides the diversity (its Table 3).

    Args:
        scorer: a :class:`varkern.Scorer`, or any callable ``(labels[B], features[B, M, C, H, W], scale) ->
            scores[B, M]``. If it has a ``config`` with ``num_classes``, ``num_scales``, ``channels`` or ``size``, these
            are checked against the model. A module is moved to the model's device when it is first used there. A
            network of LSRS' own class goes through :class:`varkern.PublishedScorer`.
        m: number of candidates at every searched scale, or a sequence with one number per scale (1: no search there).
        first_scale: the first searched scale, counted from 0; the paper's ST is ``first_scale + 1``.
        last_scale: the last searched scale; None: the model's last. Neither can be combined with a sequence ``m``.
        pick: ``"best"``, ``"resample"`` or an int k >= 1.
        temperature: of the softmax, for ``"resample"`` and k: a number, or ``"fitted"`` for that of each scale in the
            scorer's file, under which its scores were calibrated on held-out pairs.
        maps_at_once: how many feature maps of the batch exist and are scored at a time. The features take at most
            ``max(maps_at_once, B) * C * H * W`` elements, whatever ``m`` is.

    Raises:
        ValueError, TypeError: if an argument is out of its range.

    Example::

        >>> search = varkern.BestOfM(scorer, m=8, pick="resample")
        >>> varkern.generate(var, labels, search=search, seeds=0).images.shape
        torch.Size([8, 3, 24, 24])
    """

    scorer: Scorer
    first_scale: int
    last_scale: int | None
    pick: Pick | int
    temperature: Temperature
    maps_at_once: int

    def __init__(
        self,
        scorer: Scorer,
        m: int | Sequence[int] = 4,
        first_scale: int = 1,
        last_scale: int | None = None,
        pick: Pick | int = "best",
        temperature: Temperature = 1.0,
        *,
        maps_at_once: int = 1024,
    ):
        check_scorer(scorer)
        if not is_int(m) and (not isinstance(m, Sequence) or isinstance(m, str)):
            raise TypeError(f"m must be an int or a sequence of ints, got {m!r}")
        counts: Sequence[int] = (m,) if is_int(m) else m
        for number in counts:
            if not is_int(number) or number < 1:
                raise ValueError(f"m must be >= 1, got {number!r}")
        self.m: int | tuple[int, ...] = int(m) if is_int(m) else tuple(int(number) for number in m)
        if not isinstance(self.m, int) and (first_scale != 1 or last_scale is not None):
            raise ValueError(
                "first_scale and last_scale cannot be combined with a per-scale m; use 1 for scales not to search"
            )
        check_scales(first_scale, last_scale)
        if pick not in get_args(Pick) if isinstance(pick, str) else not is_int(pick) or pick < 1:
            raise ValueError(f"pick must be 'best', 'resample' or an int >= 1, got {pick!r}")
        check_scoring(temperature, maps_at_once, scorer)
        self.scorer, self.first_scale, self.last_scale = scorer, first_scale, last_scale
        self.pick, self.temperature, self.maps_at_once = pick, temperature, maps_at_once

    def __repr__(self) -> str:
        settings = [describe_scorer(self.scorer), f"m={self.m}"]
        if isinstance(self.m, int):
            settings += [f"first_scale={self.first_scale}", f"last_scale={self.last_scale}"]
        settings.append(f"pick={self.pick!r}")
        if self.pick != "best":
            settings.append(f"temperature={self.temperature!r}")
        return f"BestOfM({', '.join(settings)})"

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        if not isinstance(self.m, int) and len(self.m) != spec.num_scales:
            raise ValueError(f"m must have one number for each of {spec.num_scales} scales, got {len(self.m)}")
        if isinstance(self.m, int):
            check_scales_exist(self.first_scale, self.last_scale, spec)
        check_scorer_fits(self.scorer, spec)

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """See :class:`.base.Search`; a scorer with a ``num_classes`` knows only these classes, not "no class".

        A search with one candidate at every scale scores nothing, and takes every label.
        """
        if all(self.num_candidates(scale, spec.num_scales) == 1 for scale in range(spec.num_scales)):
            return
        check_scorer_knows(self.scorer, highest, spec)

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """See :class:`.base.Search`."""
        if not isinstance(self.m, int):
            return self.m[scale]
        last = num_scales - 1 if self.last_scale is None else self.last_scale
        return self.m if self.first_scale <= scale <= last else 1

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`.base.Search`."""
        scores = self.score(candidates)
        if self.pick == "best":
            return Choice(scores.argmax(-1), scores)
        weights = scores / temperature_at(self.temperature, self.scorer, candidates.scale)
        if self.pick != "resample" and self.pick < scores.shape[-1]:
            best = scores.topk(self.pick, dim=-1).indices
            weights = torch.full_like(weights, -math.inf).scatter(-1, best, weights.gather(-1, best))
        # Gumbel-max: the largest of log-weight plus Gumbel noise is a draw by softmax.
        return Choice((weights + gumbel(candidates.uniforms())).argmax(-1), scores)

    def score(self, candidates: Candidates) -> Tensor:
        """Scores ``[B, M]`` float32; see :func:`.scoring.score_maps`."""
        return score_maps(self.scorer, candidates, candidates.fuse, candidates.tokens.shape[1], self.maps_at_once)
