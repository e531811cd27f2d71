"""Triton's interpreter without the work that it repeats at every call of a device function."""

from __future__ import annotations

import functools


def patch_language_once() -> None:
    """Let Triton's interpreter patch its language once per launch, and not at every call of a device function.

    The patches are the same for all functions of a module, and they hold until the launch ends. Patching anew looks
    through some hundred names, which takes two fifths of the time of a kernel that calls many small functions.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "__wrapped__"):
        return
    patched = set()  # the modules, by their global names, whose language is patched during this launch

    @functools.wraps(patch)
    def once(function):
        module = id(function.__globals__)
        if module in patched:
            return None  # a device function's; only the launch restores
        scope, launches = patch(function), not patched
        patched.add(module)
        if launches:
            scope.restore = lambda restore=scope.restore: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = once
