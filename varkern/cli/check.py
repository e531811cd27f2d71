"""``varkern check``: how ``varkern.patch`` would serve a model of the user's own."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from varkern.extras import import_named


def check(
    model: Annotated[
        str, typer.Argument(help="Model as MODULE:NAME, of a model or of a function without arguments that makes one")
    ],
    method: Annotated[str | None, typer.Option(help="Name of the method that generates; default: the family's")] = None,
) -> None:
    """Print which loop varkern.patch would use for a model, and why, without generating."""
    from varkern.patching import explain_patch

    found = import_named("model must be MODULE:NAME, such as my_script:load_model", model)
    way = explain_patch(found() if callable(found) and not isinstance(found, torch.nn.Module) else found, method)
    for name, value in way._asdict().items():
        print(f"{name + ':':<8} {value}")
