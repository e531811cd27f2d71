"""Regressions are told from noise, and files of unlike machines compare by the calibration they hold."""

import json

import pytest

from bench.compare import main


def write(path, **timings):
    """A file as pytest-benchmark writes it: name -> median, or (q1, median, q3)."""
    rows = []
    for name, timing in timings.items():
        q1, median, q3 = timing if isinstance(timing, tuple) else (timing * 0.99, timing, timing * 1.01)
        rows.append({"fullname": f"bench/test_x.py::test_{name}", "stats": {"q1": q1, "median": median, "q3": q3}})
    path.write_text(json.dumps({"benchmarks": rows}))
    return str(path)


@pytest.mark.parametrize(
    "new, code, word",
    [
        pytest.param(1.05, 0, "same", id="within the threshold"),
        pytest.param(1.30, 1, "slower", id="slower"),
        pytest.param((0.9, 1.30, 1.5), 0, "same", id="slower but noisy"),
        pytest.param(0.5, 0, "faster", id="faster"),
    ],
)
def test_verdicts(tmp_path, capsys, new, code, word):
    base, other = write(tmp_path / "base.json", a=1.0, b=2.0), write(tmp_path / "new.json", a=new, b=2.0)
    assert main([base, other]) == code
    lines = capsys.readouterr().out.splitlines()
    assert word in next(line for line in lines if line.endswith("test_a"))
    assert "same" in next(line for line in lines if line.endswith("test_b"))


def test_a_slower_machine_is_no_regression(tmp_path, capsys):
    base = write(tmp_path / "base.json", a=1.0, b=1.0, calibration=0.1)
    new = write(tmp_path / "new.json", a=3.0, b=6.0, calibration=0.3)
    assert main([base, new]) == 1  # b took twice as many calibrations, a as many as before
    out = capsys.readouterr().out
    assert "1 of 2 grew" in out and "calibrations" in out


def test_the_threshold_is_an_option(tmp_path):
    base, new = write(tmp_path / "base.json", a=1.0), write(tmp_path / "new.json", a=1.3)
    assert main([base, new, "--threshold", "0.5"]) == 0


def test_what_came_and_went_is_said(tmp_path, capsys):
    base, new = write(tmp_path / "base.json", a=1.0, b=1.0), write(tmp_path / "new.json", a=1.0, c=1.0)
    assert main([base, new]) == 0
    out = capsys.readouterr().out
    assert "gone: bench/test_x.py::test_b\n" in out and "new: bench/test_x.py::test_c" in out


def test_bad_files(tmp_path, capsys):
    good = write(tmp_path / "good.json", a=1.0)
    (tmp_path / "bad.json").write_text("{}")
    assert main([good, str(tmp_path / "bad.json")]) == 2
    assert "must be a file of pytest --benchmark-json" in capsys.readouterr().err
    assert main([good, str(tmp_path / "none.json")]) == 2
    assert main([good, write(tmp_path / "other.json", z=1.0)]) == 2
    assert main([good, write(tmp_path / "other.json", a=1.0, calibration=1.0)]) == 2
    assert "must have a figure in common" in capsys.readouterr().err


def write_generation(path, published, patched, m=4):
    rows = [{"depth": 16, "B": 1, "M": m, "seconds": {"published": published, "patched": patched}, "peak": {}}]
    path.write_text(json.dumps({"device": "x", "rows": rows}))
    return str(path)


def test_whole_generations_compare_by_the_loop_beside_them(tmp_path, capsys):
    base = write_generation(tmp_path / "base.json", [1.0, 1.0, 1.1], [0.5, 0.5, 0.51])
    slower_machine = write_generation(tmp_path / "same.json", [2.0, 2.0, 2.1], [1.0, 1.02, 1.0])
    assert main([base, slower_machine]) == 0
    regressed = write_generation(tmp_path / "new.json", [1.0, 1.0, 1.1], [0.6, 0.61, 0.62])
    assert main([base, regressed]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("1.220" in line and "slower" in line and "d16 B=1 M=4 patched" in line for line in lines)
    noisy = write_generation(tmp_path / "noisy.json", [1.0, 1.0, 1.1], [0.4, 0.6, 0.62])
    assert main([base, noisy]) == 0
    once = write_generation(tmp_path / "once.json", [1.0], [0.5])
    assert main([base, once]) == 0
    assert main([base, write_generation(tmp_path / "other.json", [1.0], [0.5], m=16)]) == 2
