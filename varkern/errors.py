"""The exceptions that varkern defines."""


class UnsupportedModelError(TypeError):
    """The model fits no family; the message names the nearest family and what the model lacks.

    Example::

        >>> varkern.patch(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        varkern.errors.UnsupportedModelError: ...
    """


class OwnLoopError(RuntimeError):
    """A search cannot work inside the model's own loop, because the loop draws its tokens in another way.

    Example::

        >>> with varkern.searching(var, seeds=0):
        ...     pass
        Traceback (most recent call last):
        ...
        varkern.errors.OwnLoopError: ...
    """
