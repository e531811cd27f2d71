"""The command ``varkern``.

Wrong input gives one line on stderr and exit code 2; an interrupted run gives one line and exit code 130. ``varkern
--traceback COMMAND`` shows the traceback of an error instead.
"""

from __future__ import annotations

import io
import sys
from functools import cache
from typing import Annotated, Any

import torch
import typer
from typer.main import get_command

import varkern

from . import check, demo, evaluate, explain, sample, scorer, sweep, tokens
from .options import Device, pick_device

WRONG_INPUT, INTERRUPTED, OUT_OF_MEMORY = 2, 130, 1
LONGEST_MESSAGE = 600
# Typer raises subclasses of this class for wrong options. Its module differs between releases of Typer.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="varkern",
    help="Best-of-M sampling for visual autoregressive (VAR) image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(demo.app, name="demo", help="The small digits model that is part of varkern: run it or train it again.")
app.add_typer(scorer.app, name="scorer", help="Training of a scorer on token maps, and its report.")
app.add_typer(tokens.app, name="tokens", help="Token-map datasets, from a model's samples or from images.")
app.command()(check.check)
app.command()(sample.sample)
app.command()(evaluate.evaluate)
app.command()(sweep.sweep)
app.command()(explain.explain)
app.command()(explain.perturb)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    traceback = arguments[:1] == ["--traceback"]
    for stream in (sys.stdout, sys.stderr):  # a redirected stream may lack a character, as on Windows
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = command()(arguments, prog_name="varkern", standalone_mode=False)
        code = code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UsageError as error:
        # `varkern` without arguments raises one with an empty message, after the help was printed.
        return complain(error.format_message()) if error.format_message() else WRONG_INPUT
    except torch.OutOfMemoryError as error:
        if traceback:
            raise
        return complain(f"out of memory, try a smaller --batch-size: {error}", OUT_OF_MEMORY)
    except (ValueError, OSError, ImportError, varkern.UnsupportedModelError) as error:
        if traceback:
            raise
        return complain(str(error) or type(error).__name__)
    return complain("interrupted", INTERRUPTED) if code == INTERRUPTED else code


@cache
def command() -> Any:
    """The commands and their options, read from the signatures of their functions once per process."""
    return get_command(app)


def complain(message: str, code: int = WRONG_INPUT) -> int:
    """Print ``message`` on stderr as one line; returns ``code``."""
    line = " ".join(message.split())
    if len(line) > LONGEST_MESSAGE:
        line = line[:LONGEST_MESSAGE] + " ..."
    print(f"varkern: {line}", file=sys.stderr)
    return code


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"varkern {varkern.__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Traceback of an error instead of one line")] = False,
) -> None:
    pass


@app.command()
def env(device: Device = "auto") -> None:
    """Print versions, device, backend and optional packages, for a bug report."""
    from varkern.environment import describe

    try:
        where = pick_device(device)
    except ValueError:
        raise
    except Exception:  # PyTorch fails to look for GPUs, which a line of the description says
        where = torch.device("cpu")
    for name, value in describe(where).items():
        print(f"{name + ':':<12} {value}")
