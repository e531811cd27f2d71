"""``varkern demo table``: it goes on where it stopped, and never mixes the figures of different weights."""

import json
import shutil
from pathlib import Path

import pytest

from varkern import BestOfM, Combined, DensitySearch, cli
from varkern.demo import run, table

CELLS = [table.Cell(1, 2, "resample"), table.Cell(0, 2, "best"), table.DensityCell("hybrid", 20, 0.65, then_m=2)]
FIGURES = ("frechet", "inception", "accuracy")
ROOT = Path(__file__).parent.parent.parent
REPORT = json.loads((ROOT / "bench" / "results" / "demo" / "table.json").read_text())
ALL_CELLS = list(table.cells())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three cells, one of each kind and two searches in one, against few real digits."""
    monkeypatch.setattr(table, "cells", lambda: iter(CELLS))
    monkeypatch.setattr(table, "REFERENCE_IMAGES", 200)


@pytest.fixture
def other_weights(tmp_path):
    """A copy of the shipped weights, one byte of the last tensor of one model changed by each call."""
    folder = shutil.copytree(run.WEIGHTS, tmp_path / "weights")

    def change(name):
        content = bytearray((folder / f"{name}.safetensors").read_bytes())
        content[-4] ^= 1
        (folder / f"{name}.safetensors").write_bytes(content)
        return folder

    return folder, change


def figures(out):
    report = json.loads((out / "table.json").read_text())
    return {name: [{k: r[k] for k in FIGURES} for r in cell["repeats"]] for name, cell in report["cells"].items()}


def test_a_killed_table_goes_on(tmp_path, monkeypatch):
    table.run(tmp_path / "unbroken", images=20, repeats=2)
    measured, measure = [], table.measure

    def counted(*given):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(given)
        return measure(*given)

    monkeypatch.setattr(table, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        table.run(tmp_path / "killed", images=20, repeats=2)
    measured.clear()
    text = table.run(tmp_path / "killed", images=20, repeats=2)
    assert len(measured) == 2
    assert figures(tmp_path / "killed") == figures(tmp_path / "unbroken")
    assert [len(repeats) for repeats in figures(tmp_path / "killed").values()] == [2, 2, 2]
    assert text == (tmp_path / "unbroken" / "table.md").read_text()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["table.json", "table.md"]


@pytest.mark.parametrize("name", ["vae", "var", "scorer", "classifier"])
def test_figures_of_other_weights_are_refused(name, other_weights, tmp_path, monkeypatch):
    out, (folder, change) = tmp_path / "out", other_weights
    assert table.fingerprint(folder) == table.fingerprint(run.WEIGHTS)
    settings = {"images": 20, "repeats": 1, "seed": table.REPORTED_SEED, "weights": table.fingerprint(folder)}
    out.mkdir()
    (out / "table.json").write_text(before := json.dumps({"settings": settings, "cells": {}}))
    change(name)
    monkeypatch.setattr(table, "load_models", lambda *given: pytest.fail("work began"))
    with pytest.raises(ValueError, match=r"table\.json was made with other settings"):
        table.run(out, images=20, repeats=1, weights=folder)
    assert (out / "table.json").read_text() == before


def test_command(other_weights, tmp_path, capsys):
    folder, change = other_weights
    arguments = ["demo", "table", "--out", str(tmp_path / "out"), "--images", "20", "--seeds", "1"]
    assert cli.main([*arguments, "--weights", str(folder)]) == 0
    assert cli.main(arguments) == 0  # the same weights, shipped
    captured = capsys.readouterr().out
    assert "| 0 | 2 | greedy |" in captured and "| 1 | 2 | resample |" in captured
    assert "| hybrid, min_distance=0.65, then best of M=2 | 20 | 0." in captured
    change("scorer")
    assert cli.main([*arguments, "--weights", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was made with other settings" in error
    assert cli.main([*arguments, "--weights", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error


def test_searches():
    """Every cell is a search of its own, with the settings of its name."""
    assert len({cell.name for cell in ALL_CELLS}) == len(ALL_CELLS)
    models = table.Models(None, len, None, None)  # any callable is a scorer
    assert table.Cell(1, 1, "best").search(models) is None
    best = table.Cell(2, 16, "resample").search(models)
    assert isinstance(best, BestOfM) and (best.m, best.first_scale, best.pick) == (16, 2, "resample")
    density = table.DensityCell("top", 100, threshold="paper").search(models)
    assert isinstance(density, DensitySearch) and density.alpha == table.ALPHA[100]
    assert (density.n, density.strategy, density.threshold, density.min_distance) == (100, "top", "paper", 0)
    both = table.DensityCell("hybrid", 50, then_m=4).search(models)
    assert isinstance(both, Combined) and [both.num_candidates(k, 5) for k in range(5)] == [1, 50, 4, 4, 4]


def test_alpha_is_the_median_of_what_it_is_compared_with():
    """Of the first 150 of the 2,000 images that it was taken from, so within 0.03."""
    ratios = table.density_ratios(table.load_models(table.WEIGHTS, "cpu"), 50, 150, 4_000_000)
    assert abs(ratios.median().item() - table.ALPHA[50]) < 0.03
    assert 0.3 < (ratios >= table.DensityCell("hybrid", 50).density().alpha).double().mean() < 0.7


def test_the_published_figures_are_of_these_cells_and_weights():
    assert list(REPORT["cells"]) == [cell.name for cell in ALL_CELLS]
    assert {len(entry["repeats"]) for entry in REPORT["cells"].values()} == {REPORT["settings"]["repeats"]}
    assert REPORT["settings"]["weights"] == table.fingerprint(table.WEIGHTS)


def test_the_page_shows_the_published_figures():
    page = (ROOT / "varkern" / "demo" / "README.md").read_text().splitlines()
    missing = [line for line in table.markdown(REPORT).splitlines() if line not in page]
    assert not missing
