"""What the tests of scorer training share: two datasets, and an unbroken run on them."""

import pytest

from varkern.training import loop

from .small import small_datasets, start_child, train, wait_for


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """Two datasets, and the scorer of an unbroken run, trained in a child as all runs that must equal it are."""
    folder = tmp_path_factory.mktemp("maps")
    small_datasets(folder)
    assert wait_for(start_child(lambda: train(folder, folder / "unbroken.safetensors", every=3))) == 0
    return folder


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint after each step."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
