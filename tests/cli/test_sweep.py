"""``varkern sweep``: what it writes, what it goes on with, and that wrong input is one line before any work."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from varkern import cli
from varkern.demo import measuring
from varkern.demo.measuring import RealDigits
from varkern.demo.run import WEIGHTS

MODULE = """
def few(images):
    flat = images.float().flatten(1) / 255
    return flat[:, ::40][:, :4], flat[:, :3]
"""


@pytest.fixture
def sweep(weights, tmp_path, monkeypatch):
    """``varkern sweep`` on the small models with options changed (None: left out); its exit code."""
    (tmp_path / "own.py").write_text(MODULE)
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4), features=np.array("inception"))
    monkeypatch.chdir(tmp_path)

    def run(**options) -> int:
        settings = {
            "var": weights / "var.safetensors",
            "vae": weights / "vae.safetensors",
            "scorer": weights / "scorer.safetensors",
            "reference": "real.npz",
            "features": "own:few",
            "m": "1,2,4",
            "first_scale": "0,1",
            "images": 24,
            "seeds": 2,
            "top_k": 20,
            "device": "cpu",
            "out": "out",
            **options,
        }
        arguments = ["sweep"]
        for name, value in settings.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", str(one)]
        return cli.main(arguments)

    return run


PRESET = {"m": None, "first_scale": None}


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(measuring, "REFERENCE_IMAGES", 100)


def test_grid(sweep, tmp_path, capsys):
    assert sweep(pick="best,2") == 0
    printed = capsys.readouterr().out
    assert "| m | first_scale | pick | Fréchet distance |" in printed and "wrote out/sweep.md" in printed
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    # Of two candidates drawing among the two best is resampling, but a cell of its own all the same.
    cells = [(row["m"], row["first_scale"], row["pick"]) for row in rows if row["seed"] == "0"]
    assert cells == [("1", "1", "best")] + [(m, k, pick) for m in "24" for k in "01" for pick in ("best", "2")]
    assert len(rows) == 2 * len(cells) and all(float(row["fid"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "out" / "sweep.md").read_text() in printed
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.format == "PNG"
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["images"] == 24 and settings["features"] == "own:few" and settings["top_k"] == 20


def test_again_and_more(sweep, tmp_path, capsys, one_line):
    assert sweep(m="1,2") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "results").rglob("*.json")}
    assert sweep(m="1,2,1:4:2", n="3", strategy="top,hybrid", alpha="median") == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    names = {path.parent.name for path in (tmp_path / "out" / "results").rglob("*.json")}
    assert names >= {"alone", "m=2", "m=2,first_scale=0", "m=1:4:2", "n=3", "n=3,strategy=top"}
    capsys.readouterr()
    assert sweep(m="1,2", top_k=19) == 2
    assert "made with other settings (top_k was 20, now 19)" in one_line()
    np.savez(tmp_path / "real.npz", np.zeros((20, 8, 8, 3), dtype=np.uint8))
    assert sweep(m="1,2") == 2
    assert "made with other settings (reference.modified was " in capsys.readouterr().err


def test_preset(sweep, tmp_path, capsys):
    """Cells of scales that the model lacks are left out, and it is said."""
    assert sweep(**PRESET, preset="lsrs-table6", max_m=32) == 0
    captured = capsys.readouterr()
    assert "left out: 7 cells of lacking scales" in captured.err
    assert "LSRS, Table 6" in captured.out and "| paper: FID |" in captured.out
    rows = list(csv.DictReader((tmp_path / "out" / "lsrs-table6.csv").open()))
    assert [(row["m"], row["first_scale"]) for row in rows[::2]] == [("1", "1"), ("32", "0"), ("32", "1"), ("32", "2")]


def test_scorers_by_name(sweep, weights, tmp_path, capsys):
    path = weights / "scorer.safetensors"
    given = {**PRESET, "preset": "lsrs-table2", "max_m": 4, "scorer": [f"pointwise={path}", f"pairwise={path}"]}
    assert sweep(**given) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[2:]] == ["", "pointwise", "pairwise"]
    rows = list(csv.DictReader((tmp_path / "out" / "lsrs-table2.csv").open()))
    figures = {name: [row["fid"] for row in rows if row["scorer"] == name] for name in ("", "pointwise", "pairwise")}
    assert figures["pointwise"] == figures["pairwise"] != figures[""]
    assert sweep(**{**given, "scorer": path, "out": "other"}) == 2
    assert "wants scorer 'pointwise', and there is none: given are ''" in capsys.readouterr().err.splitlines()[-1]


def test_models_by_name(sweep, weights, tmp_path):
    """Two names of one file: two rows of equal figures."""
    path = weights / "var.safetensors"
    var = [f"d16={path}", f"d20={path}"]
    assert sweep(**PRESET, preset="var-scaling-table3a", var=var, alpha=1.1, max_m=20) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "var-scaling-table3a.csv").open()))
    assert [(row["model"], row["n"]) for row in rows[::2]] == [("d16", "1"), ("d16", "20"), ("d20", "1"), ("d20", "20")]
    assert rows[0]["fid"] == rows[4]["fid"] != rows[2]["fid"] and rows[2]["alpha"] == "1.1"


def test_times_alone(sweep, tmp_path, capsys):
    assert sweep(**PRESET, preset="lsrs-fig6", max_m=4, reference=None, features=None, images=None) == 0
    assert "| m | ms per image |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "timing" / "settings.json").read_text())["images"] == 24
    assert (tmp_path / "out" / "lsrs-fig6.png").exists()


def test_demo(sweep, tmp_path, capsys, few_digits):
    """The demo model brings its scorer, its reference and its own sampling."""
    nothing = dict.fromkeys(("var", "vae", "scorer", "reference", "features", "top_k", "first_scale"))
    assert sweep(**nothing, m="1,2", images=70, seeds=1) == 0
    assert "70 images per cell and seed, seed 0; cfg=0.0, top_k=0, top_p=0.96" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert len(rows) == 2 and all(float(row["accuracy"]) > 0.9 for row in rows)


def test_torchrun(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sweep() == 0
    assert "other processes have still cells to make" in capsys.readouterr().out
    assert not (tmp_path / "out" / "sweep.md").exists()
    monkeypatch.setenv("RANK", "0")
    assert sweep() == 0
    assert (tmp_path / "out" / "sweep.md").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m": None}, "m, n or preset must be given"),
        ({**PRESET, "preset": "lsrs-table1"}, "preset must be one of lsrs-table2, "),
        ({"preset": "lsrs-table5"}, "m must not be given: lsrs-table5 has its own, got 1,2,4"),
        ({**PRESET, "preset": "lsrs-table5", "pick": "best"}, "pick must not be given"),
        ({**PRESET, "preset": "lsrs-fig6"}, "images must not be given: lsrs-fig6 takes times alone"),
        ({**PRESET, "preset": "lsrs-table4", "var": "demo", "vae": None}, "compares models of several depths"),
        ({"scale": "1"}, "scale must not be given: it goes with n"),
        ({**PRESET, "n": "4", "pick": "best"}, "pick must not be given: it goes with m"),
        ({"alpha": "median"}, "alpha must not be given: only density searches have it"),
        ({"images": 0}, "images must be >= 2, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"reference": "other.npz"}, "reference holds statistics of features 'inception', not 'own:few'"),
        ({"m": "1,two"}, "m must be numbers such as 1,2,4"),
        ({"m": "1:2"}, "m must have one number for each of 3 scales, got 2"),
        ({"m": "0"}, "m must be >= 1, got 0"),
        ({"first_scale": "-1"}, "first_scale must be numbers"),
        ({"first_scale": "3"}, "first_scale must be < 3"),
        ({"pick": "worst"}, "pick must be"),
        ({"n": "x"}, "n must be numbers"),
        ({"n": "4", "strategy": "tallest"}, "strategy must be one of"),
        ({"n": "4", "alpha": "much"}, "alpha must be a number or median, got 'much'"),
        ({"max_m": 0}, "max_m must leave at least one cell"),
        ({"images": 1}, "images must be >= 2, got 1"),
        ({"seeds": 0}, "repeats must be >= 1, got 0"),
        ({"reference": None}, "reference must be given"),
        ({"reference": "nowhere"}, "there is no nowhere"),
        ({"scorer": None}, "wants a scorer, and there is none"),
        ({"scorer": ["a=x", "a=y"]}, "scorer must have different names, got 'a' twice"),
        ({"var": "nowhere.pth"}, "nowhere.pth"),
        ({"features": "own:none"}, "own has no function 'none'"),
        ({**PRESET, "preset": "lsrs-table10"}, "lsrs-table10 wants --scorer with=FILE"),
    ],
)
def test_wrong(sweep, tmp_path, one_line, options, message):
    assert sweep(**options) == 2
    assert message in one_line()
    assert not list(tmp_path.glob("out/**/*.safetensors")) and not list(tmp_path.glob("out/results/*"))


def test_accuracies_beside_the_papers(tmp_path, capsys):
    """LSRS, Table 10, of the shipped scorer against itself on few token maps."""
    out, demo = tmp_path / "report", WEIGHTS / "vae.safetensors"
    for label, image in enumerate(RealDigits(10, 0).images.movedim(1, -1).numpy()):
        (tmp_path / "images" / f"{label}").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{label}" / "a.png")
    tokens = ["tokens", "encode", "--vae", "demo", "--images", str(tmp_path / "images"), "--resize", "1"]
    generated = ["tokens", "generate", "--var", "demo", "--per-class", "2", "--top-k", "0"]
    assert cli.main([*tokens, "--out", str(tmp_path / "real"), "--device", "cpu"]) == 0
    assert cli.main([*generated, "--out", str(tmp_path / "generated"), "--device", "cpu"]) == 0
    capsys.readouterr()
    arguments = ["sweep", "--preset", "lsrs-table10", "--out", str(out), "--vae", str(demo), "--device", "cpu"]
    for name in ("with", "without"):
        arguments += ["--scorer", f"{name}={WEIGHTS / 'scorer.safetensors'}"]
    arguments += ["--real", str(tmp_path / "real"), "--generated", str(tmp_path / "generated")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (out / "scores.png").exists() and "+0.000" in printed
    assert "| 0 | 0.523 | - |" in printed and "| 9 | 0.843 | 0.844 |" in printed
