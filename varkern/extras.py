"""Checks for optional packages, with errors that say what to install.

The extras of pyproject.toml go by purpose: ``plots`` (sample, explain, perturb), ``demo``, ``train`` (tokens, scorer),
``measure`` (evaluate, sweep), ``digits`` (the demo's real images), ``hub``.
"""

from __future__ import annotations

import importlib


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
