"""``python -m bench.gap``: what it measures, its percentages by hand, and its table."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from bench import gap
from bench.demo_tables.tables import Reconstructed
from varkern.demo import measuring
from varkern.demo.run import WEIGHTS, load_demo
from varkern.metrics.evaluate import compare, measure
from varkern.ops.backend import use_backend
from varkern.studies import sweep
from varkern.studies.cells import Cell
from varkern.studies.sweep import Entry

FIGURES = Path(__file__).parent.parent.parent / "bench" / "results" / "demo"
FEW = {"blocks": Cell(m=2, proposals=1, pick="resample")}


@pytest.fixture(scope="class")
def few():
    with pytest.MonkeyPatch.context() as patch, use_backend("torch"):
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        patch.setattr(gap, "SEARCHES", FEW)
        patch.setattr(gap, "ROWS", [("", "blocks"), ("sum", "blocks")])
        yield


@pytest.fixture(scope="class")
def finished(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gap") / "out"
    assert command(folder) == 0
    return folder


def command(folder, **changed):
    options = {"out": folder, "images": 100, "seeds": 1, **changed}
    return gap.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


class TestRun:
    def test_figures(self, finished):
        """Every row has the figures of its cell; the sum of both scorers finds other images than the first alone."""
        report = json.loads((finished / "gap.json").read_text())
        assert report["command"] == "python -m bench.gap --out DIR --images 100 --seeds 1"
        assert [(row["scorer"], row["search"]) for row in report["rows"]] == [(s, n) for s in ("", "sum") for n in FEW]
        for row in [{"scorer": "", "search": "alone", **report["alone"]}, *report["rows"]]:
            cell = replace(FEW.get(row["search"], Cell()), scorer=row["scorer"])
            folder = finished / "results" / cell.name
            for name in ("fid", "precision", "recall"):
                assert row[name] == [json.loads((folder / "seed-5000000.json").read_text())[name]]
        assert report["rows"][0]["fid"] != report["rows"][1]["fid"]
        digits = Reconstructed(measuring.RealDigits(100, 5_001_000), load_demo()[0].vae_proxy[0])
        features = measuring.extractor(WEIGHTS, torch.device("cpu"))
        reference = measuring.measure_digits(features, 5_000_000, 100)
        floor = compare(measure(digits, features, 100, 100), reference, features.name)
        assert report["floor"]["fid"] == [pytest.approx(floor.fid, rel=1e-6)]
        assert (finished / "gap.md").read_text() == gap.markdown(report)

    def test_a_second_run_makes_nothing_again(self, finished, monkeypatch):
        before = (finished / "gap.json").read_bytes()
        monkeypatch.setattr(sweep, "generate", lambda *given, **named: pytest.fail("an image was made"))
        assert command(finished) == 0 and (finished / "gap.json").read_bytes() == before

    def test_one_of_several_processes_writes_no_table(self, few, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", "2")
        assert command(tmp_path / "out") == 0
        assert "Call again without torchrun" in capsys.readouterr().out
        assert len(list((tmp_path / "out" / "results").iterdir())) == 1
        assert not (tmp_path / "out" / "gap.json").exists()

    def test_nor_does_it_when_all_figures_are_there(self, finished, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setattr(gap, "write_json", lambda *given: pytest.fail("it wrote figures"))
        assert command(finished) == 0 and "Call again without torchrun" in capsys.readouterr().out

    def test_other_settings_are_refused(self, finished, capsys):
        before = (finished / "gap.json").read_bytes()
        assert command(finished, images=120) == 2
        assert "images was 100, now 120" in capsys.readouterr().err
        assert (finished / "gap.json").read_bytes() == before


@pytest.mark.parametrize("options", [{"seeds": 0}, {"images": 64}, {"device": "tpu"}], ids=str)
def test_bad_options(tmp_path, capsys, options):
    assert command(tmp_path / "out", **options) == 2
    (name,) = options
    assert f"{name} must be " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_percentages_by_hand(monkeypatch):
    """Within a seed for the model alone, against the mean of all seeds for the floor."""

    def entry(cell, *distances):
        return Entry(cell, [{"fid": d, "precision": 0.5, "recall": 0.25} for d in distances])

    monkeypatch.setattr(gap, "ROWS", [("", "64 whole maps"), ("sum", "blocks, 50 maps")])
    whole, blocks = gap.SEARCHES["64 whole maps"], Cell(m=8, proposals=8, pick="resample", scorer="sum")
    floor = [{"fid": d, "precision": 0.75, "recall": 1.0} for d in (9.0, 11.0)]
    found = gap.collect([entry(Cell(), 30.0, 20.0), entry(whole, 15.0, 15.0), entry(blocks, 10.0, 12.0)], floor)
    assert [(r["scorer"], r["search"], r["closed"]) for r in found["rows"]] == [
        ("", "64 whole maps", [75.0, 50.0]),
        ("sum", "blocks, 50 maps", [100.0, 80.0]),
    ]
    text = gap.markdown({"command": "the command", "images": 5000, "seed": 7, "seeds": 2, **found})
    assert text.startswith("`the command`: 5,000 images per search and seed, 2 seeds from 7, mean ± half the range")
    assert "| the model alone |  | 25.00 ± 5.00 | 0.500 ± 0.000 | 0.250 ± 0.000 |  |" in text
    assert "| reconstructed real digits |  | 10.00 ± 1.00 | 0.750 ± 0.000 | 1.000 ± 0.000 |  |" in text
    assert "| 64 whole maps | the first scorer | 15.00 ± 0.00 | 0.500 ± 0.000 | 0.250 ± 0.000 | 62 ± 12 |" in text
    assert "| blocks, 50 maps | the sum of both | 11.00 ± 1.00 |" in text and "| 90 ± 10 |" in text


def test_names_tell_the_scored_maps():
    """The mean count per searched scale of the demo model, as the table of blocks has it."""
    cells = json.loads((FIGURES / "blocks.json").read_text())["cells"]
    counts = {Cell(**cell["settings"]): cell["repeats"][0]["scored"] for cell in cells}
    for title, cell in gap.SEARCHES.items():
        assert f"{counts[cell]:.0f}" in title.split()


def test_the_committed_figures():
    """The stored figures are of 5,000 images and three seeds; the demo's page shows their percentages and distances."""
    report = json.loads((FIGURES / "gap.json").read_text())
    assert (FIGURES / "gap.md").read_text() == gap.markdown(report)
    assert (report["command"], report["images"], report["seeds"]) == ("python -m bench.gap --out DIR", 5000, 3)
    assert max(report["floor"]["fid"]) < min(min(row["fid"]) for row in report["rows"])
    assert [(row["scorer"], row["search"]) for row in report["rows"]] == gap.ROWS
    page = (WEIGHTS.parent / "README.md").read_text()
    closed = {(row["scorer"], row["search"]): gap.show(row["closed"], 0) for row in report["rows"]}
    assert f"| of the gap closed, in % | {' | '.join(gap.SEARCHES)} |" in page
    for scorer, title in gap.SCORERS.items():
        cells = (closed.get((scorer, search), "") for search in gap.SEARCHES)
        assert f"| {title} | {' | '.join(cells)} |" in page
    for row in ("alone", "floor"):
        assert f"{fmean(report[row]['fid']):.1f}" in page.split("bench.gap")[1].split(";")[0]
    for row in report["rows"]:
        assert len(row["fid"]) == len(row["closed"]) == 3
