"""``python -m bench.demo_tables``: every figure of the page can be made again, and is what the page shows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.demo_tables import page, scorers, tables
from bench.demo_tables.__main__ import main
from varkern.demo import measuring, run
from varkern.demo.train import SAMPLING
from varkern.ops.backend import use_backend
from varkern.studies import calibration, report, sweep
from varkern.studies.calibration import density_ratios
from varkern.studies.cells import Cell
from varkern.studies.presets import PRESETS

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "bench" / "results" / "demo"
PAGE = (ROOT / "varkern" / "demo" / "README.md").read_text()


@pytest.fixture(scope="class")
def small():
    """Four cells, one of them of a trained scorer and a timing, against few real digits."""
    cells = [Cell(), Cell(m=2), Cell(m=2, scorer="pointwise"), Cell(n=4, min_distance=0.0)]
    few = [tables.make_preset("few", "Few", cells), replace(PRESETS["lsrs-fig6"], rows=((Cell(), {}), (Cell(m=2), {})))]
    changes = {
        "presets": lambda: {preset.name: preset for preset in few},
        "BATCH_SIZE": 40,
        "TIMED_IMAGES": 10,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(tables, name, value)
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        patch.setattr(calibration, "CALIBRATION_IMAGES", 40)
        yield


def prepared(folder):
    """A folder with trained scorers: copies of the shipped one, since here nothing depends on what they are."""
    (folder / "scorers").mkdir(parents=True)
    for name in scorers.trainings(scorers.RECIPE):
        shutil.copy(run.WEIGHTS / "scorer.safetensors", folder / "scorers" / f"{name}.safetensors")
    shutil.copy(FIGURES / "scorers.json", folder / "scorers")
    return folder


@pytest.fixture(scope="class")
def finished(small, tmp_path_factory):
    """The folder of a finished run, the weights that it was made of, and a page that it filled."""
    root = tmp_path_factory.mktemp("table")
    prepared(root / "out")
    shutil.copytree(run.WEIGHTS, root / "weights")
    (root / "page.md").write_text("before\n<!-- table few -->\nold\n<!-- end -->\nafter\n")
    with use_backend("torch"):
        assert main(arguments(root)) == 0
    return root


def arguments(root, **changed):
    options = {"out": root / "out", "weights": root / "weights", "page": root / "page.md", "images": 70, "seeds": 2}
    options |= changed
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class TestCommand:
    def test_what_is_written(self, finished):
        out = finished / "out"
        text = (finished / "page.md").read_text()
        assert text.startswith("before\n<!-- table few -->\n| m | scorer | n |") and text.endswith(
            "<!-- end -->\nafter\n"
        )
        assert "old" not in text and "± " in text
        names = {path.name for path in out.iterdir() if path.is_file()}
        assert names >= {f"{a}.{b}" for a in ("few", "lsrs-fig6") for b in ("md", "csv", "json", "png")}
        assert names >= {"references.json", "scorers.json"}
        references = json.loads((out / "references.json").read_text())
        assert [len(rows) for rows in references.values()] == [2, 2]

    def test_only_some_of_the_tables(self, finished, tmp_path, monkeypatch, capsys):
        """The figures are the same, the other tables of the page stay, and no scorer is trained that is not needed."""
        shutil.copytree(finished / "out" / "results", tmp_path / "out" / "results")
        (tmp_path / "page.md").write_text(
            "<!-- table few -->\nold\n<!-- end -->\n<!-- table lsrs-fig6 -->\nold\n<!-- end -->\n"
        )
        plain = [Cell(), Cell(m=2)]
        presets = {name: tables.make_preset(name, "Few", plain) for name in ("few", "lsrs-fig6")}
        monkeypatch.setattr(tables, "presets", lambda: presets)
        monkeypatch.setattr(scorers, "run", lambda *given: pytest.fail("a scorer was trained"))
        given = arguments(finished, out=tmp_path / "out", page=tmp_path / "page.md")
        assert main([*given, "--tables", "few"]) == 0
        text = (tmp_path / "page.md").read_text()
        assert text.startswith("<!-- table few -->\n| m |") and text.count("old") == 1
        assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"few.json", "settings.json"}
        assert "--out DIR --tables few --images 70" in (tmp_path / "out" / "few.md").read_text()
        whole = json.loads((finished / "out" / "few.json").read_text())["cells"]
        for cell in json.loads((tmp_path / "out" / "few.json").read_text())["cells"]:
            (same,) = (other for other in whole if other["settings"] == cell["settings"])
            assert [r["fid"] for r in cell["repeats"]] == [r["fid"] for r in same["repeats"]]

    def test_a_second_run_makes_nothing_again(self, finished, monkeypatch, capsys):
        before = {path: path.read_bytes() for path in (finished / "out").rglob("*") if path.suffix in (".json", ".md")}
        monkeypatch.setattr(sweep, "generate", lambda *given, **named: pytest.fail("an image was made"))
        assert main(arguments(finished)) == 0
        assert {path: path.read_bytes() for path in before} == before
        assert "files of figures" in capsys.readouterr().out

    def test_times_are_those_taken_alone(self, finished):
        out, seed = finished / "out", tables.REPORTED_SEED
        for cell in json.loads((out / "few.json").read_text())["cells"]:
            name = Path("results", Cell(**cell["settings"]).name, f"seed-{seed}.json")
            timed, measured = (json.loads((out / folder / name).read_text()) for folder in ("timing", "."))
            assert cell["repeats"][0]["seconds"] == timed["seconds"] != measured["seconds"]
            assert cell["repeats"][0]["fid"] == measured["fid"] and "fid" not in timed

    def test_scorers_are_trained_by_one_process(self, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert main(arguments(finished, out=tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert "has no scorers yet; one process must train them: first call this without torchrun" in error

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"page": "other.md"}, "must be among few, "),
            ({"images": 1}, "images must be >= 2, got 1"),
            ({"seeds": 0}, "seeds must be >= 1, got 0"),
            ({"tables": "many"}, "tables must be among few, lsrs-fig6, got 'many'"),
            ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ],
    )
    def test_wrong_input_before_any_work(self, finished, tmp_path, monkeypatch, capsys, changed, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other.md").write_text("<!-- table fewer -->\n<!-- end -->\n")
        monkeypatch.setattr(tables, "run", lambda *given: pytest.fail("work began"))
        assert main(arguments(finished, **changed)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    def test_processes_share_the_cells(self, finished, tmp_path, monkeypatch, capsys):
        """The first of two makes its half; one process alone makes the rest, takes the times and writes."""
        out = prepared(tmp_path / "out")
        shutil.copytree(finished / "out" / "alpha", out / "alpha")
        given = ["--out", str(out), "--images", "60", "--seeds", "1"]
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("RANK", "1")
            assert main(given) == 0 and "Call again without torchrun" in capsys.readouterr().out
        assert not (out / "few.md").exists() and len(list((out / "results").iterdir())) == 2
        assert main(given) == 0 and (out / "few.md").exists()
        assert "`python -m bench.demo_tables --out DIR --images 60 --seeds 1`" in (out / "few.md").read_text()

    @pytest.mark.parametrize("name", ["vae", "var", "scorer", "classifier"])
    def test_figures_of_other_weights_are_refused(self, finished, name, tmp_path, monkeypatch, capsys):
        weights = shutil.copytree(finished / "weights", tmp_path / "weights")
        content = bytearray((weights / f"{name}.safetensors").read_bytes())
        content[-4] ^= 1
        (weights / f"{name}.safetensors").write_bytes(content)
        monkeypatch.setattr(sweep, "generate", lambda *given, **named: pytest.fail("an image was made"))
        assert main(arguments(finished, weights=weights)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        # Scorers were trained on the VQ-VAE and VAR, and judged beside the shipped one; figures need the classifier.
        what = "weights" if name == "classifier" else f"{name} "
        assert f"made with other settings ({what}" in error


class TestPresets:
    def test_cells_fit_the_model(self):
        for preset in tables.presets().values():
            for cell in preset.cells:
                assert cell.fits(5) and cell.most_candidates() <= 256 and cell.model == ""
                assert cell.n == 1 or cell.strategy != "hybrid" or cell.needs_alpha
                assert cell.n == 1 or cell.min_distance in (0.0, tables.NEAR)

    def test_the_papers_figures_stay_with_their_cells(self):
        assert tables.presets()["lsrs-table6"].paper[Cell(m=32, first_scale=3)] == {
            "fid": 1.82,
            "inception_score": 301.9,
            "sfid": 7.51,
        }
        strategies = tables.presets()["var-scaling-table3b"].paper
        assert strategies[Cell(n=50, min_distance=0.0)]["fid"] == 2.25
        assert strategies[Cell(n=50, strategy="top", min_distance=0.0)]["fid"] == 2.46

    def test_near_is_one_pair_in_ten(self):
        """The distance that one row keeps representatives apart by was chosen so, on 40 images of another seed."""
        from varkern import generate

        model = run.load_demo()[0]
        search = Cell(n=50, strategy="top", min_distance=0.0).density()
        seen = []
        choose = search.choose
        search.choose = lambda candidates: (seen.append(candidates), choose(candidates))[1]
        generate(model, torch.arange(40) % 10, search=search, seeds=4_000_000, decode=False, **SAMPLING)
        codes = seen[0].codebook[seen[0].tokens].flatten(2).double()
        first, second = torch.triu_indices(50, 50, 1)
        pairs = torch.cdist(codes, codes)[:, first, second]
        assert 0.05 < (pairs < tables.NEAR).double().mean() < 0.2
        assert (pairs < 1.8).double().mean() > 0.98


def test_reconstructed():
    model = run.load_demo()[0]
    real = measuring.RealDigits(12, 7)
    again = torch.cat(list(tables.Reconstructed(real, model.vae_proxy[0]).batches(5)))
    assert again.shape == real.images.shape and again.dtype == torch.uint8
    difference = (again.float() - real.images.float()).abs().mean()
    assert 0 < difference < 20 < (again.flip(0).float() - real.images.float()).abs().mean()


class TestPage:
    """The committed figures and the page that shows them."""

    def test_the_page_shows_the_figures(self):
        assert page.fill(PAGE, page.read_tables(FIGURES)) == PAGE
        assert PAGE.count("<!-- table ") == PAGE.count("<!-- end -->") >= 8

    def test_every_preset_has_its_figures(self):
        for name, preset in tables.presets().items():
            path = FIGURES / f"{name}.json"
            found = json.loads(path.read_text())
            cells = [Cell(**cell["settings"]) for cell in found["cells"]]
            assert cells == preset.cells, name
            assert {len(cell["repeats"]) for cell in found["cells"]} == {3}
            assert found["settings"]["weights"] == measuring.fingerprint(run.WEIGHTS)
            assert (FIGURES / f"{name}.md").read_text() == report.page(report.from_file(path, preset))

    def test_an_unknown_table(self):
        with pytest.raises(ValueError, match="must be among few, got 'other'"):
            page.fill("<!-- table other -->\n<!-- end -->", {"few": "x"})


def test_alpha_is_the_median_of_what_it_is_compared_with():
    """Of the first 150 of the 500 images that it was taken from, so within 0.05."""
    report = json.loads((FIGURES / "var-scaling-table3b.json").read_text())
    cell = Cell(n=50, min_distance=0.0)
    (alpha,) = {r["alpha"] for c in report["cells"] if Cell(**c["settings"]) == cell for r in c["repeats"]}
    ratios = density_ratios(run.load_demo()[0], cell, {**SAMPLING, "top_k": 0}, images=150)
    assert abs(ratios.median().item() - alpha) < 0.05
