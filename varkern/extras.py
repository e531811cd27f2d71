"""Checks for optional packages, with errors that say what to install."""

from __future__ import annotations

import importlib


def require_pillow() -> None:
    """Raise ``ImportError`` with the command to install pillow if it is missing."""
    require("PIL", "pillow")


def require_matplotlib() -> None:
    """Raise ``ImportError`` with the command to install matplotlib if it is missing."""
    require("matplotlib", "matplotlib")


def require(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading and drawing images needs {package}: pip install 'varkern[demo]'") from error
