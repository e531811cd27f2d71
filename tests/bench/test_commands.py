"""The command that a report shows: it makes the same figures again, and names no folder of this machine."""

import argparse
from pathlib import Path

import pytest

from bench.commands import describe_command


@pytest.mark.parametrize(
    "given, wanted",
    [
        ([], ""),
        (["--images", "2000", "--steps", "5"], ""),
        (["--images", "70"], " --images 70"),
        (["--images", "70", "--steps", "5", "9", "--epochs", "0.5"], " --steps 5 9 --images 70 --epochs 0.5"),
        (["--weights", "/home/me/weights", "--jobs", "7"], " --weights WEIGHTS"),
    ],
    ids=str,
)
def test_only_what_differs(given, wanted):
    parser = argparse.ArgumentParser("bench.example")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[5])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(given)
    found = describe_command(parser, options, ("steps", "images", "epochs", "weights"))
    assert found == "python -m bench.example --out DIR" + wanted
