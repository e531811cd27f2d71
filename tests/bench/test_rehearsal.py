"""The benchmark of whole generations runs to its end at tiny size and leaves the figures that the report reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.report import render

ROOT = Path(__file__).parents[2]


def test_generations_patched_and_unpatched(tmp_path):
    environment = {**os.environ, "VARKERN_BENCH_TINY": "1", "VARKERN_BENCH_OUT": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "bench/test_generation.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [row["M"] for row in rows] == [1, 4]
    assert {"published", "patched"} <= set(rows[0]["seconds"])
    assert "## Parts" in render(tmp_path)
    (blocks,) = json.loads((tmp_path / "blocks.json").read_text())
    assert blocks["M"] == [1, 8 + 4 * 8, 8 + 4 * 8] and set(blocks["seconds"]) >= {"best of M", "blocks"}
