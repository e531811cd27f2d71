"""How many candidates each scale should get under a budget of time: measured gains against measured costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkern.checks import check_request
from varkern.errors import UnsupportedModelError
from varkern.families import recognise
from varkern.generate import Generation, generate
from varkern.ops import image_seeds
from varkern.progress import progress_bar
from varkern.search import BestOfM, Candidates, Choice
from varkern.search.base import Scorer
from varkern.spec import ModelSpec, Request, is_int

CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` returns, for K scales and C choices of M; ``print`` it for a table.

    Numbers that were not measured are NaN: of scales that are not searched, at every M but 1.
    """

    m: tuple[int, ...]
    """Candidates of every scale, K numbers: ``BestOfM(scorer, m=plan.m, pick=...)`` with the ``pick`` planned for."""
    overhead: float
    """Predicted extra time, as a share of ``base_seconds``; not above what was asked for."""
    gain: float
    """Predicted gain in score, summed over the scales."""
    choices: tuple[int, ...]
    """The values of M that were measured, from 1 up."""
    sides: tuple[int, ...]
    """The side of every scale's token map."""
    gains: tuple[tuple[float, ...], ...]
    """Mean gain in score over one candidate, ``[K][C]``; 0 at M=1. As measured, not smoothed."""
    gain_errors: tuple[tuple[float, ...], ...]
    """The standard error of each gain, over the images."""
    costs: tuple[tuple[float, ...], ...]
    """Extra seconds over one candidate by the fit to the times, ``[K][C]``; 0 at M=1."""
    base_seconds: float
    """Seconds of a whole generation with one candidate a scale, decoding included."""

    def within(self, overhead: float) -> Plan:
        """What the same measurements plan under another budget.

        Raises:
            ValueError: if ``overhead`` is negative or not finite.
        """
        check_overhead(overhead)
        gains = Gains(np.array(self.gains), np.array(self.gain_errors))
        return best_plan(overhead, self.choices, self.sides, gains, np.array(self.costs), self.base_seconds)

    def __str__(self) -> str:
        lines = [f"{'scale':>5}  {'side':>7}  {'m':>5}  {'gain':>7}  {'± error':>8}  {'cost':>7}"]
        for scale, (m, side) in enumerate(zip(self.m, self.sides, strict=True)):
            place = self.choices.index(m)
            gain, error = self.gains[scale][place], self.gain_errors[scale][place]
            share = self.costs[scale][place] / self.base_seconds
            lines.append(f"{scale:>5}  {f'{side}x{side}':>7}  {m:>5}  {gain:>+7.3f}  {error:>8.3f}  {share:>7.2%}")
        lines.append(f"{'all':>5}  {'':>7}  {'':>5}  {self.gain:>+7.3f}  {'':>8}  {self.overhead:>7.2%}")
        return "\n".join([*lines, f"cost: share of {self.base_seconds:.3g} s, a generation with one candidate a scale"])


class Trajectory(BestOfM):
    """Scores M candidates at every searched scale and keeps the first: what the model alone would have drawn."""

    def choose(self, candidates: Candidates) -> Choice:
        """See :class:`varkern.search.Search`."""
        scores = self.score(candidates)
        return Choice(scores.new_zeros(len(scores), dtype=torch.int64), scores)


class Gains(NamedTuple):
    """Mean gains and their standard errors, both ``[K, C]`` float64; NaN where nothing was scored, but at M=1."""

    means: np.ndarray
    errors: np.ndarray


def plan(
    model: Any,
    scorer: Scorer,
    overhead: float = 0.01,
    *,
    batch_size: int = 24,
    labels: int | Sequence[int] | Tensor | None = None,
    seeds: int = 0,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    pick: str | int = "best",
    temperature: float = 1.0,
    first_scale: int = 1,
    last_scale: int | None = None,
    choices: Sequence[int] = CHOICES,
    images: int = 96,
    repeats: int = 3,
    maps_at_once: int = 1024,
    **options: Any,
) -> Plan:
    """Choose M at every scale, so that a given share of generation time goes where it raises scores most.

    *Gain* of M at a scale: the expected score of the candidate that ``pick`` keeps of M, less the mean score, measured
    on candidates that continue the model's own trajectory. *Cost*: the extra seconds of that scale, measured on whole
    generations. Of all combinations of ``choices`` it is the one of the largest summed gain whose summed cost is at
    most ``overhead`` times a generation with M=1; of equal gains, the cheapest.

    Why gains may be summed: the candidates of one image share all their earlier scales, so a difference of their scores
    estimates a difference of ``log p_real(r_k | r_<k) - log p_model(r_k | r_<k)`` (see :class:`varkern.BestOfM`), and
    these terms of the scales add up to ``log p_real / p_model`` of the whole image.

    What this does not see. With ``pick="best"`` a larger score is a better picture only up to a point (LSRS, Table 5),
    and at the first scale, where diversity is decided, hardly ever (its Table 3): leave out ``choices`` too large to be
    good, and the first scale, as by default; ``pick="resample"`` has no such turn. Gains are those of a scorer that may
    be wrong: on the demo model plans gained more score than uniform M of equal cost, and no better a Fréchet distance
    (``varkern/demo/README.md``). They are measured at prefixes that the model drew, not at those that a search would
    have chosen before. Costs are of eager generations at this batch size, on the device as it is; ``cuda_graph=True``
    of :func:`varkern.patch` changes them.

    Args:
        model: a class-conditional model, VAR or FlexVAR, patched or not; it is not changed.
        scorer: as for :class:`varkern.BestOfM`.
        overhead: extra time allowed, as a share of a generation with M=1, decoding included; 0.01 is one percent.
        batch_size: images of a generation; costs hold for it.
        labels: the classes that matter, which the measured images take in turn; an int for one (negative: no class);
            None: all classes in an order drawn from ``seeds``.
        seeds: from which the images' seeds are made, as in :func:`varkern.generate`.
        cfg, top_k, top_p: how images will be sampled; the defaults are VAR's published sampling.
        pick, temperature, first_scale, last_scale, maps_at_once: as for :class:`varkern.BestOfM`.
        choices: the values of M to choose from: increasing, the first 1.
        images: on how many images gains are measured, >= 2.
        repeats: how often each cost is measured, after a round that only warms up.
        options: further arguments of the family's published method, as for :func:`varkern.generate`.

    Raises:
        UnsupportedModelError: if the model fits no family, or is one of texts (Infinity).
        ValueError, TypeError: if an argument is wrong, before any work; and if a score is infinite or NaN.
    """
    check_overhead(overhead)
    for name, value, least in (("batch_size", batch_size, 1), ("images", images, 2), ("repeats", repeats, 1)):
        if not is_int(value) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    choices = as_choices(choices)
    settings = {"pick": pick, "temperature": temperature, "maps_at_once": maps_at_once}
    scales = {"first_scale": first_scale, "last_scale": last_scale}
    trajectory = Trajectory(scorer, choices[-1], **scales, **settings)
    sampling = {"cfg": cfg, "top_k": top_k, "top_p": top_p, **options}
    spec, classes, numbers = prepare(model, trajectory, labels, seeds, max(images, batch_size), sampling)

    def told(m: int | None, part: slice) -> Generation:
        """One generation with M candidates kept by ``pick``; None: along the model's own trajectory, undecoded."""
        search = trajectory if m is None else BestOfM(scorer, m, **scales, **settings)
        return generate(model, classes[part], search=search, seeds=numbers[part], decode=m is not None, **sampling)

    with progress_bar() as progress:
        batches = [slice(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
        task = progress.add_task("measuring gains", total=len(batches), note="")
        scores: list[list[Tensor | None]] = []
        for part in batches:
            scores.append(
                [of_scale if of_scale is None else of_scale.double().cpu() for of_scale in told(None, part).scores]
            )
            progress.advance(task)
        gains = measure_gains(scores, choices, pick, temperature)
        task = progress.add_task("measuring costs", total=2 * (len(choices) - 1) * (repeats + 1), note="")

        def seconds_of(m: int) -> list[float]:
            progress.advance(task)
            return told(m, slice(0, batch_size)).seconds

        base_seconds, costs = fit_costs(measure_costs(seconds_of, choices, repeats), choices)
    costs[np.isnan(gains.means)] = np.nan
    return best_plan(overhead, choices, spec.sides, gains, costs, base_seconds)


def best_plan(
    overhead: float,
    choices: tuple[int, ...],
    sides: Sequence[int],
    gains: Gains,
    costs: np.ndarray,
    base_seconds: float,
) -> Plan:
    """The plan of the largest gain within ``overhead``, for costs ``[K, C]`` in seconds."""
    chosen = choose(gains.means, costs, overhead * base_seconds)
    rows = np.arange(len(chosen))
    return Plan(
        m=tuple(choices[place] for place in chosen),
        overhead=float(costs[rows, chosen].sum() / base_seconds),
        gain=float(gains.means[rows, chosen].sum()),
        choices=choices,
        sides=tuple(sides),
        gains=as_tuples(gains.means),
        gain_errors=as_tuples(gains.errors),
        costs=as_tuples(costs),
        base_seconds=base_seconds,
    )


def check_overhead(overhead: float) -> None:
    """Raise ``ValueError`` if ``overhead`` is no share of time."""
    if not isinstance(overhead, Real) or isinstance(overhead, bool) or not 0 <= overhead < math.inf:
        raise ValueError(f"overhead must be a finite number >= 0, got {overhead!r}")


def as_choices(choices: Sequence[int]) -> tuple[int, ...]:
    """``choices`` as a tuple of ints.

    Raises:
        ValueError: if they are not increasing from 1.
    """
    given = tuple(choices) if isinstance(choices, Sequence | np.ndarray) and not isinstance(choices, str) else ()
    increasing = all(is_int(m) for m in given) and all(a < b for a, b in pairwise(given))
    if len(given) < 2 or not increasing or given[0] != 1:
        raise ValueError(f"choices must be increasing ints from 1, such as (1, 2, 4), got {choices!r}")
    return tuple(int(m) for m in given)


def prepare(
    model: Any,
    search: BestOfM,
    labels: int | Sequence[int] | Tensor | None,
    seeds: int,
    count: int,
    sampling: dict[str, Any],
) -> tuple[ModelSpec, Tensor, Tensor]:
    """The model's sizes, and ``count`` labels and image seeds; everything is checked here.

    Raises:
        UnsupportedModelError, ValueError, TypeError: as :func:`plan`.
    """
    family = recognise(model)
    if not family.has_classes:
        raise UnsupportedModelError(
            f"plan serves models of classes, and {type(model).__name__} is an {family.name} model, one of texts"
        )
    if not is_int(seeds):
        raise TypeError(f"seeds must be an int, got {type(seeds).__name__}")
    if isinstance(sampling["cfg"], Tensor) and sampling["cfg"].dim():
        raise ValueError(f"cfg must be one strength for all images, got shape {list(sampling['cfg'].shape)}")
    options = {name: value for name, value in sampling.items() if name not in ("top_k", "top_p")}
    numbers = image_seeds(int(seeds), count)

    def request(labels: Tensor | None) -> Request:
        return Request(count, labels, numbers, sampling["top_k"], sampling["top_p"], options)

    spec = family.spec(model, request(None))
    classes = as_classes(labels, spec.num_classes, int(seeds))
    classes = classes[torch.arange(count, device=classes.device) % len(classes)]
    check_request(family, model, spec, request(classes), search, "philox")
    return spec, classes, numbers


def as_classes(labels: int | Sequence[int] | Tensor | None, num_classes: int, seed: int) -> Tensor:
    """The classes that images take in turn, ``[N]`` int64 with N >= 1.

    Raises:
        ValueError, TypeError: if ``labels`` are of a wrong kind or shape, or none; their range is checked elsewhere.
    """
    if labels is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(num_classes, generator=generator, device="cpu")
    if is_int(labels):
        return torch.tensor([num_classes if labels < 0 else int(labels)], device="cpu")
    if not isinstance(labels, Tensor):
        if not isinstance(labels, Sequence | np.ndarray) or not all(is_int(label) for label in labels):
            raise TypeError(f"labels must be an int, several ints, a tensor or None, got {labels!r}")
        labels = torch.tensor([int(label) for label in labels], dtype=torch.int64, device="cpu")
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels must name at least one class, in one dimension, got shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    return labels.long()


def measure_gains(
    parts: Sequence[Sequence[Tensor | None]], choices: Sequence[int], pick: str | int, temperature: float
) -> Gains:
    """The gain in score of each choice of M at every scale.

    Args:
        parts: of each batch the scores at every scale, ``[B, M]`` float64 with M the largest of ``choices``, or None
            where there was nothing to choose from.

    Raises:
        ValueError: if a score is not finite.
    """
    means = np.full((len(parts[0]), len(choices)), math.nan)
    means[:, 0] = 0
    errors = means.copy()
    for scale, scores in enumerate(zip(*parts, strict=True)):
        if scores[0] is None:
            continue
        scores = torch.cat(scores).numpy()
        if not np.isfinite(scores).all():
            raise ValueError(f"scorer must give finite scores to be planned with, but some at scale {scale} are not")
        for place, m in enumerate(choices[1:], 1):
            by_image = expected_pick(scores, m, pick, temperature) - scores.mean(1)
            means[scale, place] = by_image.mean()
            errors[scale, place] = by_image.std(ddof=1) / math.sqrt(len(by_image))
    return Gains(means, errors)


def expected_pick(scores: np.ndarray, m: int, pick: str | int, temperature: float) -> np.ndarray:
    """Unbiased estimates of the expected score of what is picked of m candidates, ``[B]``, from N >= m of them.

    Args:
        scores: ``[B, N]`` float64, of independent candidates of one law an image.
        m: 1 <= m <= N.
        pick, temperature: as for :class:`varkern.BestOfM`.
    """
    if pick in ("best", 1):
        return expected_maximum(scores, m)
    groups = scores.shape[1] // m
    scores = scores[:, : groups * m].reshape(len(scores), groups, m)
    if pick != "resample" and pick < m:
        scores = np.partition(scores, m - pick, axis=-1)[..., m - pick :]
    weights = np.exp((scores - scores.max(-1, keepdims=True)) / temperature)
    return ((weights * scores).sum(-1) / weights.sum(-1)).mean(-1)


def expected_maximum(scores: np.ndarray, m: int) -> np.ndarray:
    """The mean over all subsets of m of the N scores ``[B, N]`` of their maximum, ``[B]`` float64.

    Of all subsets, C(i - 1, m - 1) have the i-th smallest score as their maximum. This is the unbiased estimate of the
    expected maximum of m independent scores with the least variance (Halmos, "The theory of unbiased estimation",
    1946).
    """
    count = scores.shape[1]
    weights = [math.comb(i, m - 1) / math.comb(count, m) for i in range(count)]
    return np.sort(scores, axis=1) @ np.array(weights)


def measure_costs(seconds_of: Callable[[int], list[float]], choices: Sequence[int], repeats: int) -> np.ndarray:
    """Times ``[repeats, C - 1, 2, K + 1]`` of whole generations: with M=1, and with each other choice right after.

    Taken in turn, so that a machine that grows slower meanwhile does so for all alike. The first round is left out: in
    it kernels are compiled and memory is found.

    Args:
        seconds_of: generates with M candidates and tells the seconds of every scale, then of decoding.
    """
    rounds = [[[seconds_of(1), seconds_of(m)] for m in choices[1:]] for _ in range(repeats + 1)]
    return np.array(rounds[1:])


def fit_costs(times: np.ndarray, choices: Sequence[int]) -> tuple[float, np.ndarray]:
    """Seconds of a generation with M=1, and the extra seconds of each choice at every scale, ``[K, C]``.

    By the median over the repeats of the differences, fitted at each scale by ``a + b * (m - 1)`` for m > 1, with a and
    b >= 0: what starts with the search at all, and what each candidate adds. So no choice is cheap by its noise alone.

    Args:
        times: what :func:`measure_costs` returns.
    """
    alone, searched = times[:, :, 0], times[:, :, 1]
    extra, level = np.median(searched - alone, axis=0), np.median(searched, axis=0)
    costs = np.zeros((times.shape[-1] - 1, len(choices)))
    added = np.array(choices[1:], dtype=np.float64) - 1
    for scale in range(len(costs)):
        costs[scale, 1:] = fit_line(added, extra[:, scale], level[:, scale])
    return float(np.median(alone.sum(-1))), costs


def fit_line(x: np.ndarray, y: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The values at ``x`` of the line ``a + b * x``, a and b >= 0, of the least squared error relative to ``level``.

    Noise of a time grows with the time itself; unweighted, the largest M alone would decide what the smallest costs.
    """
    weights = 1 / np.maximum(level, 1e-9)
    design, target = np.stack([np.ones_like(x), x], axis=1) * weights[:, None], y * weights
    both = np.linalg.lstsq(design, target, rcond=None)[0]
    if (both >= 0).all():
        return both[0] + both[1] * x
    # The least error of a convex problem then lies on an edge.
    single = np.maximum((design * target[:, None]).sum(0) / (design**2).sum(0), 0)
    edges = np.diag(single)
    errors = ((design @ edges - target[:, None]) ** 2).sum(0)
    a, b = edges[:, errors.argmin()]
    return a + b * x


def choose(gains: np.ndarray, costs: np.ndarray, budget: float) -> list[int]:
    """Which choice each scale gets, K places: the largest summed gain of a summed cost within ``budget``, exactly.

    A multiple-choice knapsack. Scales are merged one by one; of the combinations so far only those stay to which no
    other is both as cheap and as good. Of equal gains the cheapest is chosen.

    Args:
        gains, costs: ``[K, C]`` float64, both 0 at the first place; costs >= 0; NaN: not to be chosen.
        budget: >= 0.
    """
    cost, gain = np.zeros(1), np.zeros(1)
    history = []
    for scale_gains, scale_costs in zip(gains, costs, strict=True):
        places = np.flatnonzero(~np.isnan(scale_gains))
        all_costs = (cost[:, None] + scale_costs[places]).ravel()
        all_gains = (gain[:, None] + scale_gains[places]).ravel()
        order = np.lexsort((-all_gains, all_costs))
        order = order[all_costs[order] <= budget]
        best_before = np.concatenate([[-math.inf], np.maximum.accumulate(all_gains[order])[:-1]])
        front = order[all_gains[order] > best_before]
        cost, gain = all_costs[front], all_gains[front]
        history.append((front // len(places), places[front % len(places)]))
    chosen, at = [], len(gain) - 1  # along the front gains grow
    for former, places in reversed(history):
        chosen.append(int(places[at]))
        at = former[at]
    return chosen[::-1]


def as_tuples(rows: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows.tolist())
