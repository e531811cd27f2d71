"""Optional packages, with errors that say what to install, and objects of the user's own modules.

The extras of pyproject.toml go by purpose: ``plots`` (sample, explain, perturb), ``demo``, ``train`` (tokens, scorer),
``measure`` (evaluate, sweep), ``digits`` (the demo's real images), ``hub``.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def require_pillow(extra: str) -> None:
    """Raise ``ImportError`` with the command to install ``extra`` if pillow is missing."""
    require("PIL", "pillow", extra)


def require_matplotlib(extra: str) -> None:
    """Raise ``ImportError`` with the command to install ``extra`` if matplotlib is missing."""
    require("matplotlib", "matplotlib", extra)


def require(module: str, package: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading and drawing images needs {package}: pip install 'varkern[{extra}]'") from error


def import_named(wanted: str, path: str) -> Any:
    """The object that ``MODULE:NAME`` names. Modules in the working folder are found too.

    Args:
        wanted: what the text must be, for the message.
        path: the text.

    Raises:
        ValueError: if the text has another form, or there is no such module or object.
    """
    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise ValueError(f"{wanted}, got {path!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"{wanted}, got {path!r}: there is no module {error.name!r}") from error
    finally:
        sys.path.remove(here)
    if found is None:
        raise ValueError(f"{wanted}, got {path!r}: {module} has no {name!r}")
    return found
