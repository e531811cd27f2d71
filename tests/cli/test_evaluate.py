"""``varkern evaluate``: what it prints and writes, and that wrong input is one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from varkern import cli
from varkern.demo import digits
from varkern.demo.run import WEIGHTS
from varkern.demo.train import load_classifier

from ..references.metrics import frechet_distance

MODULE = """
import torch
def few(images):
    flat = images.float().flatten(1) / 255
    return flat[:, :4], flat[:, :3]
def spoiled(images):
    return few(images)[0] * float("nan"), None
"""


def pixels(count: int, seed: int) -> np.ndarray:
    images, _ = digits.real_batch(count, torch.Generator().manual_seed(seed))
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of 80 digits, an ``.npz`` of 90 others, and a module of features."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "images").mkdir()
    for number, image in enumerate(pixels(80, 0)):
        Image.fromarray(image).save(folder / "images" / f"{number:03d}.png")
    np.savez(folder / "real.npz", pixels(90, 1))
    (folder / "own.py").write_text(MODULE)
    return folder


@pytest.fixture
def evaluate(sets, monkeypatch):
    """``varkern evaluate`` on them, standing in their folder, with options changed; its exit code."""
    monkeypatch.chdir(sets)

    def run(**options) -> int:
        settings = {"generated": "images", "reference": "real.npz", "features": "demo", "device": "cpu", **options}
        arguments = ["evaluate"]
        for name, value in settings.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        return cli.main(arguments)

    return run


class TestEvaluate:
    def test_figures(self, evaluate, tmp_path, capsys):
        assert evaluate(out=tmp_path / "a" / "report.json") == 0
        report = json.loads((tmp_path / "a" / "report.json").read_text())
        classifier = load_classifier(WEIGHTS)
        a, b = (
            classifier.features(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
            for images in (pixels(80, 0), pixels(90, 1))
        )
        assert report["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
        assert 1 < report["inception_score"] <= 10 and 0 < report["precision"] <= 1
        assert report["settings"] == {"generated": "images", "reference": "real.npz"}
        captured = capsys.readouterr()
        assert f"{report['fid']:.4f}" in captured.out and "Tr Σ_g" in captured.out and "sFID" in captured.out
        assert "left out: sFID: 80 generated images but 252 features" in captured.out
        warnings = captured.err.splitlines()
        assert len(warnings) == 1 and warnings[0].startswith("varkern: warning: 80 generated images")

    def test_statistics_of_the_reference(self, evaluate, tmp_path, capsys):
        assert evaluate(save_reference=tmp_path / "s.npz", out=tmp_path / "a.json") == 0
        assert evaluate(reference=tmp_path / "s.npz", out=tmp_path / "b.json") == 0
        a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
        assert a["fid"] == b["fid"] and b["precision"] is None
        assert "statistics but no images" in capsys.readouterr().out

    def test_reference_of_images_and_statistics(self, evaluate, tmp_path):
        """The published suite's form."""
        assert evaluate(reference="images", save_reference=tmp_path / "s.npz") == 0
        with np.load(tmp_path / "s.npz") as file:
            np.savez(tmp_path / "both.npz", arr_0=pixels(90, 1), mu=file["mu"], sigma=file["sigma"])
        assert evaluate(reference=tmp_path / "both.npz", out=tmp_path / "a.json") == 0
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["fid"] == pytest.approx(0, abs=1e-6) and report["precision"] is not None

    def test_own_features(self, evaluate, tmp_path):
        assert evaluate(features="own:few", out=tmp_path / "a.json", neighbors=0) == 0
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["features"] == "own:few" and report["fid"] is not None and report["recall"] is None

    def test_fewer_images_than_features(self, evaluate, sets, tmp_path, capsys):
        np.savez(tmp_path / "few.npz", pixels(64, 3))
        assert evaluate(generated=tmp_path / "few.npz") == 0
        assert "left out: FID: 64 generated images but 64 features" in capsys.readouterr().out

    def test_repeated_images(self, evaluate, tmp_path, capsys):
        np.savez(tmp_path / "twice.npz", np.concatenate((pixels(40, 3), pixels(40, 3))))
        assert evaluate(generated=tmp_path / "twice.npz") == 0
        assert "warning: 40 of the 80 images" in capsys.readouterr().err


WRONG = {
    "no_generated": ({"generated": "/nowhere"}, "there is no /nowhere"),
    "no_reference": ({"reference": "nowhere.npz"}, "there is no nowhere.npz"),
    "reference_is_no_npz": ({"reference": "own.py"}, "must be a folder of images or an .npz"),
    "features_unknown": ({"features": "vgg"}, "inception, demo or module:function, got 'vgg'"),
    "features_no_function": ({"features": "own:nothing"}, "own has no 'nothing'"),
    "features_nan": ({"features": "own:spoiled"}, "must be finite, got NaN or infinity"),
    "weights_without_inception": (
        {"inception_weights": "w.pth"},
        "inception_weights need features inception, got demo",
    ),
    "batch_size": ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    "neighbors": ({"neighbors": -1}, "neighbors must be >= 0, got -1"),
    "out": ({"out": "report.txt"}, "out must end in .json"),
    "save_reference": ({"save_reference": "stats.npy"}, "save_reference must end in .npz"),
    "save_over_reference": ({"save_reference": "real.npz"}, "another file than reference"),
    "device": ({"device": "abacus"}, "device must be auto"),
}


class TestWrongInput:
    @pytest.mark.parametrize("options, named", WRONG.values(), ids=WRONG.keys())
    def test_one_line(self, evaluate, one_line, options, named):
        assert evaluate(**options) == 2
        assert named in one_line()

    def test_statistics_of_other_features(self, evaluate, tmp_path, one_line):
        np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        assert evaluate(reference=tmp_path / "s.npz") == 2
        assert "must have 64 features, as extractor demo gives, got 2048" in one_line()

    def test_npz_of_something_else(self, evaluate, tmp_path, one_line):
        np.savez(tmp_path / "s.npz", images=np.zeros(3))
        assert evaluate(reference=tmp_path / "s.npz") == 2
        assert "must have arr_0" in one_line()

    def test_digits_of_another_size(self, evaluate, tmp_path, one_line):
        np.savez(tmp_path / "s.npz", np.zeros((70, 32, 32, 3), np.uint8))
        assert evaluate(generated=tmp_path / "s.npz", reference=tmp_path / "s.npz") == 2
        assert "24x24 pixels for features demo, got 32x32" in one_line()

    def test_greyscale(self, evaluate, tmp_path, one_line):
        Image.new("L", (24, 24)).save(tmp_path / "a.png")
        assert evaluate(generated=tmp_path) == 2
        assert "greyscale" in one_line()
