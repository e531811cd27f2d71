"""``varkern explain`` and ``varkern perturb``: pictures and the figures behind them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import varkern
from varkern import cli
from varkern.scorer import Scorer


@pytest.fixture
def run(weights, tmp_path):
    """One of the commands on the small models, with options changed by keyword (None: left out); its exit code."""

    def run(command: str, **options) -> int:
        settings = {
            "var": weights / "var.safetensors",
            "vae": weights / "vae.safetensors",
            "class": 7,
            "seed": 3,
            "device": "cpu",
            "out": tmp_path / "picture.png",
            **({"scorer": weights / "scorer.safetensors"} if command == "explain" else {}),
            **options,
        }
        arguments = [command]
        for name, value in settings.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        return cli.main(arguments)

    return run


class TestExplain:
    def test_scores_are_those_of_the_generation(self, run, weights, tmp_path, capsys):
        assert run("explain", m=3, number=2, pick="resample", cfg=2.0, top_k=20, top_p=0.8) == 0
        figures = json.loads((tmp_path / "picture.json").read_text())
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        search = varkern.BestOfM(Scorer.from_pretrained(weights / "scorer.safetensors"), 3, pick="resample")
        wanted = varkern.generate(
            model, [7], search=search, seeds=varkern.image_seeds(3, 3)[2:], cfg=2.0, top_k=20, top_p=0.8
        )
        for scale, scores, choice in zip(figures["scales"], wanted.scores, wanted.choices, strict=True):
            assert scale["scores"] == (None if scores is None else pytest.approx(scores[0].tolist()))
            assert scale["kept"] == (0 if choice is None else int(choice))
        assert np.asarray(Image.open(tmp_path / "picture.png")).shape[1] > 4 * 96
        assert str(tmp_path / "picture.png") in capsys.readouterr().out.replace("\n", "")

    def test_explains_an_image_of_sample(self, run, command, tmp_path):
        """Image ``--number`` of ``varkern sample`` with the same seed and settings is the last scale's kept one."""
        assert command(classes="7", num_per_class=3, seed=3) == 0
        assert run("explain", m=3, number=2) == 0
        sampled = np.asarray(Image.open(tmp_path / "out" / "000002-class0007-seed3.png")).astype(int)
        picture = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
        frames = (picture[..., :3] == (213, 94, 0)).all(-1)
        ys, xs = np.nonzero(frames)
        lowest = ys.max()
        left, right = xs[ys == lowest].min(), xs[ys == lowest].max()
        shown = picture[lowest - 5 - 144 : lowest - 5, left + 6 : right - 5, :3]
        assert shown.shape == (144, 144, 3) and np.abs(shown[9::18, 9::18] - sampled).max() <= 1

    @pytest.mark.parametrize("options", [{"m": "1,3,2"}, {"first_scale": 0}, {"autocast": "bfloat16"}], ids=str)
    def test_options(self, run, tmp_path, options):
        assert run("explain", **options) == 0
        assert (tmp_path / "picture.png").exists()

    @pytest.mark.parametrize(
        "options, named",
        [
            ({"class": 12}, "class must be in 0..11, got 12"),
            ({"class": -1}, "class must be in 0..11, got -1"),
            ({"class": None}, "--class"),
            ({"scorer": None}, "scorer must be given"),
            ({"m": 0}, "m must be >= 1, got 0"),
            ({"number": -1}, "number must be >= 0, got -1"),
            ({"out": "a.jpg"}, "out must end in .png"),
            ({"first_scale": 3}, "first_scale must be < 3"),
            ({"pick": "worst"}, "pick must be"),
            ({"cfg": "nan"}, "cfg must be a finite number"),
        ],
        ids=str,
    )
    def test_wrong_input(self, run, tmp_path, monkeypatch, one_line, options, named):
        monkeypatch.chdir(tmp_path)
        assert run("explain", **options) == 2
        assert named in one_line()
        assert not list(tmp_path.iterdir())

    def test_paths(self, run, weights, tmp_path):
        select = {1: "cluster", 2: varkern.search.Resample()}
        assert run("explain", paths="4,3,1", select="1:cluster,2:resample", number=1, cfg=2.0, top_k=20) == 0
        figures = json.loads((tmp_path / "picture.json").read_text())
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        reward = varkern.LogRatio(Scorer.from_pretrained(weights / "scorer.safetensors"))
        options = {"seeds": varkern.image_seeds(3, 2)[1:], "cfg": 2.0, "top_k": 20, "top_p": 0.96}
        tree = varkern.generate(model, [7], search=varkern.PathSearch((4, 3, 1), select, reward), **options).paths
        assert [scale["paths"] for scale in figures["scales"]] == [4, 4, 3]
        parents = [None, *(survivors[0].tolist() for survivors in tree.survivors[:-1])]
        assert [scale["parents"] for scale in figures["scales"]] == parents
        assert [scale["kept"] for scale in figures["scales"]] == [int(kept) for kept in tree.ancestors()]
        assert [scale["rewards"] is None for scale in figures["scales"]] == [True, True, False]
        assert figures["scales"][2]["rewards"] == pytest.approx(tree.rewards[2][0].tolist())
        assert figures["settings"]["paths"] == "4,3,1" and figures["settings"]["m"] == 1
        assert run("explain", paths="4", m=2) == 0

    @pytest.mark.parametrize(
        "options, named",
        [
            ({"select": "2:top"}, "select must be given with paths"),
            ({"paths": "4,x"}, "paths must be a number, or one number per scale"),
            ({"paths": "4", "select": "2=top"}, "select must be scales and rules such as"),
            ({"paths": "4", "select": "2:best"}, "select[2] must be one of"),
            ({"paths": "4,2,1"}, "select must have a rule for scale 1"),
            ({"paths": "4,2"}, "paths must have one number for each of 3 scales, got 2"),
        ],
        ids=str,
    )
    def test_wrong_paths(self, run, one_line, options, named):
        assert run("explain", **options) == 2
        assert named in one_line()


class TestPerturb:
    def test_figures(self, run, tmp_path, capsys):
        assert run("perturb", **{"class": None}, classes="3,7", num_per_class=2, replacements=2) == 0
        figures = json.loads((tmp_path / "picture.json").read_text())
        assert figures["settings"]["classes"] == [3, 3, 7, 7] and figures["settings"]["replacements"] == 2
        assert [(scale["scale"], scale["side"]) for scale in figures["scales"]] == [(0, 1), (1, 2), (2, 4)]
        assert all(0 < scale["change"] < 1 and len(scale["by_image"]) == 4 for scale in figures["scales"])
        output = capsys.readouterr().out
        assert f"scale 2 (4x4): {100 * figures['scales'][2]['change']:.1f}" in output
        assert Image.open(tmp_path / "picture.png").height > 4 * 96

    def test_the_seed_fixes_it(self, run, tmp_path):
        reports = []
        for seed in (3, 3, 4):
            assert run("perturb", seed=seed, replacements=2) == 0
            reports.append((tmp_path / "picture.json").read_text())
        assert reports[0] == reports[1] and reports[0] != reports[2]

    @pytest.mark.parametrize(
        "options, named",
        [
            ({"class": "3,12"}, "class must be in 0..11, got 12"),
            ({"class": "dog"}, "classes must be"),
            ({"replacements": 0}, "replacements must be >= 1, got 0"),
            ({"num_per_class": 0}, "num_per_class must be >= 1, got 0"),
            ({"out": "a.jpg"}, "out must end in .png"),
        ],
        ids=str,
    )
    def test_wrong_input(self, run, tmp_path, monkeypatch, one_line, options, named):
        monkeypatch.chdir(tmp_path)
        assert run("perturb", **options) == 2
        assert named in one_line()
        assert not list(tmp_path.iterdir())


def test_the_demo_explains_itself(tmp_path):
    """With nothing but a class: the shipped models."""
    assert cli.main(["explain", "--class", "7", "--m", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["scales"]) == 5
    assert torch.tensor(json.loads((tmp_path / "a.json").read_text())["scales"][1]["scores"]).isfinite().all()
