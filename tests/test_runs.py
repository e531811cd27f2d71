"""Files are written whole or not at all."""

import pytest

from varkern.runs import atomically


@pytest.fixture(params=[None, b"former"], ids=["new", "over a former file"])
def path(request, tmp_path):
    path = tmp_path / "figures.json"
    if request.param is not None:
        path.write_bytes(request.param)
    return path


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_the_file_appears_whole_at_the_end(path, kind):
    before = path.read_bytes() if path.exists() else None
    with atomically(kind(path)) as unfinished:
        assert unfinished != path and unfinished.parent == path.parent
        unfinished.write_bytes(b"first half")
        assert (path.read_bytes() if path.exists() else None) == before
        with unfinished.open("ab") as file:
            file.write(b", second half")
    assert path.read_bytes() == b"first half, second half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("written", [True, False], ids=["half written", "nothing written"])
def test_an_error_leaves_the_former_file_and_nothing_else(path, error, written):
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(error, match="disk full"), atomically(path) as unfinished:
        if written:
            unfinished.write_bytes(b"half")
        raise error("disk full")
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomically(tmp_path / "folder") as unfinished:
        unfinished.write_bytes(b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_processes_write_side_by_side(tmp_path, monkeypatch):
    """Under torchrun two processes may find at the same time that a file is due; each is whole, the later one stays."""
    path = tmp_path / "figures.json"
    with atomically(path) as first:
        monkeypatch.setenv("RANK", "1")
        with atomically(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
