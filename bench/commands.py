"""The command that makes a report's figures, as the report shows it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def describe_command(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> str:
    """``python -m PROGRAM --out DIR`` and those of the options ``names`` that differ from their defaults.

    Folders of this machine are left out: a path is shown as the name of its option in capitals.
    """
    words = [f"python -m {parser.prog} --out DIR"]
    for name in names:
        value = getattr(options, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(name.upper() if isinstance(value, Path) else str(value) for value in values)]
    return " ".join(words)
