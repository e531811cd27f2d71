"""Packages that only some commands need: an error that says what to install, before any work."""

from __future__ import annotations

import importlib


def require_pillow() -> None:
    """Raise ``ImportError``, saying what to install, if pillow is missing."""
    require("PIL", "pillow")


def require_matplotlib() -> None:
    """Raise ``ImportError``, saying what to install, if matplotlib is missing."""
    require("matplotlib", "matplotlib")


def require(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading and drawing images needs {package}: pip install 'varkern[demo]'") from error
