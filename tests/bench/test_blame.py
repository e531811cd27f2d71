"""A launch that fails says which kernel it was, and compiling ahead runs nothing."""

import pytest
import torch
from varkern.kernels.launching import launch

from bench.blame import find_kernel


class Broken:
    """A kernel whose launch raises, as one that does not compile does."""

    __name__, arg_names = "broken_kernel", ()

    def __getitem__(self, grid):
        def fail(*arguments, **options):
            raise RuntimeError("does not compile")

        return fail


def test_the_kernel_of_a_failed_launch_is_named():
    with pytest.raises(RuntimeError) as caught:
        launch(Broken(), (1,), torch.zeros(1))
    assert find_kernel(caught.value.__traceback__) == "broken_kernel"


def test_another_error_names_none():
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert find_kernel(caught.value.__traceback__) is None
    assert find_kernel(None) is None
