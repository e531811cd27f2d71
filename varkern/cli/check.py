"""``varkern check``: how ``varkern.patch`` would serve a model of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import torch
import typer


def check(
    model: Annotated[
        str, typer.Argument(help="Model as MODULE:NAME, of a model or of a function without arguments that makes one")
    ],
    method: Annotated[str | None, typer.Option(help="Name of the method that generates; default: the family's")] = None,
) -> None:
    """Print which loop varkern.patch would use for a model, and why, without generating."""
    from varkern.patching import explain_patch

    way = explain_patch(import_model(model), method)
    for name, value in way._asdict().items():
        print(f"{name + ':':<8} {value}")


def import_model(path: str) -> Any:
    """The object that ``MODULE:NAME`` names, imported with the current folder on the path; a function is called.

    Raises:
        ValueError: if the text has another form, or the module has no such name.
        ImportError: if the module cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not module or not colon or not name.isidentifier():
        raise ValueError(f"model must be MODULE:NAME, such as my_script:load_model, got {path!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.remove(os.getcwd())
    if found is None:
        raise ValueError(f"model must name an object of module {module}, which has no {name}")
    return found() if callable(found) and not isinstance(found, torch.nn.Module) else found
