"""Errors of varkern's own."""


class UnsupportedModelError(TypeError):
    """A model that fits no family; the message lists, family by family, what was looked for and not found."""
