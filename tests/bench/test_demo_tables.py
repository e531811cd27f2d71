"""``varkern demo table``: every figure of the page can be made again, and is what the page shows."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.demo_tables import page
from bench.demo_tables import tables as table
from varkern import cli
from varkern.demo import digits, measuring, run
from varkern.demo.train import load_classifier
from varkern.ops.backend import use_backend
from varkern.runs import locked
from varkern.studies import calibration, sweep
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
    few = [table.own("few", "Few", cells), replace(PRESETS["lsrs-fig6"], rows=((Cell(), {}), (Cell(m=2), {})))]
    changes = {
        "presets": lambda: {preset.name: preset for preset in few},
        "BATCH_SIZE": 40,
        "TIMED_IMAGES": 10,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(table, name, value)
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        patch.setattr(page, "presets", table.presets)
        patch.setattr(calibration, "CALIBRATION_IMAGES", 40)
        yield


def prepared(folder):
    """A folder with trained scorers: copies of the shipped one, since here nothing depends on what they are."""
    (folder / "scorers").mkdir(parents=True)
    for name in table.scorers.Comparison().trainings():
        shutil.copy(run.WEIGHTS / "scorer.safetensors", folder / "scorers" / f"{name}.safetensors")
    report = json.loads((FIGURES / "scorers.json").read_text())
    report["settings"] = table.scorers.Comparison().settings(run.WEIGHTS)
    (folder / "scorers" / "scorers.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="class")
def finished(small, tmp_path_factory):
    """The folder of a finished ``varkern demo table``, the weights that it was made of, and a page that it filled."""
    root = tmp_path_factory.mktemp("table")
    prepared(root / "out")
    shutil.copytree(run.WEIGHTS, root / "weights")
    (root / "page.md").write_text("before\n<!-- table few -->\nold\n<!-- end -->\nafter\n")
    with use_backend("torch"):
        assert cli.main(arguments(root)) == 0
    return root


def arguments(root, **changed):
    options = {"out": root / "out", "weights": root / "weights", "page": root / "page.md", "images": 70, "seeds": 2}
    options |= changed
    return ["demo", "table", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


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

    def test_a_second_run_makes_nothing_again(self, finished, monkeypatch, capsys):
        before = {path: path.read_bytes() for path in (finished / "out").rglob("*") if path.suffix in (".json", ".md")}
        monkeypatch.setattr(sweep, "generate", lambda *given, **named: pytest.fail("an image was made"))
        assert cli.main(arguments(finished)) == 0
        assert {path: path.read_bytes() for path in before} == before
        assert "files of figures" in capsys.readouterr().out

    def test_times_are_those_taken_alone(self, finished):
        out, seed = finished / "out", table.REPORTED_SEED
        for cell in json.loads((out / "few.json").read_text())["cells"]:
            name = Path("results", Cell(**cell["settings"]).name, f"seed-{seed}.json")
            timed, measured = (json.loads((out / folder / name).read_text()) for folder in ("timing", "."))
            assert cell["repeats"][0]["seconds"] == timed["seconds"] != measured["seconds"]
            assert cell["repeats"][0]["fid"] == measured["fid"] and "fid" not in timed

    def test_scorers_are_trained_by_one_process(self, finished, tmp_path, monkeypatch, capsys):
        (tmp_path / "out").mkdir()
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert cli.main(arguments(finished, out=tmp_path / "out")) == 2
        assert "lacks scorers, which one process trains: varkern demo scorers --out" in capsys.readouterr().err

    def test_a_page_with_a_place_for_no_table(self, finished, tmp_path, monkeypatch, capsys):
        (tmp_path / "page.md").write_text("<!-- table fewer -->\n<!-- end -->\n")
        monkeypatch.setattr(table, "load_models", lambda *given: pytest.fail("work began"))
        assert cli.main(arguments(finished, page=tmp_path / "page.md")) == 2
        assert "a place for table 'fewer'" in capsys.readouterr().err

    def test_one_process_concludes(self, finished):
        """Another one that holds the conclusion is left to it."""
        held = finished / "out" / "progress" / "conclusion"
        assert held.exists()
        child = os.fork() if not torch.cuda.is_available() else None
        if child == 0:
            with locked(held, 0):
                (finished / "held").touch()
                time.sleep(60)
            os._exit(0)
        try:
            while child and not (finished / "held").exists():
                time.sleep(0.01)
            told = table.Demo(finished / "out", 70, 2, weights=finished / "weights").run()
            assert (told is None) == bool(child)
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def test_processes_share_the_cells(self, finished, tmp_path, monkeypatch, capsys):
        out = prepared(tmp_path / "out")
        shutil.copytree(finished / "out" / "alpha", out / "alpha")
        given = ["demo", "table", "--out", str(out), "--images", "60", "--seeds", "1"]
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert cli.main(given) == 0 and "other processes have still cells" in capsys.readouterr().out
        assert not (out / "few.md").exists() and len(list((out / "results").iterdir())) == 2
        monkeypatch.setenv("RANK", "0")
        assert cli.main(given) == 0 and (out / "few.md").exists()

    @pytest.mark.parametrize("name", ["vae", "var", "scorer", "classifier"])
    def test_figures_of_other_weights_are_refused(self, finished, name, tmp_path, monkeypatch, capsys):
        weights = shutil.copytree(finished / "weights", tmp_path / "weights")
        content = bytearray((weights / f"{name}.safetensors").read_bytes())
        content[-4] ^= 1
        (weights / f"{name}.safetensors").write_bytes(content)
        monkeypatch.setattr(sweep, "generate", lambda *given, **named: pytest.fail("an image was made"))
        assert cli.main(arguments(finished, weights=weights)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        # Scorers were trained on the VQ-VAE and VAR, and judged beside the shipped one; figures need the classifier.
        what = "weights" if name == "classifier" else name
        assert f"made with other settings ({what}" in error


class TestMeasuring:
    def test_features_are_the_classifiers(self):
        images = measuring.RealDigits(30, 4).images
        extracted = measuring.extractor(run.WEIGHTS, torch.device("cpu"))(images)
        classifier = load_classifier(run.WEIGHTS)
        as_floats = images.float() / 127.5 - 1
        assert torch.equal(extracted.features, classifier.features(as_floats))
        assert torch.equal(extracted.logits, classifier(as_floats))
        maps = classifier.body[:8](as_floats.mean(1, keepdim=True))
        assert maps.shape == (30, 64, 6, 6)
        # As the published suite flattens its own: rows, columns, channels.
        assert extracted.spatial.shape == (30, 252) and extracted.spatial[3, 7 * (6 * 2 + 5) + 4] == maps[3, 4, 2, 5]

    def test_other_sizes_are_refused(self):
        with pytest.raises(ValueError, match="digits of 24x24 pixels, got 30x24"):
            measuring.extractor(run.WEIGHTS, torch.device("cpu"))(torch.zeros(1, 3, 24, 30, dtype=torch.uint8))

    def test_real_digits(self):
        real = measuring.RealDigits(25, 7)
        images, labels = digits.real_batch(25, torch.Generator().manual_seed(7))
        assert torch.cat(list(real.batches(10))).equal(((images + 1) * 127.5).round().byte())
        assert real.labels.equal(labels) and len(real) == 25 and real.size == (24, 24)

    def test_reconstructed(self):
        model = run.load_demo()[0]
        real = measuring.RealDigits(12, 7)
        again = torch.cat(list(table.Reconstructed(real, model.vae_proxy[0]).batches(5)))
        assert again.shape == real.images.shape and again.dtype == torch.uint8
        difference = (again.float() - real.images.float()).abs().mean()
        assert 0 < difference < 20 < (again.flip(0).float() - real.images.float()).abs().mean()


class TestPresets:
    def test_cells_fit_the_model(self):
        for preset in table.presets().values():
            for cell in preset.cells:
                assert cell.fits(5) and cell.most_candidates() <= 256 and cell.model == ""
                assert cell.n == 1 or cell.strategy != "hybrid" or cell.wants_alpha
                assert cell.n == 1 or cell.min_distance in (0.0, table.NEAR)

    def test_the_papers_figures_stay_with_their_cells(self):
        assert table.presets()["lsrs-table6"].paper[Cell(m=32, first_scale=3)] == {
            "fid": 1.82,
            "inception_score": 301.9,
            "sfid": 7.51,
        }
        strategies = table.presets()["var-scaling-table3b"].paper
        assert strategies[Cell(n=50, min_distance=0.0)]["fid"] == 2.25
        assert strategies[Cell(n=50, strategy="top", min_distance=0.0)]["fid"] == 2.46

    def test_near_is_one_pair_in_ten(self):
        """The distance that one row keeps representatives apart by was chosen so, on 40 images of another seed."""
        from varkern import generate
        from varkern.demo.train import SAMPLING

        model = run.load_demo()[0]
        search = Cell(n=50, strategy="top", min_distance=0.0).density()
        seen = []
        choose = search.choose
        search.choose = lambda candidates: (seen.append(candidates), choose(candidates))[1]
        generate(model, torch.arange(40) % 10, search=search, seeds=4_000_000, decode=False, **SAMPLING)
        codes = seen[0].codebook[seen[0].tokens].flatten(2).double()
        first, second = torch.triu_indices(50, 50, 1)
        pairs = torch.cdist(codes, codes)[:, first, second]
        assert 0.05 < (pairs < table.NEAR).double().mean() < 0.2
        assert (pairs < 1.8).double().mean() > 0.98


class TestPage:
    """The committed figures and the page that shows them."""

    def test_the_page_shows_the_figures(self):
        assert page.fill(PAGE, page.read_tables(FIGURES)) == PAGE
        assert PAGE.count("<!-- table ") == PAGE.count("<!-- end -->") >= 8

    def test_every_preset_has_its_figures(self):
        for name, preset in table.presets().items():
            report = json.loads((FIGURES / f"{name}.json").read_text())
            cells = [table.Cell(**cell["settings"]) for cell in report["cells"]]
            assert cells == preset.cells, name
            assert {len(cell["repeats"]) for cell in report["cells"]} == {3}
            assert report["settings"]["weights"] == table.fingerprint(run.WEIGHTS)
            assert (FIGURES / f"{name}.md").exists()

    def test_an_unknown_table(self):
        with pytest.raises(ValueError, match="a place for table 'other', known are few"):
            page.fill("<!-- table other -->\n<!-- end -->", {"few": "x"})


def test_alpha_is_the_median_of_what_it_is_compared_with():
    """Of the first 150 of the 500 images that it was taken from, so within 0.05."""
    report = json.loads((FIGURES / "var-scaling-table3b.json").read_text())
    cell = Cell(n=50, min_distance=0.0)
    (alpha,) = {r["alpha"] for c in report["cells"] if table.Cell(**c["settings"]) == cell for r in c["repeats"]}
    ratios = density_ratios(run.load_demo()[0], cell, {**table.SAMPLING, "top_k": 0}, images=150)
    assert abs(ratios.median().item() - alpha) < 0.05
