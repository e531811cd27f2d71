"""Copies and pickles of a patched model hold no patch: they are what copies of the unpatched model would be."""

from __future__ import annotations

from typing import Any

ABSENT = object()  # what an attribute was before the patch, if only the class or ``__getattr__`` had it
HOOK = "__getstate__"  # Python looks this name up on the object itself before it copies or pickles the object


class Replacement:
    """A value in the ``__dict__`` of ``model`` in place of its method ``name``, and what was there: ``former``."""

    is_patch = True  # its fingerprint is that of the method it replaces

    def __init__(self, model: Any, name: str, former: Any):
        self.model, self.name, self.former = model, name, former

    def __reduce__(self):
        """For a class that copies its ``__dict__`` in a way of its own, past :class:`StateWithoutPatch`."""
        if self.former is ABSENT:
            return CopiedMethod, (self.model, self.name)
        return identity, (self.former,)


class CopiedMethod(Replacement):
    """Stands in such a copy where the patch was. The first use removes it, and finds the copy's own method."""

    def __init__(self, model: Any, name: str):
        super().__init__(model, name, ABSENT)

    @property
    def __wrapped__(self) -> Any:
        restore(self.model)
        return getattr(self.model, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class StateWithoutPatch:
    """The ``__getstate__`` of one patched object: its state for ``copy``, ``deepcopy`` and ``pickle``, unpatched."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self) -> Any:
        inherited = getattr(type(self.model), HOOK, None)
        state = dict(vars(self.model)) if inherited is None else inherited(self.model)
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):  # a class with slots
            return without_patch(state[0]), state[1]
        return without_patch(state) if isinstance(state, dict) else state


def identity(x: Any) -> Any:
    return x


def without_patch(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``attributes`` as they were before the patch, in their order."""
    clean = {}
    for name, value in attributes.items():
        value = value.former if isinstance(value, Replacement) else value
        if value is not ABSENT and not isinstance(value, StateWithoutPatch):
            clean[name] = value
    return clean


def replace(replacement: Replacement) -> None:
    """Put ``replacement`` into its model, whose copies hold none from now on."""
    vars(replacement.model)[replacement.name] = replacement
    keep_out_of_copies(replacement.model)


def restore(model: Any, before: dict[str, Any] | None = None) -> None:
    """Put back what was under each name before: what every :class:`Replacement` replaced, or the values ``before``."""
    attributes = vars(model)
    if before is None:
        before = {name: value.former for name, value in attributes.items() if isinstance(value, Replacement)}
    for name, value in before.items():
        if value is ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value
    keep_out_of_copies(model)


def keep_out_of_copies(model: Any) -> None:
    """Give a model with a patch the hook that leaves the patch out of its state, and take it from one without."""
    attributes = vars(model)
    if any(isinstance(value, Replacement) for value in attributes.values()):
        attributes.setdefault(HOOK, StateWithoutPatch(model))
    elif isinstance(attributes.get(HOOK), StateWithoutPatch):
        del attributes[HOOK]
