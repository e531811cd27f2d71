"""The report says what its figures say: ratios of medians, bars met and missed, parts beyond twice their floor."""

import json

import pytest

from bench.report import render


@pytest.fixture
def folder(tmp_path):
    def row(m, published, patched, graph, peak):
        seconds = {"published": [published], "patched": [patched], "graph": [graph]}
        peaks = dict.fromkeys(seconds, peak)
        return {"depth": 16, "B": 24, "M": m, "seconds": seconds, "peak": peaks}

    rows = [row(1, 0.1, 0.1, 0.09, 2**30), row(4, 0.1, 0.1, 0.099, 2**30), row(128, 0.1, 0.2, 0.12, 2**31)]
    generation = {"device": "NVIDIA H200", "torch": "2.11.0", "rows": rows}
    (tmp_path / "generation.json").write_text(json.dumps(generation))
    parts = {"blocks": 0.0154, "head": 0.01, "sampler": 0.0001, "winner": 0.0001, "decoder": 0.0097}
    (tmp_path / "parts.json").write_text(json.dumps({"d16 B=24 M=1": parts}))
    return tmp_path


def test_report(folder):
    text = render(folder)
    assert "| 16 | 24 | 4 | 100.0 (100.0-100.0) | 100.0 (100.0-100.0) | 99.0 (99.0-99.0) | 0.990 |" in text
    assert "| 1.00 met |" in text and "| 1.15 **missed** |" in text
    assert "M=128 takes 2.000 times the peak memory of M=1 (**missed**)" in text
    cells = next(line for line in text.splitlines() if line.startswith("| d16 B=24 M=1")).split("|")
    blocks, head = cells[2].split(), cells[3].split()
    assert blocks[0] == "15.40" and blocks[3] == "x1.0"
    assert head[0] == "10.00" and head[3].startswith("**x")
    for name in ("overhead.png", "memory.png", "parts.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in text
