"""What the commands that measure the demo have in common."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def command(name: str) -> Callable[[Callable[..., str]], Callable[..., int]]:
    """Make a command of a function that parses its arguments, does the work and returns the text to print.

    The command returns its exit status: 0, or 2 after one line on stderr if the function raises ValueError, OSError or
    ImportError (a package of an extra is missing).
    """

    def decorate(work: Callable[..., str]) -> Callable[..., int]:
        @functools.wraps(work)
        def main(arguments: list[str] | None = None) -> int:
            try:
                text = work(arguments)
            except (OSError, ValueError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            print(text)
            return 0

        return main

    return decorate


def describe_command(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> str:
    """The command that makes a report's figures: the program, and the options ``names`` that are not the defaults.

    Folders of this machine are left out: a path is shown as the name of its option in capitals.
    """
    words = [f"python -m {parser.prog} --out DIR"]
    for name in names:
        value = getattr(options, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(name.upper() if isinstance(value, Path) else str(value) for value in values)]
    return " ".join(words)
