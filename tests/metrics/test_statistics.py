"""Statistics in one pass equal those of the whole set; files hold them, and nothing is unpickled."""

import pickle

import numpy as np
import pytest
import torch

from varkern.metrics.frechet import Moments
from varkern.metrics.statistics import (
    Measured,
    RunningMoments,
    RunningScore,
    load_statistics,
    save_statistics,
)

from ..references.metrics import moments

# A mean a thousand times the spread: sums of squares would lose six digits here.
FEATURES = np.random.default_rng(0).normal(size=(257, 7)) @ np.diag([1, 2, 3, 4, 5, 6, 0.01]) + 1000.0


def in_batches(features: np.ndarray, size: int) -> RunningMoments:
    running = RunningMoments()
    for start in range(0, len(features), size):
        running.add(torch.from_numpy(features[start : start + size]))
    return running


def assert_equal(found: Moments, features: np.ndarray, tolerance: float = 1e-10) -> None:
    covariance = np.cov(features, rowvar=False)
    assert np.abs(found.mean.numpy() - features.mean(0)).max() <= tolerance * np.abs(features.mean(0)).max()
    assert np.abs(found.covariance.numpy() - covariance).max() <= tolerance * np.abs(covariance).max()


class TestMoments:
    @pytest.mark.parametrize("size", [1, 2, 64, 256, 257, 1000])
    def test_batches_equal_the_whole(self, size):
        assert_equal(in_batches(FEATURES, size).moments(), FEATURES)

    @pytest.mark.parametrize("cuts", [(100,), (1, 2), (0, 257), (37, 37, 200)], ids=str)
    def test_merged_shares_equal_the_whole(self, cuts):
        """As several processes would: each its share, some of them empty, merged in any order."""
        shares = [in_batches(share, 10) for share in np.split(FEATURES, cuts)]
        merged = RunningMoments()
        for share in reversed(shares):
            merged.merge(share)
        assert merged.count == 257
        assert_equal(merged.moments(), FEATURES)

    def test_merging_leaves_the_share_alone(self):
        first, share = RunningMoments(), in_batches(FEATURES[:50], 10)
        first.merge(share)
        first.add(torch.from_numpy(FEATURES[50:]))
        assert_equal(share.moments(), FEATURES[:50])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_half_precision_is_summed_in_float64(self, dtype):
        features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        running = RunningMoments()
        for batch in features.t().contiguous().t().split(7):  # not contiguous
            running.add(batch)
        assert_equal(running.moments(), features.double().numpy())

    def test_equals_the_plain_form(self):
        found, wanted = in_batches(FEATURES, 50).moments(), moments(torch.from_numpy(FEATURES))
        assert torch.allclose(found.covariance, wanted.covariance, rtol=1e-10)

    def test_empty_batches_change_nothing(self):
        running = in_batches(FEATURES, 50)
        running.add(torch.zeros(0, 7))
        assert_equal(running.moments(), FEATURES)

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few(self, count):
        with pytest.raises(ValueError, match=f"at least 2 images, got {count}"):
            in_batches(FEATURES[:count], 1).moments()

    def test_wrong_shapes(self):
        running = in_batches(FEATURES, 50)
        with pytest.raises(ValueError, match=r"must have shape \[N, D\], got \[3\]"):
            running.add(torch.zeros(3))
        with pytest.raises(ValueError, match="7 per image as before, got 6"):
            running.add(torch.zeros(3, 6))


class TestScore:
    P = np.random.default_rng(1).dirichlet(np.full(6, 0.3), size=107)

    def reference(self, split: int) -> float:
        scores = []
        for start in range(0, len(self.P), split):
            p = self.P[start : start + split]
            scores.append(np.exp(np.mean([np.sum(row * np.log(row / p.mean(0))) for row in p])))
        return float(np.mean(scores))

    @pytest.mark.parametrize("split", [20, 107, 5000])
    @pytest.mark.parametrize("size", [1, 13, 20, 33, 107])
    def test_equals_the_mean_over_splits(self, split, size):
        score = RunningScore(split)
        for start in range(0, 107, size):
            score.add(torch.from_numpy(self.P[start : start + size]), start)
        assert score.score() == pytest.approx(self.reference(split), rel=1e-12)

    def test_shares_merge_into_the_same_splits(self):
        shares = [RunningScore(20) for _ in range(3)]
        for start in range(0, 107, 9):
            shares[start // 9 % 3].add(torch.from_numpy(self.P[start : start + 9]), start)
        shares[0].merge(shares[1])
        shares[0].merge(shares[2])
        assert shares[0].score() == pytest.approx(self.reference(20), rel=1e-12)

    def test_one_split_is_the_plain_form(self):
        score = RunningScore()
        score.add(torch.from_numpy(self.P), 0)
        divergences = np.sum(self.P * np.log(self.P / self.P.mean(0)), 1)
        assert score.score() == pytest.approx(np.exp(divergences.mean()), rel=1e-12)

    def test_the_published_splits_have_5000_images(self):
        """Two kinds of images, one in each split: every split alone has the score 1, both together would have 2."""
        score = RunningScore()
        for start, kind in ((0, [1.0, 0.0]), (5000, [0.0, 1.0])):
            score.add(torch.tensor(kind).repeat(5000, 1), start)
        assert score.score() == pytest.approx(1)

    def test_zero_probabilities(self):
        score = RunningScore()
        score.add(torch.eye(4).repeat(3, 1), 0)
        assert score.score() == pytest.approx(4)

    def test_no_images(self):
        with pytest.raises(ValueError, match="at least 1 image"):
            RunningScore().score()


class TestFiles:
    def test_round_trip(self, tmp_path):
        stored = Measured(in_batches(FEATURES, 9).moments(), in_batches(FEATURES[:, :3], 9).moments(), 257, "demo")
        save_statistics(tmp_path / "a.npz", stored)
        found = load_statistics(tmp_path / "a.npz")
        assert found.count == 257 and found.extractor == "demo"
        for mine, theirs in zip((*stored.moments, *stored.spatial), (*found.moments, *found.spatial), strict=True):
            assert torch.equal(mine, theirs)
        assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]

    def test_published_form(self, tmp_path):
        """Statistics beside images, in another precision, without a count."""
        arrays = {"mu": np.zeros(3, np.float32), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2)}
        np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
        found = load_statistics(tmp_path / "a.npz")
        assert found.moments.mean.dtype == torch.float64 and found.spatial.mean.tolist() == [1, 1]
        assert found.count is None and found.extractor is None

    @pytest.mark.parametrize(
        "arrays, named",
        [
            ({"arr_0": np.zeros(3)}, "must have the statistics mu and sigma, got arr_0"),
            ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \[3\] and \[4, 4\]"),
            ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"got \[3, 1\]"),
            ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "must be floats, got int64"),
            ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
            ({"mu": np.zeros(3), "sigma": np.diag([1.0, 1.0, np.inf])}, "must be finite"),
        ],
        ids=["no_statistics", "sigma_shape", "mu_shape", "integers", "nan", "infinite"],
    )
    def test_wrong_files(self, tmp_path, arrays, named):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=named):
            load_statistics(tmp_path / "a.npz")

    def test_nothing_is_unpickled(self, tmp_path):
        ran = tmp_path / "ran"

        class Trap:
            def __reduce__(self):
                return ran.touch, ()

        np.savez(tmp_path / "a.npz", mu=np.array([Trap()], object), sigma=np.eye(1))
        (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
        for name in "ab":
            with pytest.raises(ValueError):
                load_statistics(tmp_path / f"{name}.npz")
        assert not ran.exists()

    def test_damaged_file(self, tmp_path):
        np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
        (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
        with pytest.raises(ValueError, match=r"b\.npz"):
            load_statistics(tmp_path / "b.npz")
