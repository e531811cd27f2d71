"""Triton's interpreter in less time: without repeated work, and with a part of the heaviest grids of cases."""

from __future__ import annotations

import functools

import pytest


def runs_interpreted(item: pytest.Item) -> bool:
    """Whether Triton's interpreter runs this case of a test marked ``thinned``.

    ``thinned(every=3)`` keeps the cases whose values' numbers, one of each ``parametrize``, add up to a multiple of 3:
    every value still occurs if another ``parametrize`` has 3 or more values. ``thinned(side=(1, 16))`` keeps the cases
    with one of these values. Both may be given. The cases of the PyTorch form are always kept.
    """
    marker, case = item.get_closest_marker("thinned"), getattr(item, "callspec", None)
    if marker is None or case is None or {"torch", "registered"} & {case.params.get(n) for n in ("backend", "form")}:
        return True
    kept = dict(marker.kwargs)
    every = kept.pop("every", 1)
    if any(case.params[name] not in values for name, values in kept.items()):
        return False
    return sum(_number_of_values(mark, case.params) for mark in item.iter_markers("parametrize")) % every == 0


def _number_of_values(mark: pytest.Mark, params: dict) -> int:
    """Which of the values that ``mark`` lists a case has, counted from 0."""
    names, listed = mark.args[:2]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    wanted = [params[name] for name in names]
    for number, values in enumerate(listed):
        if isinstance(values, type(pytest.param())):
            values = values.values
        elif len(names) == 1:
            values = (values,)
        if all(value is other for value, other in zip(values, wanted, strict=True)):
            return number
    raise AssertionError(f"{wanted} is not in {mark}")


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


def draw_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the sampling kernels draws up to 16384 candidates in one step of its loop, or takes 2048 rows.

    Interpreted kernels take about the same time for any size of tile. Compiled ones keep their own sizes.
    """
    from varkern.ops.backend import interpreting, triton_trouble

    if triton_trouble() or not interpreting():
        return
    from varkern.kernels import sampling

    chosen_plan = sampling.plan

    def plan(vocabulary, num_candidates, top_k):
        chosen = chosen_plan(vocabulary, num_candidates, top_k)
        draws = min(16384, 1 << (num_candidates - 1).bit_length())
        at_once = {"ROWS": 2048} if chosen["kind"] == "small" else {"DRAWS": draws}
        return {**chosen, "sample": {**chosen["sample"], **at_once}}

    monkeypatch.setattr(sampling, "plan", plan)
