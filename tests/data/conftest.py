"""What the tests of writing share."""

import pytest

from varkern.data import TokenMaps

from .helpers import contents, write


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a dataset that was written in one go."""
    folder = tmp_path_factory.mktemp("unbroken") / "maps"
    assert write(folder) == TokenMaps.open(folder, verify=True).manifest
    return contents(folder)
