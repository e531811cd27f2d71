"""Rules of a search over paths: which paths of an image go on after a scale.

Facts from TTS-VAR (arXiv 2507.18537; released code ali-vilab/TTS-VAR): its two rules are resampling with weights
``exp(lambda * potential)``, lambda = 10, and k-means, of whose clusters the path nearest to the centre goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkern.literals import Potential, check_word
from varkern.spec import is_int, is_number

TIE = 1e-9  # distances that differ by less, relative to the largest, are equal


@dataclass(frozen=True)
class Paths:
    """The paths of every image of a batch after one scale, as a rule gets them.

    Args:
        scale: the scale that was drawn last, counted from 0.
        num_scales: K.
        num_paths: n, the number of paths of each image.
        num_kept: n', how many go on.
        condition: what the reward gets: the labels ``[B * n]`` int64, or the text condition of as many images. The
            paths of an image are together.
        rewards: ``rewards()`` gives the rewards after this scale, ``[B, n]`` float64; NaN becomes minus infinity.
        history: the rewards of each path's ancestors at those earlier scales where a rule asked for rewards, ``[B, n]``
            float64 each, the earliest first.
        features: ``features()`` gives the features of each path, ``[B, n, D]``, of the search's ``features``.
        uniforms: ``uniforms(count)`` gives uniform numbers in [0, 1), ``[B, count]`` float32, which depend only on the
            image's seed and the scale.

    Example::

        >>> def newest(paths):
        ...     index = torch.arange(paths.num_paths - paths.num_kept, paths.num_paths)
        ...     return index.expand(len(paths.rewards()), -1)
        >>> search = varkern.PathSearch((4, 4, 2, 2, 1), {2: newest, 4: "top"}, reward=varkern.LogRatio(scorer))
        >>> varkern.generate(var, labels, search=search, seeds=0).paths.survivors[2][0].tolist()
        [2, 3]
    """

    scale: int
    num_scales: int
    num_paths: int
    num_kept: int
    condition: Any
    rewards: Callable[[], Tensor]
    history: Sequence[Tensor]
    features: Callable[[], Tensor]
    uniforms: Callable[[int], Tensor]


Rule = Callable[[Paths], Tensor]
"""``(paths) -> [B, n']`` int64: for each image, which of its n paths go on. A path may occur more than once."""


class Resample:
    """Draw the paths that go on with probability proportional to ``exp(strength * potential)``, with replacement.

    The draws are systematic: one uniform number u per image gives the n' marks ``(i + u) / n'``, and each takes the
    path in whose part of [0, 1) it lies. A path with weight w has ``n' * w`` copies on average, and never one more or
    less than that after rounding up or down. Equal weights keep every path.

    For a reward that is the logarithm of a ratio of distributions, as :class:`varkern.LogRatio`, ``strength=1`` and
    ``potential="difference"`` is sequential Monte Carlo: after each of these scales the paths are a weighted sample of
    ``p_model * exp(reward)``, which tends to the distribution of real images as the paths grow in number.

    Args:
        strength: lambda, a finite number; 10 as published.
        potential: of the rewards so far along a path: ``"value"``: the last; ``"maximum"`` or ``"sum"``: of all;
            ``"difference"``: the last minus the one before it. A reward counts at the scales where a rule asked for it.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        >>> rule = varkern.search.Resample(strength=1.0, potential="difference")
        >>> search = varkern.PathSearch((8, 8, 8, 8, 1), {2: rule, 4: rule}, reward=varkern.LogRatio(scorer))
        >>> varkern.generate(var, labels, search=search, seeds=0).images.shape
        torch.Size([8, 3, 24, 24])
    """

    strength: float
    potential: Potential
    needs_reward: bool = True
    copies: bool = True

    def __init__(self, strength: float = 10.0, potential: Potential = "value"):
        if not is_number(strength) or not math.isfinite(strength):
            raise ValueError(f"strength must be a finite number, got {strength!r}")
        check_word("potential", potential, Potential)
        self.strength, self.potential = strength, potential

    def __repr__(self) -> str:
        return f"Resample(strength={self.strength}, potential={self.potential!r})"

    def __call__(self, paths: Paths) -> Tensor:
        return systematic(weights_of(self.strength * potential_of(paths, self.potential)), paths)


class Top:
    """Keep the paths with the highest potential; of equal ones the first.

    Args:
        potential: as for :class:`Resample`.

    Raises:
        ValueError: if it is not such a word.

    Example::

        >>> search = varkern.PathSearch(4, {4: varkern.search.Top("sum")}, reward=varkern.LogRatio(scorer))
        >>> varkern.generate(var, labels, search=search, seeds=0).paths.survivors[4].shape
        torch.Size([8, 1])
    """

    potential: Potential
    needs_reward: bool = True
    copies: bool = False

    def __init__(self, potential: Potential = "value"):
        check_word("potential", potential, Potential)
        self.potential = potential

    def __repr__(self) -> str:
        return f"Top(potential={self.potential!r})"

    def __call__(self, paths: Paths) -> Tensor:
        order = potential_of(paths, self.potential).sort(dim=-1, descending=True, stable=True).indices
        return order[:, : paths.num_kept].sort(-1).values


class Cluster:
    """Keep one path of each of n' clusters, the one nearest to the cluster's centre, so that variety stays.

    The clusters are those of k-means on the search's features. The algorithm has no random numbers: it starts n times,
    each time with another path as the first centre and the farthest path from all centres as the next one, improves
    every start (Lloyd), and takes the clusters with the smallest sum of squared distances to their centres. The
    published code uses scikit-learn's k-means with one random start. Of equally near paths the first is kept; a cluster
    without paths gives the path that is farthest from its own centre.

    Args:
        iterations: the most iterations of each start, >= 1.

    Raises:
        ValueError: if it is below 1.

    Example::

        >>> select = {2: varkern.search.Cluster(), 3: "top"}
        >>> search = varkern.PathSearch((6, 6, 3, 1, 1), select, reward=varkern.LogRatio(scorer))
        >>> varkern.generate(var, labels, search=search, seeds=0).paths.survivors[2].shape
        torch.Size([8, 3])
    """

    needs_reward: bool = False
    copies: bool = False

    def __init__(self, iterations: int = 20):
        if not is_int(iterations) or iterations < 1:
            raise ValueError(f"iterations must be an int >= 1, got {iterations!r}")
        self.iterations = iterations

    def __repr__(self) -> str:
        return f"Cluster(iterations={self.iterations})"

    def __call__(self, paths: Paths) -> Tensor:
        distances = squared_distances(paths.features())
        labels = k_means(distances, paths.num_kept, self.iterations)
        return nearest_to_centres(distances, labels, paths.num_kept)


RULES: dict[str, Callable[[], Any]] = {"resample": Resample, "cluster": Cluster, "top": Top}


def potential_of(paths: Paths, kind: Potential) -> Tensor:
    """The potential of every path, ``[B, n]`` float64; see :class:`Resample`."""
    now = paths.rewards()
    if kind == "value" or not paths.history:
        return now
    if kind == "difference":
        return (now - paths.history[-1]).nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
    rewards = torch.stack((*paths.history, now))
    found = rewards.amax(0) if kind == "maximum" else rewards.sum(0)
    return found.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)


def weights_of(logarithms: Tensor) -> Tensor:
    """Weights ``[B, n]`` that sum to 1, from their logarithms up to a constant. Without a finite one, all are equal."""
    logarithms = logarithms.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
    highest = logarithms.amax(-1, keepdim=True)
    weights = torch.where(logarithms == highest, 0.0, logarithms - highest).exp()
    return weights / weights.sum(-1, keepdim=True)


def systematic(weights: Tensor, paths: Paths) -> Tensor:
    """Systematic resampling by weights ``[B, n]``, in the order of the paths: ``[B, n']``."""
    # The middle of the interval of 2**-24 that a uniform number stands for, so that no mark is on the edge of a part.
    uniforms = paths.uniforms(1).double() + 2.0**-25
    marks = (torch.arange(paths.num_kept, device=weights.device) + uniforms) / paths.num_kept
    ends = weights.cumsum(-1)
    ends = ends / ends[:, -1:]
    return (ends.unsqueeze(1) <= marks.unsqueeze(2)).sum(-1)


def squared_distances(features: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of paths, ``[B, n, n]`` float64, exactly symmetric."""
    features = features.double()
    return torch.stack([(features - path.unsqueeze(1)).square().sum(-1) for path in features.unbind(1)], 1)


def k_means(distances: Tensor, count: int, iterations: int) -> Tensor:
    """The cluster of every path, ``[B, n]`` int64 in 0..count-1, from squared distances ``[B, n, n]``.

    A centre is the mean of its cluster, so its squared distance to a path follows from those between paths: the mean of
    the path's distances to the cluster minus half the mean of the cluster's own.
    """
    num_paths = distances.shape[1]
    distances = distances.unsqueeze(1)  # [B, 1, n, n]; the second dimension is the start
    centres = [torch.arange(num_paths, device=distances.device).expand(len(distances), -1)]  # [B, starts]
    nearest = distances.squeeze(1)  # [B, starts, n]: to the nearest centre so far
    for _ in range(count - 1):
        centres.append(nearest.argmax(-1))
        nearest = nearest.minimum(to_paths(distances, centres[-1]))
    to_centres = torch.stack([to_paths(distances, centre) for centre in centres], -1)  # [B, starts, n, count]
    labels = to_centres.argmin(-1)
    for _ in range(iterations):
        to_centres = distances_to_centres(distances, labels, count, to_centres)
        labels = to_centres.argmin(-1)
    inertia = to_centres.amin(-1).sum(-1)  # [B, starts]
    best = inertia <= inertia.amin(-1, keepdim=True) * (1 + TIE)
    chosen = best.to(torch.int8).argmax(-1)  # the first of equally good starts
    return labels.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, num_paths)).squeeze(1)


def to_paths(distances: Tensor, index: Tensor) -> Tensor:
    """Distances ``[B, starts, n]`` of all paths to one path per start, ``index`` ``[B, starts]``."""
    return distances.squeeze(1).gather(1, index.unsqueeze(-1).expand(-1, -1, distances.shape[-1]))


def distances_to_centres(distances: Tensor, labels: Tensor, count: int, former: Tensor) -> Tensor:
    """Squared distances ``[B, starts, n, count]`` to the means of clusters; an empty cluster has its former ones."""
    member = members_of(labels, count).double()  # [B, starts, n, count]
    sizes = member.sum(-2, keepdim=True)
    means = distances @ member / sizes.clamp(min=1)
    within = (means * member).sum(-2, keepdim=True) / sizes.clamp(min=1)
    return torch.where(sizes > 0, means - within / 2, former)


def members_of(labels: Tensor, count: int) -> Tensor:
    """Which cluster each path is in, ``[..., n, count]`` bool, of labels ``[..., n]``."""
    return labels.unsqueeze(-1) == torch.arange(count, device=labels.device)


def nearest_to_centres(distances: Tensor, labels: Tensor, count: int) -> Tensor:
    """The path nearest to the centre of each cluster, in the order of the paths: ``[B, count]`` int64."""
    tie = TIE * distances.amax((1, 2)).unsqueeze(-1)  # [B, 1]
    zeros = distances.new_zeros(*labels.shape, count).unsqueeze(1)
    centres = distances_to_centres(distances.unsqueeze(1), labels.unsqueeze(1), count, zeros).squeeze(1)
    member = members_of(labels, count)  # [B, n, count]
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for cluster in range(count):
        inside = member[:, :, cluster]
        near = centres[:, :, cluster].masked_fill(~inside, math.inf)
        kept |= first_true(inside & (near <= near.amin(-1, keepdim=True) + tie))
    own = centres.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    for cluster in range(count):
        empty = ~member[:, :, cluster].any(-1, keepdim=True)
        left = own.masked_fill(kept, -math.inf)
        kept |= first_true(left >= left.amax(-1, keepdim=True) - tie) & empty
    return kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :count]


def first_true(mask: Tensor) -> Tensor:
    """Only the first True of each row of ``[B, n]`` bool."""
    return mask & (mask.cumsum(-1) == 1)
