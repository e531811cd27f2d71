"""The exceptions that varkern defines."""


class UnsupportedModelError(TypeError):
    """The model fits no family; the message lists for each family what the model lacks.

    Example::

        >>> varkern.patch(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        varkern.errors.UnsupportedModelError: ...
    """
