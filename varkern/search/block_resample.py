"""Resample a map block by block: blocks of fresh candidates are put into one map, and a scorer decides which stay.

Inside a scale the model's tokens are independent given the earlier scales, ``p_model(r) = prod_i p_i(r_i)``. Therefore
any block of another candidate is an exact draw of the model's distribution of that block, ``p_b``, whatever the rest of
the map is. One step takes a map x with score weight ``w(x) = exp(S(x) / temperature)`` and a block b, draws P proposals
``y_1 .. y_P`` for the block from ``p_b``, puts each into x, and keeps one of the P + 1 maps, x itself among them, with
probability proportional to its weight.

**The step leaves** ``pi(r) = p_model(r) w(r) / Z`` **unchanged.** For maps x and y that differ only in block b,

    pi(x) K(x -> y) = p_model(x) w(x) / Z * P p_b(y_b) * E[w(y) / (w(x) + w(y) + sum of P - 1 other weights)],

where the expectation is over the other proposals, drawn from ``p_b``. As ``p_model(x) p_b(y_b) = p_model(y) p_b(x_b)``
for such maps, exchanging x and y changes nothing: the step is reversible with respect to pi, so a sequence of steps
over all blocks, in any order that does not depend on the map, keeps pi too. This holds for any P and any partition into
blocks, as long as no proposal is used twice for one position. With a scorer trained by either loss of LSRS, S estimates
``log p_real(r) / p_model(r)`` up to a constant of the earlier scales (see :class:`.BestOfM`), and pi is then
``p_real(r | earlier scales)``.

Sources: the step is iterated sampling importance resampling (Tjelmeland, "Using all Metropolis-Hastings proposals to
estimate mean values", 2004; Andrieu, Lee, Vihola, "Uniform ergodicity of the iterated conditional SMC and particle
Gibbs samplers", Bernoulli 24, 2018) inside a Gibbs sweep over blocks. For one proposal the probability of accepting it
is ``w(y) / (w(x) + w(y))``, the rule of Barker ("Monte Carlo calculations of the radial distribution functions for a
proton-electron plasma", 1965). The first map is chosen by sampling importance resampling among m, as ``BestOfM`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from varkern.literals import Pick, Temperature, check_word
from varkern.ops.keeping import Kept, keep_maps
from varkern.ops.philox import gumbel
from varkern.spec import ModelSpec, is_int

from .base import Candidates, Choice, Scorer
from .diagnostics import Steps
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

Blocks = int | Mapping[int, int] | Callable[[int, int], int]
"""A block side; one for each side of a map, in a table; or a function ``(scale, side) -> block side``."""


class BlockResample:
    """Choose one of m maps by its score, then improve it block by block with blocks of fresh candidates.

    Whole maps of independent tokens seldom have all their parts right at once, so the quality of best-of-M grows with
    log M only. This search keeps the good parts: for each block of the map in turn, it puts the blocks of ``proposals``
    other candidates there, scores the maps composed in this way, and keeps one of them or the map as it was.

    With ``pick="resample"`` each choice is a draw with probability softmax(score / temperature). More sweeps then
    approach the distribution ``p_model(map) * exp(score / temperature)``, which is that of real images for an exact
    scorer; the module's docstring shows why. ``pick="best"`` always keeps the highest score, which is coordinate ascent
    over blocks. It approaches the one map with the largest ratio of real to generated, as :class:`BestOfM` explains,
    so the images lose diversity.

    A scale scores ``m + sweeps * blocks * proposals`` maps for each image, one block after the other. It draws ``m +
    sweeps * proposals`` candidates, because the blocks of a sweep do not overlap: one candidate serves all of them, and
    each of its tokens is proposed once. With ``proposals=0`` the search is ``BestOfM(scorer, m, pick=pick)``.

    Args:
        scorer: as for :class:`BestOfM`.
        m: number of whole maps for the first choice; 1: begin with the one map that the model draws without a search.
        proposals: number of other candidates whose blocks are tried at each block; 0: none.
        blocks: side of a block, in positions of the transformer; or a dict from the side of a map (the longer one) to
            that of its blocks; or a function ``(scale, side) -> block side``. None: single positions up to side 2, else
            a quarter of the side, and 2 at least. This gives 4 blocks at sides 2 to 4, 9 at 5, 6 and 9, and 16 at the
            published sides from 8 on.
        sweeps: how often every block is tried. In each sweep the edges between blocks lie elsewhere, by up to half a
            block, at a place that the image's seed decides.
        first_scale: the first searched scale, counted from 0.
        last_scale: the last searched scale; None: the model's last.
        pick: ``"resample"`` or ``"best"``.
        temperature: of the softmax, for ``"resample"``; a number or ``"fitted"``, as for :class:`BestOfM`.
        maps_at_once: as for :class:`BestOfM`.

    Raises:
        ValueError, TypeError: if an argument is out of its range.

    Example::

        >>> search = varkern.BlockResample(scorer, m=4, proposals=4)
        >>> result = varkern.generate(var, labels, search=search, seeds=0)
        >>> [None if scores is None else scores.shape[1] for scores in result.scores]
        [None, 20, 20, 20, 40]
    """

    scorer: Scorer
    m: int
    proposals: int
    blocks: Blocks | None
    sweeps: int
    first_scale: int
    last_scale: int | None
    pick: Pick
    temperature: Temperature
    maps_at_once: int

    def __init__(
        self,
        scorer: Scorer,
        m: int = 8,
        proposals: int = 8,
        blocks: Blocks | None = None,
        sweeps: int = 1,
        first_scale: int = 1,
        last_scale: int | None = None,
        pick: Pick = "resample",
        temperature: Temperature = 1.0,
        *,
        maps_at_once: int = 1024,
    ):
        check_scorer(scorer)
        for name, count, least in (("m", m, 1), ("proposals", proposals, 0), ("sweeps", sweeps, 1)):
            if not is_int(count) or count < least:
                raise ValueError(f"{name} must be an int >= {least}, got {count!r}")
        check_blocks(blocks)
        check_scales(first_scale, last_scale)
        check_word("pick", pick, Pick)
        check_scoring(temperature, maps_at_once, scorer)
        self.scorer, self.m, self.proposals, self.sweeps = scorer, int(m), int(proposals), int(sweeps)
        self.blocks = dict(blocks) if isinstance(blocks, Mapping) else blocks
        self.first_scale, self.last_scale = first_scale, last_scale
        self.pick, self.temperature, self.maps_at_once = pick, temperature, maps_at_once

    def __repr__(self) -> str:
        names = ["m", "proposals", "blocks", "sweeps", "first_scale", "last_scale", "pick"]
        names += ["temperature"] if self.pick != "best" else []
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"BlockResample({describe_scorer(self.scorer)}, {settings})"

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        check_scales_exist(self.first_scale, self.last_scale, spec)
        check_scorer_fits(self.scorer, spec)
        for scale in range(spec.num_scales):
            if self.num_candidates(scale, spec.num_scales) > 1:
                self.num_scored(scale, spec.grid(scale))

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """See :class:`.base.Search`; as for :meth:`.BestOfM.check_labels`."""
        if self.m > 1 or self.proposals:
            check_scorer_knows(self.scorer, highest, spec)

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """See :class:`.base.Search`."""
        last = num_scales - 1 if self.last_scale is None else self.last_scale
        return self.m + self.sweeps * self.proposals if self.first_scale <= scale <= last else 1

    def num_scored(self, scale: int, grid: tuple[int, int]) -> int:
        """How many maps are scored for each image at a searched scale of ``grid`` = (height, width) positions."""
        rows, columns = self.num_blocks(scale, grid)
        return self.m + self.sweeps * rows * columns * self.proposals

    def num_blocks(self, scale: int, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of blocks of a map of ``grid`` = (height, width) positions.

        Raises:
            ValueError: if ``blocks`` gives no block side for this map.
        """
        side, blocks = max(grid), self.blocks
        if blocks is None:
            found = usual_block(side)
        elif isinstance(blocks, dict):
            if side not in blocks:
                raise ValueError(f"blocks must have an entry for maps of side {side}, got {blocks}")
            found = blocks[side]
        else:
            found = blocks if is_int(blocks) else blocks(scale, side)
        if not is_int(found) or found < 1:
            raise ValueError(f"blocks must give a side >= 1 for scale {scale}, whose side is {side}, got {found!r}")
        return -(-grid[0] // found), -(-grid[1] // found)

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`.base.Search`."""
        expected = self.m + self.sweeps * self.proposals
        if candidates.tokens.shape[1] != expected:
            raise ValueError(f"candidates must be {expected} in number, got {candidates.tokens.shape[1]}")
        scores = score_maps(self.scorer, candidates, candidates.fuse, self.m, self.maps_at_once)
        index = self.picked(candidates.scale, scores, lambda: candidates.uniforms()[:, : self.m])
        if not self.proposals:
            return Choice(index, scores)
        kept = candidates.tokens[torch.arange(len(index), device=index.device), index]
        tokens, steps = self.improved(candidates, kept, scores.gather(1, index[:, None])[:, 0])
        return Choice(index, torch.cat((scores, steps.scores[:, :, 1:].flatten(1)), 1), tokens, steps)

    def improved(self, candidates: Candidates, kept: Tensor, score: Tensor) -> tuple[Tensor, Steps]:
        """All sweeps over maps ``kept``, ``[B, l]`` or ``[B, l, d]``, whose scores are ``score``, ``[B]``.

        Returns:
            The kept maps, and what each step scored and kept.
        """
        grid, composed, found, maps_before, scores_before = candidates.grid, [], [], [], []
        rows, columns = self.num_blocks(candidates.scale, grid)
        patch = math.isqrt(kept.shape[1] // (grid[0] * grid[1]))
        steps = 1 + rows * columns  # of a sweep: one for the places of its blocks, then one per block
        uniforms = candidates.step_uniforms(self.proposals + 1, self.sweeps * steps)
        noise = None if self.pick == "best" else gumbel(uniforms)  # Gumbel-max, as in BestOfM
        temperature = 1.0 if noise is None else temperature_at(self.temperature, self.scorer, candidates.scale)
        numbers = torch.arange(rows * columns, device=kept.device).unsqueeze(1)
        for sweep, places in enumerate(uniforms[:, :2, ::steps].unbind(2)):
            fresh = candidates.tokens[:, self.m + sweep * self.proposals :][:, : self.proposals]
            inside = block_numbers(grid, (rows, columns), places, patch).unsqueeze(1) == numbers  # [B, blocks, l]
            inside = inside if kept.dim() == 2 else inside.unsqueeze(-1)
            for block in range(rows * columns):
                maps = torch.where(inside[:, block : block + 1], fresh, kept.unsqueeze(1))
                drawn = None if noise is None else noise[:, :, sweep * steps + 1 + block]
                composed.append(self.scores(candidates, maps))
                maps_before.append(kept)
                scores_before.append(score)
                found.append(self.keep(kept, score, maps, composed[-1], drawn, temperature))
                kept, score, _ = found[-1]
        scores = torch.cat((torch.stack(scores_before, 1).unsqueeze(2), torch.stack(composed, 1)), 2)
        changed = torch.stack([step.maps for step in found], 1) != torch.stack(maps_before, 1)
        return kept, Steps(scores, torch.stack([step.index for step in found], 1), changed.flatten(2).any(2))

    def keep(
        self, kept: Tensor, score: Tensor, maps: Tensor, scores: Tensor, noise: Tensor | None, temperature: float
    ) -> Kept:
        """One step's choice between the map that each image has and its composed maps."""
        return keep_maps(kept, score, maps, scores, noise=noise, temperature=temperature)

    def scores(self, candidates: Candidates, maps: Tensor) -> Tensor:
        """Scores ``[B, n]`` of composed maps ``[B, n, l]`` or ``[B, n, l, d]``."""

        def fuse(start: int, stop: int, **wanted) -> Tensor:
            return candidates.fuse_maps(maps[:, start:stop], **wanted)

        return score_maps(self.scorer, candidates, fuse, maps.shape[1], self.maps_at_once)

    def picked(self, scale: int, scores: Tensor, uniforms: Callable[[], Tensor]) -> Tensor:
        """Which of the whole maps each image keeps, ``[B]``; of equal scores ``"best"`` takes the first."""
        if self.pick == "best":
            return scores.argmax(-1)
        # Gumbel-max, as in BestOfM.
        return (scores / temperature_at(self.temperature, self.scorer, scale) + gumbel(uniforms())).argmax(-1)


def usual_block(side: int) -> int:
    """The side of the blocks of a map of ``side``, which gives about 16 blocks from side 8 on."""
    return 1 if side <= 2 else max(2, -(-side // 4))


def block_numbers(grid: tuple[int, int], blocks: tuple[int, int], uniforms: Tensor, patch: int = 1) -> Tensor:
    """The block of every position of each image's map, ``[B, l]`` int64.

    Each image has all blocks, in rows and columns over the whole map. The inner edges are moved up or down together,
    and left or right, by at most half a block, so that blocks at the border of the map grow or shrink; none is empty.

    Args:
        grid: height and width of the map, in positions of the transformer.
        blocks: rows and columns of blocks, at most as many as positions.
        uniforms: ``[B, 2]``, which decide how far the edges are moved.
        patch: how many entries of the map a position has, along each axis.
    """
    rows, columns = (
        numbers_on_axis(length, count, uniform, patch)
        for length, count, uniform in zip(grid, blocks, uniforms.unbind(1), strict=True)
    )
    return (rows.unsqueeze(2) * blocks[1] + columns.unsqueeze(1)).flatten(1)


def numbers_on_axis(length: int, count: int, uniform: Tensor, patch: int) -> Tensor:
    """The block of every position along one axis, ``[B, patch * length]``."""
    first, last = -(-length // count), length // count  # sizes before the move
    low, high = -(first // 2), min(first // 2, last - 1)
    # In float64 the product of a number below 1 and a small integer never rounds up to that integer.
    move = (uniform.double() * (high - low + 1)).long() + low
    places = torch.arange(length * patch, device=uniform.device).div(patch, rounding_mode="floor")
    return ((places - move.unsqueeze(1)) * count).div(length, rounding_mode="floor").clamp(0, count - 1)


def check_blocks(blocks: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` if these are not sides of blocks. A function is not called here."""
    if isinstance(blocks, Mapping):
        for side, block in blocks.items():
            if not is_int(side) or not is_int(block) or min(side, block) < 1:
                raise ValueError(f"blocks must give an int >= 1 for each side, got {block!r} for {side!r}")
    elif is_int(blocks):
        if blocks < 1:
            raise ValueError(f"blocks must be >= 1, got {blocks}")
    elif blocks is not None and not callable(blocks):
        raise TypeError(f"blocks must be an int, a dict, a function (scale, side) or None, got {blocks!r}")
