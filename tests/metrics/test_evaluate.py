"""A whole comparison: figures against independent forms, and every reason why one is left out."""

import json

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from varkern.metrics.arrays import ImageArray, write_array
from varkern.metrics.evaluate import PUBLISHED_IMAGES, Report, evaluate, measure
from varkern.metrics.features import Extracted, Extractor
from varkern.metrics.statistics import Measured, load_statistics, save_statistics

from .test_precision_recall import brute_force

CPU = torch.device("cpu")
PROJECTION = torch.randn(48, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HEAD = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def extract(images: torch.Tensor) -> Extracted:
    """Six features, four logits and four spatial features of images of 4x4 pixels."""
    flat = images.double().flatten(1) / 255
    features = flat @ PROJECTION.to(flat.device)
    return Extracted(features, features @ HEAD.to(flat.device), flat[:, :4])


EXTRACTOR = Extractor("own", extract, CPU)


def random_pixels(count: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, size=(count, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def array(tmp_path):
    """An ``.npz`` of given pixels, opened."""

    def write(name: str, pixels: np.ndarray) -> ImageArray:
        path = tmp_path / f"{name}.npz"
        np.savez(path, pixels)
        return ImageArray(path)

    return write


@pytest.fixture
def sets(array):
    return array("generated", random_pixels(90, 0, 30)), array("reference", random_pixels(70, 1))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb) - 2 * np.trace(sqrtm(ca @ cb)).real)


def arrays_of(images: ImageArray) -> list[np.ndarray]:
    return [part.numpy() for part in extract(torch.cat(list(images.batches(1000))))]


class TestFigures:
    @pytest.mark.parametrize("batch_size", [1, 32, 1000])
    def test_every_figure(self, sets, device, batch_size):
        generated, reference = sets
        report = evaluate(generated, reference, None, Extractor("own", extract, device), batch_size)
        (a, logits, spatial), (b, _, other_spatial) = map(arrays_of, sets)
        assert report.fid == pytest.approx(frechet(a, b), rel=1e-8)
        assert report.fid == report.fid_parts.distance
        assert report.fid_parts.trace_generated == pytest.approx(np.trace(np.cov(a, rowvar=False)), rel=1e-9)
        assert report.sfid == pytest.approx(frechet(spatial, other_spatial), rel=1e-8)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        assert report.inception_score == pytest.approx(np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), 1))), rel=1e-9)
        precision, recall = brute_force(b.astype(np.float32), a.astype(np.float32), 3)
        assert (report.precision, report.recall) == (precision, recall) and precision != recall
        assert (report.generated, report.reference, report.missing) == (90, 70, {})
        assert json.loads(json.dumps(report.as_json()))["fid_parts"]["cross_term"] == report.fid_parts.cross_term

    def test_equal_sets(self, sets):
        report = evaluate(sets[0], sets[0], None, EXTRACTOR)
        assert report.fid == pytest.approx(0, abs=1e-9) and report.sfid == pytest.approx(0, abs=1e-9)
        assert (report.precision, report.recall) == (1, 1)

    def test_precision_and_recall_of_the_first_images(self, sets):
        report = evaluate(*sets, None, EXTRACTOR, batch_size=8, keep=20)
        a, b = (arrays_of(images)[0][:20].astype(np.float32) for images in sets)
        assert (report.precision, report.recall) == brute_force(b, a, 3)

    def test_nothing_is_kept_if_not_asked_for(self, sets):
        assert measure(sets[0], EXTRACTOR, 8).features is None
        report = evaluate(*sets, None, EXTRACTOR, keep=0)
        assert report.precision is None and report.recall is None and report.missing["recall"] == "not requested"


class TestStatistics:
    def test_stored_statistics_give_the_same_distances(self, sets, tmp_path):
        whole = evaluate(*sets, None, EXTRACTOR, keep_statistics=lambda s: save_statistics(tmp_path / "s.npz", s))
        stored = load_statistics(tmp_path / "s.npz")
        assert stored.count == 70 and stored.extractor == "own"
        report = evaluate(sets[0], None, stored, EXTRACTOR)
        assert (report.fid, report.sfid) == (whole.fid, whole.sfid) and report.reference == 70
        assert report.precision is None and "statistics but no images" in report.missing["precision"]

    def test_published_file_with_images_and_statistics(self, sets, array):
        """FID is taken against the statistics, precision and recall against the images."""
        whole = evaluate(sets[0], array("other", random_pixels(200, 5)), None, EXTRACTOR)
        other = measure(array("other", random_pixels(200, 5)), EXTRACTOR, 64)
        stored = Measured(other.moments, other.spatial, None, None)
        report = evaluate(*sets, stored, EXTRACTOR)
        assert (report.fid, report.sfid, report.reference) == (whole.fid, whole.sfid, None)
        plain = evaluate(*sets, None, EXTRACTOR)
        assert (report.precision, report.recall) == (plain.precision, plain.recall) and plain.fid != whole.fid

    @pytest.mark.parametrize("order", ["statistics", "images"])
    def test_another_dimension(self, sets, order):
        shorter = Extractor("shorter", lambda images: (extract(images).features[:, :5], None), CPU)
        seen = measure(sets[1], shorter, 8)
        stored = Measured(seen.moments, None, None, None)
        images = sets[1] if order == "images" else None
        with pytest.raises(ValueError, match=r"statistics must have 6 features, as extractor own gives, got 5"):
            evaluate(sets[0], images, stored, EXTRACTOR)

    def test_another_dimension_of_spatial_features(self, sets):
        seen = measure(sets[1], EXTRACTOR, 8)
        stored = Measured(seen.moments, seen.moments, None, None)
        with pytest.raises(ValueError, match=r"have 4 spatial features, as extractor own gives, got 6"):
            evaluate(sets[0], None, stored, EXTRACTOR)

    def test_of_another_extractor(self, sets):
        seen = measure(sets[1], EXTRACTOR, 8)
        with pytest.raises(ValueError, match=r"of features 'own', got those of 'inception'"):
            evaluate(sets[0], None, Measured(seen.moments, None, 70, "inception"), EXTRACTOR)

    def test_without_spatial_statistics(self, sets):
        seen = measure(sets[1], EXTRACTOR, 8)
        report = evaluate(sets[0], None, Measured(seen.moments, None, None, None), EXTRACTOR)
        assert report.sfid is None and report.missing["sfid"] == "the reference's statistics have no spatial features"

    def test_no_reference(self, sets):
        with pytest.raises(ValueError, match="reference must have images or statistics"):
            evaluate(sets[0], None, None, EXTRACTOR)


class TestLeftOut:
    @pytest.mark.parametrize("few", ["generated", "reference"])
    def test_fewer_images_than_features(self, array, few):
        """No FID, and why it would mean nothing; what can be said still is."""
        counts = {"generated": 50, "reference": 50, few: 6}
        report = evaluate(*(array(name, random_pixels(n, n)) for name, n in counts.items()), None, EXTRACTOR)
        assert report.fid is None and report.fid_parts is None
        assert f"6 {few} images but 6 features" in report.missing["fid"]
        assert "reflects the number of images; more than 6 are needed" in report.missing["fid"]
        assert report.sfid is not None and report.precision is not None and report.inception_score is not None

    @pytest.mark.parametrize("count", [1, 3])
    def test_hardly_any_images(self, array, count):
        report = evaluate(
            array("generated", random_pixels(count, 0)), array("reference", random_pixels(50, 1)), None, EXTRACTOR
        )
        assert report.fid is None and report.sfid is None and report.precision is None
        assert "more than 3 generated" in report.missing["recall"]
        assert ("fewer than 2" in report.missing["fid"]) == (count == 1)

    def test_no_logits(self, sets):
        report = evaluate(*sets, None, Extractor("own", lambda images: extract(images)[:1] + (None,), CPU))
        assert report.inception_score is None and report.sfid is None
        assert report.missing == {
            "inception_score": "features own have no logits",
            "sfid": "features own have no spatial features",
        }

    @pytest.mark.parametrize("part", [0, 1, 2], ids=Extracted._fields)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    def test_features_that_are_not_finite(self, sets, part, value):
        def spoiled(images):
            parts = list(extract(images))
            parts[part] = parts[part].masked_fill((images[:, 0, 0, 0] == 33).unsqueeze(1), value)
            return Extracted(*parts)

        reds = torch.cat(list(sets[0].batches(100)))[:, 0, 0, 0]
        first = int((reds == 33).nonzero()[0, 0]) if (reds == 33).any() else None
        assert first is not None
        with pytest.raises(
            ValueError,
            match=rf"{Extracted._fields[part]} of extractor own must be finite, .* the first is arr_0\[{first}\]",
        ):
            evaluate(*reversed(sets), None, Extractor("own", spoiled, CPU), batch_size=1000)

    def test_batch_size(self, sets):
        with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
            evaluate(*sets, None, EXTRACTOR, batch_size=0)


class TestWarnings:
    def report(self, array, generated: np.ndarray, reference: np.ndarray | None = None) -> list[str]:
        reference = random_pixels(60, 1) if reference is None else reference
        report: Report = evaluate(array("generated", generated), array("reference", reference), None, EXTRACTOR)
        return report.warnings

    def test_too_few(self, array):
        (warning,) = self.report(array, random_pixels(50, 0))
        assert "50 generated images" in warning and f"{PUBLISHED_IMAGES:,}" in warning and "biased" in warning

    def test_repeated_seeds(self, array):
        warnings = self.report(array, np.tile(random_pixels(10, 0), (5, 1, 1, 1)))
        assert any("40 of the 50 images" in warning and "seed" in warning for warning in warnings)

    def test_unit_range(self, array):
        warnings = self.report(array, random_pixels(50, 0) // 128)
        assert any("multiplied by 255" in warning for warning in warnings)
        assert not any("mean pixel" in warning for warning in warnings)

    def test_another_range(self, array):
        """Images in [-1, 1] taken for [0, 1] come out half black."""
        shown = (random_pixels(50, 0) / 127.5 - 1).clip(0, 1) * 255
        warnings = self.report(array, shown.astype(np.uint8))
        assert any("colour range" in warning for warning in warnings)

    def test_another_size(self, array, monkeypatch):
        def extractor(images):
            return extract(images[:, :, :4, :4])

        report = evaluate(
            array("generated", np.random.default_rng(0).integers(0, 256, size=(50, 8, 6, 3), dtype=np.uint8)),
            array("reference", random_pixels(60, 1)),
            None,
            Extractor("own", extractor, CPU),
        )
        assert any("6x8 pixels, the reference 4x4" in warning for warning in report.warnings)


def test_no_more_is_kept_than_asked_for(tmp_path):
    batches = (torch.full((100, 3, 4, 4), i, dtype=torch.uint8) for i in range(10))
    write_array(tmp_path / "a.npz", 1000, (4, 4), batches)
    sizes = []

    def counting(images):
        sizes.append(len(images))
        return extract(images)

    measured = measure(ImageArray(tmp_path / "a.npz"), Extractor("own", counting, CPU), 30, keep=100)
    assert sizes == [30] * 33 + [10]
    assert measured.features.shape == (100, 6) and measured.features.dtype == torch.float32 and measured.count == 1000
