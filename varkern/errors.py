"""Errors of varkern's own."""


class UnsupportedModelError(TypeError):
    """A model that fits no family; the message lists, family by family, what was looked for and not found.

    Example::

        >>> varkern.patch(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        varkern.errors.UnsupportedModelError: ...
    """
