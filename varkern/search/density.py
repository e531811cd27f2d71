"""Density search: keep a candidate where candidates are dense (VAR-Scaling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from varkern import ops
from varkern.literals import BandwidthRule, Compatibility, DensityFamily, Metric, Per, Strategy, Threshold, check_word
from varkern.ops.philox import gumbel
from varkern.spec import ModelSpec, is_int, is_number

from .base import Candidates, Choice

STRATEGIES = get_args(Strategy)


class Rules(TypedDict):
    """What ``compat`` sets."""

    per: Per
    bandwidth: BandwidthRule | float | Tensor
    min_distance: float
    threshold: Threshold


# The settings of the paper and of the released code, and the defaults.
COMPATIBILITY: dict[Compatibility | None, Rules] = {
    None: {"per": "position", "bandwidth": "image", "min_distance": 1.8, "threshold": "released"},
    "paper": {"per": "map", "bandwidth": "image", "min_distance": 0.0, "threshold": "paper"},
    "released": {"per": "position", "bandwidth": "batch", "min_distance": 1.8, "threshold": "released"},
}
FINAL_CHOICE, ORDER = 0, 1  # which of the images' uniform numbers are for what


class AlphaRange(NamedTuple):
    """Recommended values of alpha; both ends are included."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return round((self.low + self.high) / 2, 4)


RECOMMENDED_ALPHA = {
    "VAR": {
        16: AlphaRange(2.3, 2.9),
        20: AlphaRange(2.2, 2.8),
        24: AlphaRange(2.1, 2.7),
        30: AlphaRange(2.0, 2.6),
    },
    "FlexVAR": {24: AlphaRange(2.5, 2.8)},
}


class DensitySearch:
    """Draw n candidates, keep some representatives by their density, and draw one of these.

    A candidate's density is the sum of Gaussian kernels between it and all n candidates (eq. 2, 3). Then, for each
    image:

    1. *Representatives.* ``"top"``: the densest candidates (eq. 5, 6). ``"small"``: the least dense. ``"random"``: any
       (eq. 7, 8). ``"hybrid"``, the paper's method: the densest if the image's samples are dense somewhere, else any
       (eq. 9). They are taken in this order. A candidate that lies closer than ``min_distance`` to one already taken
       is skipped. There may be fewer than ``representatives`` then, as in the released code.
    2. *Final choice.* One representative, with probability proportional to its density.

    ``"rank"`` is what the released code does for Infinity: it takes the densest, in order, with weights that fall
    linearly from the number of representatives to 1. That code takes 100 and skips none::

        DensitySearch(n=1000, representatives=100, scales=(3,), strategy="rank", min_distance=0)

    The paper's text gives 500 representatives, alpha=1.0 and n from 500 to 3000 for Infinity. With alpha=1 every image
    counts as dense, because no maximum lies below its mean::

        DensitySearch(n=1000, representatives=500, alpha=1.0, scales=(3,), min_distance=0)

    **Which images are dense.** The paper prints *low density if alpha * mean < max*. This is inverted: a maximum far
    above the mean is a sharp peak, which the paper's text calls dense. The released code tests *low density if
    max < alpha * mean*, which is the default here (``threshold="released"``); ``"paper"`` does as printed.

    **Where the paper and the released code differ**, ``compat`` sets all of these; keywords that are also given
    override it.

    ============== ============ =========== ============
    keyword        default      "paper"     "released"
    ============== ============ =========== ============
    per            "position"   "map"       "position"
    bandwidth      "image"      "image"     "batch"
    min_distance   1.8          0           1.8
    threshold      "released"   "paper"     "released"
    ============== ============ =========== ============

    Three properties of the released code are not reproduced by any setting. It filters the logits again, in place, at
    every draw, so the nucleus shrinks from candidate to candidate. This is a defect; here candidates are independent
    draws. It takes its random numbers from outside the model's generator and waits for the device at every image; here
    they come from the images' seeds. It adds 1e-6 to the bandwidth, which only matters for equal samples.

    An image depends only on its seed, in any batch, unless ``bandwidth="batch"``. The candidates of a smaller n are
    among those of a larger n, but the choices differ, because a density is relative to all n candidates.

    Args:
        n: number of candidates at a searched scale, >= 1; the paper uses 10 to 100 for VAR.
        representatives: number of candidates kept for the final choice, >= 1; at most n are kept (eq. 6).
        alpha: the density threshold of ``"hybrid"``, > 0; see :meth:`recommended_alpha`.
        scales: the searched scales, counted from 0, as in the paper; an int for one scale.
        strategy: ``"hybrid"``, ``"top"``, ``"random"``, ``"small"`` or ``"rank"``.
        metric: the distance between samples, ``"euclidean"`` or ``"cosine"`` (the paper's Table 3e). ``min_distance``
            is Euclidean with both. Binary codes need ``"euclidean"``.
        per: what a sample is. ``"position"``: the code of one position of the transformer (for Infinity with spatial
            patchify the 4 * d bits of 2 x 2 codes, as in the released code); the densities of all positions are summed.
            ``"map"``: the codes of all positions, joined.
        bandwidth: ``"image"``: Silverman's rule (eq. 3) within each image. ``"batch"``: its mean over the batch, which
            makes images depend on their batch. Or a number or tensor, as :func:`varkern.ops.token_density` takes it.
        min_distance: Euclidean distance between the joined codes of two maps, in units of the codebook, >= 0; 0 skips
            none. The released code uses 1.8, for VAR's published codebook. Two maps of binary codes that differ in h
            bits are ``2 * code_scale * sqrt(h)`` apart. Unless it is 0, the codes of all candidates exist together,
            ``B * n * l * C`` numbers, and choosing takes one step per representative.
        threshold: ``"released"`` or ``"paper"``, see above.
        compat: None, ``"paper"`` or ``"released"``, see above.

    Raises:
        ValueError, TypeError: if an argument is out of its range.

    Example::

        >>> search = varkern.DensitySearch(n=20, min_distance=0)
        >>> varkern.generate(var, labels, search=search, seeds=0).scores[1].shape
        torch.Size([8, 20])
    """

    n: int
    representatives: int
    alpha: float
    scales: tuple[int, ...]
    strategy: Strategy
    metric: Metric
    per: Per
    bandwidth: BandwidthRule | float | Tensor
    min_distance: float
    threshold: Threshold

    def __init__(
        self,
        n: int = 50,
        representatives: int = 10,
        alpha: float = 2.3,
        scales: int | Iterable[int] = (1,),
        strategy: Strategy = "hybrid",
        metric: Metric = "euclidean",
        per: Per | None = None,
        bandwidth: BandwidthRule | float | Tensor | None = None,
        min_distance: float | None = None,
        *,
        threshold: Threshold | None = None,
        compat: Compatibility | None = None,
    ):
        one_of("compat", compat, tuple(COMPATIBILITY))
        rules = COMPATIBILITY[compat]
        self.per = rules["per"] if per is None else per
        self.bandwidth = rules["bandwidth"] if bandwidth is None else bandwidth
        self.threshold = rules["threshold"] if threshold is None else threshold
        min_distance = rules["min_distance"] if min_distance is None else min_distance
        for name, count in (("n", n), ("representatives", representatives)):
            if not is_int(count) or count < 1:
                raise ValueError(f"{name} must be an int >= 1, got {count!r}")
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
        check_word("strategy", strategy, Strategy)
        check_word("metric", metric, Metric)
        check_word("per", self.per, Per)
        check_word("threshold", self.threshold, Threshold)
        if not is_number(min_distance) or not 0 <= min_distance < math.inf:
            raise ValueError(f"min_distance must be a finite number >= 0, got {min_distance!r}")
        check_bandwidth(self.bandwidth)
        self.n, self.representatives, self.alpha = int(n), int(representatives), float(alpha)
        self.scales, self.strategy, self.metric = as_scales(scales), strategy, metric
        self.min_distance = float(min_distance)

    def __repr__(self) -> str:
        names = ["n", "representatives", "alpha", "scales", "strategy", "metric"]
        names += ["per", "bandwidth", "min_distance", "threshold"]
        return f"DensitySearch({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @staticmethod
    def recommended_alpha(depth: int, family: DensityFamily = "VAR") -> AlphaRange:
        """The paper's recommended range of alpha (Table 1b) for a model of this depth; ``.middle`` is its middle.

        The ranges are for 10 to 100 candidates; VAR's are for scale 1 at ``cfg=1.0``, FlexVAR's for scale 2 at
        ``cfg=2.5``. Later scales and stronger guidance need smaller values: Table 2 has 1.1 to 1.3 at the last scale,
        Table 3d has 1.8 and 1.9 at ``cfg=1.5``. For Infinity the paper uses 1.0. The ranges hold for no other model:
        alpha is compared with max/mean of an image's densities, which depends on the model, on n and on ``per``.

        Args:
            depth: 16, 20, 24 or 30 for VAR; 24 for FlexVAR.
            family: ``"VAR"`` or ``"FlexVAR"``.

        Raises:
            ValueError: for a depth or family that the paper does not name.
        """
        check_word("family", family, DensityFamily)
        known = RECOMMENDED_ALPHA[family]
        if not is_int(depth) or depth not in known:
            raise ValueError(f"depth of {family} must be one of {', '.join(map(str, known))}, got {depth!r}")
        return known[depth]

    def check(self, spec: ModelSpec) -> None:
        """See :class:`.base.Search`."""
        if max(self.scales) >= spec.num_scales:
            raise ValueError(f"scales must be < {spec.num_scales}, the model's scales, got {max(self.scales)}")
        if spec.vocabulary is None and self.metric != "euclidean":
            raise ValueError(f"metric must be 'euclidean' for a model of binary codes, got {self.metric!r}")

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """See :class:`.base.Search`."""
        return self.n if scale in self.scales else 1

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`.base.Search`; the scores are the densities."""
        densities = self.densities(candidates)
        places = take_representatives(
            self.priorities(densities, candidates), self.representatives, self.near(candidates)
        )
        if self.strategy == "rank":
            weights = (min(self.representatives, places.shape[1]) - places).float()
        else:
            # With weights of zero, an image whose densities are all zero would have no choice.
            weights = densities.clamp(torch.finfo(densities.dtype).tiny)
        # Gumbel-max: the largest of log-weight plus Gumbel noise is a draw in proportion to the weights.
        noisy = weights.log() + gumbel(candidates.uniforms(FINAL_CHOICE))
        return Choice(noisy.masked_fill(places < 0, -math.inf).argmax(-1), densities)

    def densities(self, candidates: Candidates) -> Tensor:
        """Densities ``[B, M]`` float32; NaN counts as 0."""
        if candidates.codebook is None:
            assert candidates.code_scale is not None, "binary codes have one"
            bits = candidates.tokens if candidates.by_position is None else candidates.by_position()
            densities = ops.bit_density(bits, candidates.code_scale, self.per, self.bandwidth, self.metric)
        else:
            tokens, codebook = candidates.tokens, candidates.codebook
            densities = ops.token_density(tokens, codebook, self.per, self.bandwidth, self.metric)
        return densities.nan_to_num(nan=0.0)

    def priorities(self, densities: Tensor, candidates: Candidates) -> Tensor:
        """The priority of each candidate as a representative, ``[B, M]``: the highest are taken first."""
        if self.strategy in ("top", "rank"):
            return densities
        if self.strategy == "small":
            return -densities
        order = candidates.uniforms(ORDER)
        if self.strategy == "random":
            return order
        return torch.where(self.dense(densities)[:, None], densities, order)

    def dense(self, densities: Tensor) -> Tensor:
        """Which images are dense for ``"hybrid"``, ``[B]`` bool."""
        # In float64 a sum of densities, each 1 or more, is exact, so neither its order nor the batch matters.
        highest, mean = densities.amax(-1).double(), densities.double().mean(-1)
        low = highest < self.alpha * mean if self.threshold == "released" else self.alpha * mean < highest
        return ~low

    def near(self, candidates: Candidates) -> Callable[[Tensor], Tensor] | None:
        """A function from one candidate per image, ``[B, 1]``, to those that lie too close to it, ``[B, M]`` bool.

        None: no candidate lies too close to another.
        """
        if self.min_distance == 0:
            return None
        distances = bit_distances if candidates.codebook is None else code_distances
        between = distances(candidates)
        return lambda index: between(index) < self.min_distance


def take_representatives(priorities: Tensor, count: int, near: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Take up to ``count`` candidates per image, by falling priority, none near one that was taken before.

    Args:
        priorities: ``[B, M]``, finite; of equal ones the first is taken first.
        count: >= 1.
        near: see :meth:`DensitySearch.near`; true for the candidate itself.

    Returns:
        ``[B, M]`` int64: 0 for the first candidate taken, 1 for the second and so on, -1 for those not taken.
    """
    places = torch.full_like(priorities, -1, dtype=torch.int64)
    count = min(count, priorities.shape[1])
    if near is None:
        taken = priorities.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return places.scatter(-1, taken, torch.arange(count, device=priorities.device).expand_as(taken))
    for place in range(count):
        highest, index = priorities.max(-1, keepdim=True)
        # Where no candidate is left, the maximum points at one that was taken before: it keeps its place.
        places = places.scatter(-1, index, places.gather(-1, index).masked_fill(highest > -math.inf, place))
        priorities = priorities.masked_fill(near(index), -math.inf)
    return places


def code_distances(candidates: Candidates) -> Callable[[Tensor], Tensor]:
    """A function from one candidate per image, ``[B, 1]``, to its Euclidean distances from all, ``[B, M]``."""
    assert candidates.codebook is not None, "binary codes go to bit_distances"
    codes = candidates.codebook[candidates.tokens].float().flatten(2)  # [B, M, l * C]

    def between(index: Tensor) -> Tensor:
        taken = codes.gather(1, index[..., None].expand(-1, -1, codes.shape[-1]))
        # From differences: a matrix product would give equal maps a distance above 0.
        return torch.cdist(codes, taken, compute_mode="donot_use_mm_for_euclid_dist")[..., 0]

    return between


def bit_distances(candidates: Candidates) -> Callable[[Tensor], Tensor]:
    """As :func:`code_distances`, for binary codes: a bit that differs adds ``(2 * code_scale)²`` to the square."""
    bits, scale = candidates.tokens.flatten(2), candidates.code_scale  # [B, M, l * d]
    assert scale is not None, "binary codes have one"

    def between(index: Tensor) -> Tensor:
        taken = bits.gather(1, index[..., None].expand(-1, -1, bits.shape[-1]))
        return (bits != taken).sum(-1).float().sqrt() * (2 * scale)

    return between


def as_scales(scales: int | Iterable[int]) -> tuple[int, ...]:
    """The searched scales, sorted.

    Raises:
        TypeError, ValueError: if there is none, or they are not different ints >= 0.
    """
    if not is_int(scales) and (not isinstance(scales, Iterable) or isinstance(scales, str)):
        raise TypeError(f"scales must be an int or several ints, got {scales!r}")
    listed: tuple[int, ...] = (scales,) if is_int(scales) else tuple(scales)
    if not listed or not all(is_int(scale) and scale >= 0 for scale in listed) or len(set(listed)) < len(listed):
        raise ValueError(f"scales must be one or more different ints >= 0, got {listed!r}")
    return tuple(sorted(int(scale) for scale in listed))


def check_bandwidth(bandwidth: object) -> None:
    """Raise ``ValueError`` for an impossible bandwidth; a tensor's shape is checked where it is used."""
    known = bandwidth in ("image", "batch") if isinstance(bandwidth, str) else isinstance(bandwidth, Tensor)
    if not known and not (is_number(bandwidth) and 0 < bandwidth < math.inf):
        raise ValueError(f"bandwidth must be 'image', 'batch', a finite number > 0 or a tensor, got {bandwidth!r}")


def one_of(name: str, value: object, known: tuple) -> None:
    """Raise ``ValueError`` if ``value`` is not one of ``known``."""
    if not isinstance(value, str | None) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
