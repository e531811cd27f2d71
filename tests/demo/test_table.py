"""``varkern demo table``: it goes on where it stopped, and never mixes the figures of different weights."""

import json
import shutil

import pytest

from varkern import cli
from varkern.demo import run, table

CELLS = [table.Cell(1, 1, "best"), table.Cell(1, 2, "resample"), table.Cell(0, 2, "best")]
FIGURES = ("frechet", "inception", "accuracy")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three cells against few real digits."""
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
    change("scorer")
    assert cli.main([*arguments, "--weights", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was made with other settings" in error
    assert cli.main([*arguments, "--weights", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error
