"""The one command for a GPU machine keeps to its time and leaves what was done, rehearsed on the CPU."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def run(*arguments, **environment):
    dropped = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER_COUNT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept |= {"PYTHON": sys.executable, "VARKERN_BENCH_TINY": "1", **environment}
    return subprocess.run([SCRIPT, *map(str, arguments)], env=kept, capture_output=True, text=True)


PYTHON = """#!/bin/sh
case "$*" in
    -c*) echo cpu ;;
    -) echo torch 2.14 ;;
    *bench.report*) exit 3 ;;
    *) exec sleep 60 ;;
esac
"""


def test_a_stage_beyond_its_share_is_stopped_and_the_others_run(tmp_path):
    """One second for a stage that takes a minute and one that fails: both are told, and the summary is written."""
    python, tmp_path = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = run(tmp_path, "generation", "report", VARKERN_BENCH_SECONDS="1", PYTHON=str(python))
    assert done.returncode == 1
    generation, report, whole = (tmp_path / "stages.txt").read_text().splitlines()
    assert generation.startswith("generation ") and generation.endswith("stopped")
    assert report.startswith("report ") and report.endswith("failed") and whole.startswith("all ")
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("torch ") and generation in summary and done.stdout == summary
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"./stages.txt", "./summary.txt"} <= set(archive.getnames())


def test_a_stage_alone(tmp_path):
    """With the whole time for itself it comes to its end; the exit code says so."""
    done = run(tmp_path, "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    stage, _ = (tmp_path / "stages.txt").read_text().splitlines()
    assert stage.split()[0] == "tests" and stage.split()[4] == "530" and stage.endswith("done")
    assert " passed" in (tmp_path / "summary.txt").read_text().splitlines()[-1]


def test_an_unknown_stage(tmp_path):
    done = run(tmp_path, "generation", "coffee")
    assert done.returncode == 2 and "stage must be one of compile generation" in done.stderr
    assert not list(tmp_path.iterdir())
