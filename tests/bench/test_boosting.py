"""``python -m bench.boosting``: which scorers it compares, that a kill changes nothing, and its figures and tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench import boosting
from varkern import BestOfM, Scorer, SumOfScorers
from varkern.data import TokenMaps
from varkern.demo import measuring
from varkern.demo.train import Recipe
from varkern.ops.backend import use_backend
from varkern.studies.cells import Cell
from varkern.training import scorer as training_scorer
from varkern.training.scorer import read_facts

SEARCHES = {"two": Cell(m=2, pick="resample")}  # whatever a cell's search is, the sweep makes it
FEWEST = 70  # images, more than the 64 features


def command(folder, **changed):
    options = {"out": folder, "seeds": 1, "images": FEWEST, "maps": 100, "epochs": 0.7, "m": 2, **changed}
    return boosting.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="class")
def finished(tmp_path_factory):
    """The folder of a tiny run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("boosting") / "out"
    with pytest.MonkeyPatch.context() as patch, use_backend("torch"):
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        patch.setattr(boosting, "SEARCHES", SEARCHES)
        patch.setattr(boosting, "LEAST_IMAGES", FEWEST)
        assert command(folder) == 0
        yield folder


class TestRun:
    def test_what_the_scorers_were_trained_on(self, finished):
        """The other and the second differ in their generated maps alone, the first in seeds."""
        folder = finished / "seed-0"
        settings = {
            name: read_facts(folder / f"{name}.safetensors")["settings"] for name in ("first", "other", "second")
        }
        differ = {name for name in settings["other"] if settings["other"][name] != settings["second"][name]}
        assert differ == {"generated"}
        assert {n for n in settings["first"] if settings["first"][n] != settings["other"][n]} == {"generated", "seed"}
        maps = {name: TokenMaps.open(folder / "tokens" / name) for name in settings}
        sources = {name: found.manifest.source for name, found in maps.items()}
        assert "search" not in sources["first"] and "search" not in sources["other"]
        assert sources["other"]["seed"] == sources["second"]["seed"] != sources["first"]["seed"]
        first, second = (Scorer.from_pretrained(folder / f"{name}.safetensors") for name in ("first", "second"))
        assert sources["second"]["search"] == repr(BestOfM(first, m=2, pick="resample"))
        assert second.on_top_of == ("first.safetensors",) and first.on_top_of == ()
        SumOfScorers(first, second)

    def test_a_killed_run_ends_with_the_same_figures(self, finished, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "out")
        seed = tmp_path / "out" / "seed-0"
        for left in ("second.safetensors", "figures.json", "figures"):
            path = seed / left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        train, calls = training_scorer.Trainer.batch_loss, []

        def killed(self, step):
            calls.append(step)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return train(self, step)

        monkeypatch.setattr(training_scorer.Trainer, "batch_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            command(tmp_path / "out")
        monkeypatch.setattr(training_scorer.Trainer, "batch_loss", train)
        assert command(tmp_path / "out") == 0
        assert all(
            torch.equal(tensor, load_file(finished / "seed-0" / "second.safetensors")[name])
            for name, tensor in load_file(seed / "second.safetensors").items()
        )
        assert (tmp_path / "out" / "boosting.json").read_text() == (finished / "boosting.json").read_text()

    def test_other_settings_are_refused(self, finished, capsys):
        before = (finished / "boosting.json").read_text()
        assert command(finished, m=3) == 2
        error = capsys.readouterr().err
        assert error.startswith("boosting: ") and "m was 2, now 3" in error
        assert (finished / "boosting.json").read_text() == before

    def test_the_command_is_in_the_figures(self, finished):
        words = f"python -m bench.boosting --out DIR --seeds 1 --images {FEWEST} --maps 100 --epochs 0.7 --m 2"
        assert json.loads((finished / "boosting.json").read_text())["command"] == words
        assert (finished / "boosting.md").read_text().startswith(f"`{words}`: mean ± standard error over 1 training")

    def test_one_seed_of_several(self, finished, tmp_path, capsys):
        """Processes share the seeds, and each writes the table of what is finished."""
        shutil.copytree(finished, tmp_path / "out")
        assert command(tmp_path / "out", seeds=3, only=0) == 0
        assert json.loads((tmp_path / "out" / "boosting.json").read_text())["training_seeds"] == [0]
        assert command(tmp_path / "out", seeds=3, only=3) == 2
        assert "only must be in 0..2, the training seeds, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"seeds": 0}, {"images": 64}, {"maps": 10}, {"m": 1}, {"epochs": 0}], ids=str)
def test_bad_options(tmp_path, capsys, options):
    assert command(tmp_path / "out", **{"images": 100, **options}) == 2
    (name,) = options
    assert f"{name} must be " in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or name == "epochs"


def seed_with(number, **fid):
    rows = [{"scorer": "", "cell": "alone", "fid": 25.0 + number, "precision": 0.5, "recall": 0.25}]
    for cell in boosting.SEARCHES.values():
        for name, value in fid.items():
            rows.append({"scorer": name, "cell": cell.name, "fid": value, "precision": 0.6, "recall": 0.3})
    return {"seed": number, "rows": rows}


def test_figures_by_hand():
    seeds = [seed_with(0, first=18.0, mean=15.0, boosted=14.0), seed_with(1, first=17.0, mean=16.0, boosted=12.0)]
    report = boosting.compare(seeds)
    assert report["training_seeds"] == [0, 1] and report["alone"]["fid"]["mean"] == 25.5
    boosted = next(row for row in report["figures"] if row["scorer"] == "boosted")
    values = np.array([14.0, 12.0])
    assert boosted["fid"]["mean"] == values.mean()
    assert boosted["fid"]["standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(2))
    difference = next(row for row in report["differences"] if row["of"] == ["boosted", "mean"])
    assert difference["fid"]["values"] == [-1.0, -4.0] and difference["fid"]["mean"] == -2.5
    assert difference["fid"]["standard_error"] == pytest.approx(1.5)
    table = boosting.markdown({"command": "the command", "images": 2000, **report})
    assert table.startswith("`the command`: mean ± standard error over 2 training seeds of 2,000 images each.\n\n|")
    assert "| resample, M=16 | sum of the first and one on top | 13.00 ± 1.00 | 0.600 ± 0.000 |" in table
    assert "| resample, M=64 | boosted − mean | -2.50 ± 1.50 | +0.000 ± 0.000 | +0.000 ± 0.000 |" in table
    one = boosting.markdown({"command": "the command", "images": 2000, **boosting.compare(seeds[:1])})
    assert "| the model alone |  | 25.00 | 0.500 | 0.250 |" in one and "±" not in one.split("\n", 1)[1]


def test_the_mean_is_of_the_scores():
    def scored(value):
        return lambda labels, features, scale: torch.full(features.shape[:2], value)

    mean = boosting.Mean(scored(1.0), scored(4.0), scored(-2.0))
    assert mean(torch.tensor([0, 1]), torch.zeros(2, 3, 8, 6, 6), 0).tolist() == [[1.0] * 3] * 2


def test_the_committed_figures():
    """The page shows the stored figures of five training seeds, and the differences follow from them."""
    folder = Path(__file__).parent.parent.parent / "bench" / "results" / "demo"
    report = json.loads((folder / "boosting.json").read_text(encoding="utf-8"))
    assert (folder / "boosting.md").read_text(encoding="utf-8") == boosting.markdown(report)
    assert report["training_seeds"] == [0, 1, 2, 3, 4] and report["command"].startswith("python -m bench.boosting ")
    values = {}
    for row in report["figures"]:
        values[row["search"], row["scorer"]] = np.array(row["fid"]["values"])
    for row in report["differences"]:
        first, second = (values[row["search"], name] for name in row["of"])
        assert row["fid"]["mean"] == pytest.approx((first - second).mean())
    assert len(report["differences"]) == 9 and all(len(of_seeds) == 5 for of_seeds in values.values())


def test_the_defaults_are_the_demos():
    """A scorer of the table is trained as long as the one that ships."""
    usual = Recipe()
    assert (usual.real_maps, usual.generated_maps) == (60_000, 30_000)
    assert list(boosting.SEARCHES.values()) == [
        Cell(m=16, pick="resample"),
        Cell(m=64, pick="resample"),
        Cell(m=8, proposals=8, pick="resample"),
    ]
