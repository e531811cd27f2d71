"""How far a scorer's scores can be believed as log-odds: reliability on pairs, and a fitted temperature.

The scores of a real and a generated map of one class give a probability, ``sigmoid(real - generated)``, that the first
is the real one. If among all pairs with a probability near 0.8 the real map has the higher score in 80% of them, then
the scores are calibrated. A scorer that was trained for long on few maps is overconfident: it says 95% where 80% are
right. Resampling by softmax of the scores takes their differences at face value, so it then trusts them too much.

Dividing all scores of a scale by one number, the temperature, mends this on average (Guo et al., "On Calibration of
Modern Neural Networks", 2017). Only differences of scores of one class count here, as in a search, so a constant of the
class has no effect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BINS = 10
LOWEST, HIGHEST = 0.05, 20.0  # of a fitted temperature; scores that separate all pairs would have 0
HALVINGS = 60  # of an interval of log-temperatures: more than float64 resolves


def reliability(real: Tensor, generated: Tensor, bins: int = BINS) -> dict[str, Any]:
    """Compare the predicted probability of the map with the higher score with the share of pairs where it is real.

    A pair counts in one of ``bins`` bins of equal width by the probability that the scores give to the likelier map,
    which is 0.5 or more. Equal scores count as half right.

    Args:
        real, generated: scores ``[N]`` of pairs, N >= 1.
        bins: number of bins from 0.5 to 1.

    Returns:
        ``calibration_error``, the mean of ``|predicted - observed|`` over the pairs, bin by bin; and ``bins``, the
        ``predicted`` probability, the ``observed`` share and the ``count`` of every bin that has a pair.
    """
    difference = real.double() - generated.double()
    confidence = difference.abs().sigmoid()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    counts, predicted, observed = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values)
        for values in (torch.ones_like(right), confidence, right)
    )
    rows = [
        {"predicted": float(p / n), "observed": float(o / n), "count": int(n)}
        for p, o, n in zip(predicted, observed, counts, strict=True)
        if n
    ]
    return {"calibration_error": float((predicted - observed).abs().sum() / len(right)), "bins": rows}


def fit_temperature(real: Tensor, generated: Tensor) -> tuple[float, float | None]:
    """Fit the temperature T under which ``sigmoid((real - generated) / T)`` makes the pairs most likely.

    The log-likelihood is concave in 1 / T, so the zero of its derivative is found by bisection. The standard error is
    that of the likelihood's curvature.

    Args:
        real, generated: scores ``[N]`` of pairs that were not used for training.

    Returns:
        T in [0.05, 20], and its standard error; None at either end, where the likelihood has no maximum inside. Scores
        without any difference give 1.
    """
    difference = real.double() - generated.double()
    if not bool((difference != 0).any()):
        return 1.0, None

    def slope(log_temperature: float) -> float:
        """The derivative of the log-likelihood by 1 / T, which grows with T."""
        return float((difference * torch.sigmoid(-difference / math.exp(log_temperature))).sum())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(low) >= 0:
        return LOWEST, None
    if slope(high) <= 0:
        return HIGHEST, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    temperature = math.exp((low + high) / 2)
    scaled = difference / temperature
    information = float((difference.square() * scaled.sigmoid() * (-scaled).sigmoid()).sum())  # about 1 / T
    return temperature, temperature**2 / math.sqrt(information) if information > 0 else None
