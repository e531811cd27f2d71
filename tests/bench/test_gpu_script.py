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


def test_a_stage_beyond_its_share_is_stopped_and_the_others_run(tmp_path):
    """One second for two stages that take several: both are stopped or fail, and the summary is written."""
    done = run(tmp_path, "generation", "report", VARKERN_BENCH_SECONDS="1")
    assert done.returncode == 1
    generation, report, whole = (tmp_path / "stages.txt").read_text().splitlines()
    assert generation.startswith("generation ") and generation.endswith("stopped")
    assert report.startswith("report ") and report.endswith(("stopped", "failed")) and whole.startswith("all ")
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
