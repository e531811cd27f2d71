"""The table of compiled kernels: recorded launches are what Triton specialises, and growth of a count is flagged."""

import ast
import json
import re
from pathlib import Path

import pytest

from bench import compare

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench/results").glob("compiled-triton-*.json"))


def content(instructions: float, spills: int = 0) -> dict:
    executed = {"kernel": "a_kernel", "case": "V=2", "unit": "row", "instructions": instructions, "barriers": 1}
    compiled = {"kernel": "a_kernel", "case": "V=2", "target": "cuda:90", "registers": 32, "spills": spills}
    return {"triton": "0", "executed": [executed], "compiled": [compiled]}


@pytest.mark.parametrize("now, spills, code", [(102, 0, 0), (104, 0, 1), (90, 0, 0), (100, 8, 1)])
def test_growth_beyond_three_percent_is_flagged(now, spills, code, tmp_path, capsys):
    for name, given in (("base", content(100)), ("new", content(now, spills))):
        (tmp_path / name).write_text(json.dumps(given))
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "new")]) == code
    assert ("a_kernel V=2" in capsys.readouterr().out) == bool(code)


def kernels_in_the_source() -> set[str]:
    trees = [ast.parse(file.read_text()) for file in (ROOT / "kernels").glob("*.py")]
    found = {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    return {name for name in found if name.endswith("_kernel")}


@pytest.mark.skipif(not RESULTS, reason="no results are committed")
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_kernel_is_in_the_committed_table(path):
    """A kernel that no scenario of ``bench/launches.py`` launches, or that was added since, is missing."""
    rows = json.loads(path.read_text())
    assert kernels_in_the_source() - {row["kernel"] for row in rows["compiled"]} == set()
    assert {row["target"] for row in rows["compiled"]} >= {"cuda:80", "cuda:90"}
    assert all(re.fullmatch(r".*\([0-9a-f]{6}\)", row["case"]) for row in rows["compiled"])
