"""What the commands print and return, and the command that a report shows: it names no folder of this machine."""

import argparse
from pathlib import Path

import pytest

from bench.commands import command, describe_command


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


def test_a_command_prints_what_its_function_returns(capsys):
    @command("example")
    def main(arguments=None):
        return f"figures of {arguments}"

    assert main(["--images", "7"]) == 0
    assert capsys.readouterr() == ("figures of ['--images', '7']\n", "")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError])
def test_wrong_input_is_one_line(kind, capsys):
    @command("example")
    def main(arguments=None):
        raise kind("images must be >= 2, got 1")

    assert main() == 2
    assert capsys.readouterr() == ("", "example: images must be >= 2, got 1\n")


def test_a_fault_of_ours_keeps_its_traceback():
    @command("example")
    def main(arguments=None):
        raise KeyError("fid")

    with pytest.raises(KeyError, match="fid"):
        main()
