"""``varkern sweep``: what it writes, what it goes on with, and that wrong input is one line before any work."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from varkern import cli
from varkern.demo import measuring

MODULE = """
def few(images):
    flat = images.float().flatten(1) / 255
    return flat[:, ::40][:, :4], flat[:, :3]
"""


LINE = {"out", "preset", "show", "var", "vae", "scorer", "reference", "features", "images", "seeds", "max_m", "device"}


def as_toml(settings: dict) -> str:
    """Numbers, texts and lists of them are the same in TOML as in JSON."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name != "grid"]
    for table in settings.get("grid", []):
        lines += ["[[grid]]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines)


def grids(**table) -> dict:
    return {"grid": [table]}


@pytest.fixture
def sweep(weights, tmp_path, monkeypatch):
    """``varkern sweep`` on the small models with settings changed (None: left out), those of the line on the line and
    the rest in a settings file; its exit code."""
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
            "grid": [{"m": [1, 2, 4], "first_scale": [0, 1]}],
            "images": 24,
            "seeds": 2,
            "top_k": 20,
            "device": "cpu",
            "out": "out",
            **options,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        (tmp_path / "settings.toml").write_text(as_toml({n: v for n, v in settings.items() if n not in LINE}))
        arguments = ["sweep", "--settings", "settings.toml"]
        for name in settings.keys() & LINE:
            for one in settings[name] if isinstance(settings[name], list) else [settings[name]]:
                arguments += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
        return cli.main(arguments)

    return run


PRESET = {"grid": None}
ALONE = dict.fromkeys(("var", "vae", "scorer", "reference", "features", "images", "seeds", "top_k", "grid"))


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(measuring, "REFERENCE_IMAGES", 100)


def test_grid(sweep, tmp_path, capsys):
    assert sweep(**grids(m=[1, 2, 4], first_scale=[0, 1], pick=["best", 2])) == 0
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
    few = {"m": [1, 2], "first_scale": [0, 1]}
    assert sweep(**grids(**few)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "results").rglob("*.json")}
    density = {"n": 3, "strategy": ["top", "hybrid"], "alpha": "median"}
    assert sweep(grid=[{**few, "m": [1, 2, [1, 4, 2]]}, density]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    names = {path.parent.name for path in (tmp_path / "out" / "results").rglob("*.json")}
    assert names >= {"alone", "m=2", "m=2,first_scale=0", "m=1:4:2", "n=3", "n=3,strategy=top"}
    capsys.readouterr()
    assert sweep(**grids(**few), top_k=19) == 2
    assert "made with other settings (top_k was 20, now 19)" in one_line()
    np.savez(tmp_path / "real.npz", np.zeros((20, 8, 8, 3), dtype=np.uint8))
    assert sweep(**grids(**few)) == 2
    assert "made with other settings (reference.modified was " in capsys.readouterr().err


def test_preset(sweep, tmp_path, capsys):
    """Cells of scales that the model lacks are left out, and it is said."""
    assert sweep(**PRESET, preset="lsrs-table6", max_m=32) == 0
    captured = capsys.readouterr()
    assert "left out: 7 cells with missing scales" in captured.err
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
    assert "needs scorer 'pointwise', the given scorers are ''" in capsys.readouterr().err.splitlines()[-1]


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
    assert sweep(**ALONE | grids(m=2) | {"images": 70, "seeds": 1}) == 0
    assert "70 images per cell and seed, seed 0; cfg=0.0, top_k=0, top_p=0.96" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert len(rows) == 2 and all(float(row["accuracy"]) > 0.9 for row in rows)


class TestShow:
    def test_what_is_shown_is_a_settings_file_of_the_same(self, sweep, tmp_path, capsys):
        changes = {"cfg": 0.5, **grids(m=[2, [1, 4, 2]], pick=["best", 2]), "scorer": ["a=x.y", 'b=é"\\']}
        assert sweep(**changes, show=True, out=None) == 0
        shown = capsys.readouterr().out
        assert "cfg = 0.5\n" in shown and "batch_size = 25\n" in shown and "top_p = 0.96\n" in shown
        (tmp_path / "shown.toml").write_text(shown)
        assert cli.main(["sweep", "--settings", "shown.toml", "--show"]) == 0
        assert capsys.readouterr().out == shown
        assert cli.main(["sweep", "--settings", "shown.toml", "--show", "--images", "7"]) == 0
        assert capsys.readouterr().out == shown.replace("images = 24", "images = 7")
        assert not (tmp_path / "out").exists()

    def test_defaults_by_model_and_preset(self, sweep, capsys):
        assert cli.main(["sweep", "--preset", "var-scaling-table3b", "--var", "d30", "--show"]) == 0
        shown = capsys.readouterr().out
        assert 'preset = "var-scaling-table3b"\n' in shown and "cfg = 1.0\ntop_k = 900\n" in shown
        assert cli.main(["sweep", "--preset", "lsrs-table5", "--show"]) == 0
        assert "images = 2000\n" in (shown := capsys.readouterr().out) and "cfg = 0.0\ntop_k = 0\n" in shown
        assert cli.main(["sweep", "--preset", "lsrs-fig6", "--show"]) == 0
        assert "images" not in capsys.readouterr().out


def test_torchrun(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sweep() == 0
    assert "other processes are still working" in capsys.readouterr().out
    assert not (tmp_path / "out" / "sweep.md").exists()
    monkeypatch.setenv("RANK", "0")
    assert sweep() == 0
    assert (tmp_path / "out" / "sweep.md").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (PRESET, "preset or grid must be given"),
        ({**PRESET, "preset": "lsrs-table1"}, "preset must be one of lsrs-table2, "),
        ({"preset": "lsrs-table5"}, "grid must not be given: the preset lsrs-table5 defines the cells, got"),
        ({**PRESET, "preset": "lsrs-fig6"}, "images must not be given: the preset lsrs-fig6 only measures the time"),
        ({**PRESET, "preset": "lsrs-table4", "var": "demo", "vae": None}, "which compares several depths"),
        ({"real": "DIR"}, "settings.toml: unknown setting real; "),
        ({"alpha": "median"}, "alpha must not be given: only density searches use it"),
        ({"images": 0}, "images must be >= 2, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"reference": "other.npz"}, "reference must hold statistics of features 'own:few', got 'inception'"),
        (grids(m=[1, "two"]), "settings.toml: grid 1: m must be an integer, got 'two'"),
        (grids(m=[[1, 2]]), "m must have one number for each of 3 scales, got 2"),
        (grids(m=0), "m must be >= 1, got 0"),
        (grids(m=2, first_scale=3), "first_scale must be < 3"),
        (grids(m=2, pick="worst"), "pick must be"),
        (grids(n=4, strategy="tallest"), "strategy must be one of"),
        ({**grids(n=4), "alpha": "much"}, "alpha must be a number or median, got 'much'"),
        ({"max_m": 0}, "max_m must leave at least one cell"),
        ({"images": 1}, "images must be >= 2, got 1"),
        ({"seeds": 0}, "repeats must be >= 1, got 0"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"autocast": "int8"}, "autocast must be one of float32, bfloat16, float16, got 'int8'"),
        ({"out": None}, "out must be a folder for figures, tables and pictures, got none"),
        ({"reference": None}, "reference must be real images or their statistics, got none"),
        ({"reference": "nowhere"}, "there is no nowhere"),
        ({"scorer": None}, "needs a scorer, the given scorers are none"),
        ({"scorer": ["a=x", "a=y"]}, "scorer must have different names, got 'a' twice"),
        ({"var": "nowhere.pth"}, "nowhere.pth"),
        ({"features": "own:none"}, "own has no 'none'"),
    ],
)
def test_wrong(sweep, tmp_path, one_line, options, message):
    assert sweep(**options) == 2
    assert message in one_line()
    assert not list(tmp_path.glob("out/**/*.safetensors")) and not list(tmp_path.glob("out/results/*"))
