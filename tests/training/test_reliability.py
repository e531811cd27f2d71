"""Reliability of scores on pairs, and the fitted temperature, against plain forms and exact scores."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from varkern.training.reliability import HIGHEST, LOWEST, fit_temperature, reliability


def scored_pairs(count, temperature, seed):
    """Scores whose differences are log-odds times ``temperature``: with probability sigmoid(d) the larger is real."""
    generator = torch.Generator().manual_seed(seed)
    odds = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
    real_first = torch.rand(count, generator=generator, dtype=torch.float64) < odds.sigmoid()
    difference = torch.where(real_first, odds, -odds) * temperature
    generated = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
    return generated + difference, generated


class TestReliability:
    @pytest.mark.parametrize("bins", [1, 4, 10])
    def test_bin_by_bin(self, bins):
        real, generated = (torch.randn(300, generator=torch.Generator().manual_seed(i)) * 2 for i in (0, 1))
        real[:7] = generated[:7]
        found = reliability(real, generated, bins)
        rows = {}
        for r, g in zip(real.double().tolist(), generated.double().tolist(), strict=True):
            likelier = 1 / (1 + math.exp(-abs(r - g)))
            place = min(int((likelier - 0.5) / 0.5 * bins), bins - 1)
            rows.setdefault(place, []).append((likelier, 1.0 if r > g else 0.0 if r < g else 0.5))
        wanted = [np.mean(rows[place], axis=0) for place in sorted(rows)]
        assert [row["count"] for row in found["bins"]] == [len(rows[place]) for place in sorted(rows)]
        assert np.allclose([[row["predicted"], row["observed"]] for row in found["bins"]], wanted)
        error = sum(len(rows[p]) * abs(w[0] - w[1]) for p, w in zip(sorted(rows), wanted, strict=True)) / 300
        assert found["calibration_error"] == pytest.approx(error)

    def test_exact_scores_are_calibrated(self):
        """Each bin's share has a standard error of at most 0.5 / sqrt(n): 6 of them leave 2e-8 for ten bins."""
        found = reliability(*scored_pairs(50_000, 1.0, 0))
        assert len(found["bins"]) == 10 and sum(row["count"] for row in found["bins"]) == 50_000
        for row in found["bins"]:
            assert abs(row["observed"] - row["predicted"]) < 6 * 0.5 / math.sqrt(row["count"])
        overconfident = reliability(*scored_pairs(50_000, 3.0, 0))
        assert overconfident["calibration_error"] > 0.1 > 5 * found["calibration_error"]
        assert all(row["predicted"] > row["observed"] for row in overconfident["bins"])

    def test_one_pair_and_certain_ones(self):
        assert reliability(torch.zeros(1), torch.zeros(1))["bins"] == [{"predicted": 0.5, "observed": 0.5, "count": 1}]
        found = reliability(torch.tensor([1e4]), torch.tensor([-1e4]))
        assert found == {"calibration_error": 0.0, "bins": [{"predicted": 1.0, "observed": 1.0, "count": 1}]}


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
    def test_the_likeliest(self, temperature):
        real, generated = scored_pairs(400, temperature, 3)
        difference = (real - generated).numpy()

        def loss(log_temperature):
            return np.logaddexp(0, -difference / math.exp(log_temperature)).sum()

        wanted = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
        found, error = fit_temperature(real, generated)
        assert found == pytest.approx(math.exp(wanted.x), rel=1e-5)
        step = 1e-3
        curvature = (loss(wanted.x + step) - 2 * loss(wanted.x) + loss(wanted.x - step)) / step**2
        # About log T, where the slope is 0, the curvature is T² times that about T.
        assert error == pytest.approx(found / math.sqrt(curvature), rel=1e-3)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_scores_of_a_known_temperature(self, temperature):
        """Six standard errors: a chance of 2e-9 for each."""
        found, error = fit_temperature(*scored_pairs(20_000, temperature, 7))
        assert error is not None and abs(found - temperature) < 6 * error < 0.2 * temperature

    def test_after_it_the_scores_are_calibrated(self):
        real, generated = scored_pairs(50_000, 3.0, 1)
        found, _ = fit_temperature(real, generated)
        assert reliability(real / found, generated / found)["calibration_error"] < 0.02

    def test_ends(self):
        up = torch.arange(1.0, 9.0)
        assert fit_temperature(up, torch.zeros(8)) == (LOWEST, None)  # every pair is right
        assert fit_temperature(torch.zeros(8), up) == (HIGHEST, None)  # every pair is wrong
        assert fit_temperature(up, up) == (1.0, None)
        assert fit_temperature(torch.empty(0), torch.empty(0)) == (1.0, None)
