"""The report says what its figures say: ratios of medians, bars met and missed, parts beyond twice their floor."""

import json

import pytest

from bench.report import main, render


def row(depth, batch, m, published, patched, graph=None, peak=2**30, graph_peak=None):
    seconds = {"published": [published], "patched": [patched]} | ({} if graph is None else {"graph": [graph]})
    return {
        "depth": depth,
        "B": batch,
        "M": m,
        "seconds": seconds,
        "peak": dict.fromkeys(seconds, peak) | ({"graph": graph_peak or peak} if graph else {}),
    }


def write(folder, rows, parts, device="NVIDIA H200", **more):
    generation = {"device": device, "torch": "2.11.0", "triton": "3.6.0", "rows": rows, **more}
    (folder / "generation.json").write_text(json.dumps(generation))
    (folder / "parts.json").write_text(json.dumps(parts))
    return folder


@pytest.fixture
def folder(tmp_path):
    rows = [
        row(16, 24, 1, 0.1, 0.1, 0.09),
        row(16, 24, 4, 0.1, 0.1, 0.099),
        row(16, 24, 128, 0.1, 0.2, 0.12, peak=2**31, graph_peak=2**30 + 2**24),
        row(16, 1, 4, 0.1, 0.06, 0.04),
    ]
    floors = {"blocks": 0.015394, "head": 0.00028817, "sampler": 0.00011152, "winner": 5.5e-6, "decoder": 0.0096952}
    parts = {
        "d16 B=24 M=1": {**floors, "head": 0.01, "winner": 0.0001},
        "d16 B=24 M=128": {**floors, "scorer": 0.0036, "F": 0.01},
        "d16 B=1 M=4": {"blocks": 0.03, "head": 0.001, "decoder": 0.0005},
    }
    return write(tmp_path, rows, parts)


def test_report(folder):
    text = render(folder)
    assert "torch 2.11.0, triton 3.6.0. Median" in text and "stopped" not in text
    assert "| 16 | 24 | 4 | 100.0 (100.0-100.0) | 100.0 (100.0-100.0) | 99.0 (99.0-99.0) | 0.990 |" in text
    assert "| 1.00 met |" in text and "| 1.10 **missed** |" in text and "| 0.50 met |" in text
    assert "Bars of time: 2 met, 1 missed, 5 not measured, of 8." in text
    assert "\nMissed: d16 B=24 M=128.\nNot measured: d20 B=24 M=4," in text
    assert "B=24, patched: M=128 takes 2.000 times the peak memory of M=1 (**missed**)" in text
    assert "B=24, graph: M=128 takes 1.016 times the peak memory of M=1 (met)" in text
    cells = next(line for line in text.splitlines() if line.startswith("| d16 B=24 M=1 ")).split("|")
    blocks, head = cells[2].split(), cells[3].split()
    assert blocks[0] == "15.39" and blocks[3] == "x1.0"
    assert head[0] == "10.00" and head[3:] == ["**x34.7,", "operations**"]
    one = next(line for line in text.splitlines() if line.startswith("| d16 B=1 M=4 ") and "30.00" in line)
    assert "bytes**" in one.split("|")[2]  # for one image, the blocks read their weights
    for name in ("overhead.png", "memory.png", "parts.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in text


def test_predicted_beside_measured(folder):
    """Floors of 25.49 and 25.57 ms at M=1 and 4 (``python -m bench.roofline``); 90 and 99 ms as replayed."""
    lines = render(folder).splitlines()
    start = lines.index("The sum of all floors and the measured time:") + 4
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[start : start + 4]
    }
    assert cells["d16 B=24 M=1"] == ["25.49", "90.00", "3.53", "1.000", "1.000"]
    assert cells["d16 B=24 M=4"] == ["25.57", "99.00", "3.87", "1.003", "1.100"]
    assert cells["d16 B=1 M=4"][3:] == ["", ""]  # there is no M=1 beside it


def test_what_a_cut_off_run_left(tmp_path):
    """One cell, no parts yet, and M=1 missing."""
    text = render(write(tmp_path, [row(30, 8, 4, 1.0, 0.9)], {}, finished=False))
    assert "**The run was stopped: cells are missing.**" in text and "0.900" in text and "parts.png" not in text
    assert "0 met, 0 missed, 8 not measured" in text


def test_a_cpu_has_its_own_bar_and_no_floors(tmp_path):
    rows = [row(8, 2, 4, 1.0, 1.04, peak=None), row(8, 2, 1, 1.0, 1.0, peak=None)]
    text = render(write(tmp_path, rows, {"d8 B=2 M=4": {"blocks": 1.0}}, device="cpu"))
    assert "| 1.05 met |" in text and "Bars of time: 1 met, 0 missed, 0 not measured, of 1." in text
    assert "| 1000.00 |" in text and "Predicted" not in text and "memory.png" not in text


def test_nothing_to_report(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "must have a generation.json with figures" in capsys.readouterr().err


def test_blocks_beside_best_of_m(folder):
    assert "Blocks beside" not in render(folder)
    seconds = {"best of M": [0.1, 0.2, 0.3], "blocks": [0.23, 0.24, 0.25]}
    rows = [{"depth": 16, "B": b, "M": [1, 40, 784], "seconds": seconds} for b in (1, 24)]
    (folder / "blocks.json").write_text(json.dumps(rows))
    text = render(folder)
    assert "| depth | B | scored maps per image | best of M ms | blocks ms | blocks / best of M |" in text
    assert "| 16 | 24 | 825 | 200.0 (100.0-300.0) | 240.0 (230.0-250.0) | 1.200 |" in text
    for row in rows:
        row["seconds"] = {**seconds, "best of M, graph": [0.1], "blocks, graph": [0.15]}
    (folder / "blocks.json").write_text(json.dumps(rows))
    assert "| 1.200 | 100.0 (100.0-100.0) | 150.0 (150.0-150.0) | 1.500 |" in render(folder)
