"""The one command for a GPU machine keeps to its time and leaves what was done, rehearsed on the CPU."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from bench.report import render

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def run(*arguments, **environment):
    dropped = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_WORKER")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept |= {"PYTHON": sys.executable, "VARKERN_BENCH_TINY": "1", **environment}
    return subprocess.run([SCRIPT, *map(str, arguments)], env=kept, capture_output=True, text=True)


PYTHON = """#!/bin/sh
case "$*" in
    -c*) exit 0 ;; # xdist is there
    -) echo torch 2.14; echo device cpu ;;
    *bench.report*) exit 3 ;;
    "-m pytest -q -p no:cacheprovider -p bench.blame tests/bench/test_compare.py") echo "9 passed" ;;
    *) exec sleep 60 ;;
esac
"""


def test_a_stage_beyond_its_share_is_stopped_and_the_others_run(tmp_path):
    """One second for a stage that takes a minute, and one that fails: both are told, and the summary is written."""
    python, tmp_path = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = run(tmp_path, "generation", "report", "tests", VARKERN_BENCH_SECONDS="1", PYTHON=str(python))
    assert done.returncode == 1
    generation, report, tests, whole = (tmp_path / "stages.txt").read_text().splitlines()
    assert tests.startswith("tests ") and tests.endswith("done") and done.stdout.endswith("\n== tests\n9 passed\n")
    assert generation.startswith("generation ") and generation.endswith("stopped")
    assert report.startswith("report ") and report.endswith("failed") and whole.startswith("all ")
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("torch ") and generation in summary and done.stdout == summary
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"./stages.txt", "./summary.txt"} <= set(archive.getnames())


def test_generations_patched_and_unpatched(tmp_path):
    """A stage with the whole time for itself comes to its end, and leaves the figures that the report reads.

    The exit code says so. The stage is the benchmark of whole generations, at tiny size.
    """
    done = run(tmp_path, "generation")
    assert done.returncode == 0, done.stdout + done.stderr
    stage, _ = (tmp_path / "stages.txt").read_text().splitlines()
    assert stage.split()[0] == "generation" and stage.split()[4] == "530" and stage.endswith("done")
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith(f"torch {torch.__version__} ") and "\ndevice " in summary and " passed" in summary
    rows = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [row["M"] for row in rows] == [1, 4]
    assert {"published", "patched"} <= set(rows[0]["seconds"])
    assert "## Parts" in render(tmp_path)
    (blocks,) = json.loads((tmp_path / "blocks.json").read_text())
    assert blocks["M"] == [1, 8 + 4 * 8, 8 + 4 * 8] and set(blocks["seconds"]) >= {"best of M", "blocks"}


def test_without_a_gpu_it_only_rehearses(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = run(tmp_path / "out", PYTHON=str(python), VARKERN_BENCH_TINY="0")
    assert done.returncode == 2 and "no GPU found" in done.stderr and not (tmp_path / "out").exists()


def test_an_unknown_stage(tmp_path):
    done = run(tmp_path, "generation", "coffee")
    assert done.returncode == 2 and "stage must be one of compile generation" in done.stderr
    assert not list(tmp_path.iterdir())
