"""What long work rests on: whole files, settings that must match, one writer at a time, ranks."""

import errno
import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from varkern import runs
from varkern.runs import atomically

from .data.helpers import contents, ended, fork, kill_before_changes
from .training.small import free_port, start_child, wait_for

FORMER = {"seed": 1, "var": {"path": "a", "bytes": 3}, "classes": [1, 2], "cfg": 1.5}


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


WRITERS = {
    "text": lambda path: runs.write_text(path, "x" * 5000),
    "json": lambda path: runs.write_json(path, {"values": list(range(2000))}),
    "tensors": lambda path: runs.write_tensors(path, {"weight": torch.arange(2000)}, {"config": "{}"}),
    "checkpoint": lambda path: runs.write_checkpoint(path, {"step": 3, "weight": torch.arange(2000)}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
class TestWriters:
    def test_the_file_appears_whole(self, write, path, tmp_path, monkeypatch):
        """What is on the disk under another name is given this one; nothing is written under the name itself."""
        flushed, flush = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (flush(file), flushed.append(os.fstat(file).st_ino)))
        write(path)
        assert [path.stat().st_ino] == flushed and list(contents(tmp_path)) == [path.name]

    def test_killed_before_any_change_on_disk(self, write, path, tmp_path):
        write(tmp_path / "wanted")
        wanted = (tmp_path / "wanted").read_bytes()
        (tmp_path / "wanted").unlink()
        kill_before_changes(lambda: write(path), tmp_path, random.Random(3))
        assert contents(tmp_path) == {path.name: wanted}

    def test_a_full_disk_is_an_error_that_names_the_file(self, write, path):
        """The system itself refuses the write, in the middle of the file."""
        before = contents(path.parent)

        def limited():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            import resource  # does not exist on Windows, which cannot fork either

            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with pytest.raises(OSError, match=rf"while writing {path}; finished files are kept, run again") as caught:
                write(path)
            assert caught.value.errno == errno.EFBIG

        assert ended(fork(limited)) and contents(path.parent) == before

    def test_what_is_not_on_the_disk_yet_has_no_name_yet(self, write, path, monkeypatch):
        before = contents(path.parent)

        def fail(descriptor):
            assert contents(path.parent).items() >= before.items()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left on device, while writing"):
            write(path)
        assert contents(path.parent) == before


def test_what_is_written_can_be_read(tmp_path):
    runs.write_json(tmp_path / "new" / "a.json", FORMER)
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == FORMER
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, requires_grad=True)}
    runs.write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    runs.write_checkpoint(tmp_path / "a.pt", {"step": 3, "model": {"a": torch.ones(2)}})
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3


class TestPlaces:
    def test_a_folder_is_made_and_left_empty(self, tmp_path):
        runs.open_folder(tmp_path / "a" / "b")
        runs.open_folder(tmp_path / "a" / "b")
        assert contents(tmp_path) == {}

    def test_no_folder_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OSError, match="file"):
                runs.open_folder(folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(PermissionError):
            runs.check_file("out", tmp_path / "a.png", ".png")

    def test_files(self, tmp_path):
        runs.check_file("out", None, ".png")
        runs.check_file("out", tmp_path / "new" / "a.PNG", ".png")
        assert (tmp_path / "new").is_dir() and contents(tmp_path) == {}
        with pytest.raises(ValueError, match=r"out must end in \.png, got .*a\.jpg"):
            runs.check_file("out", tmp_path / "other" / "a.jpg", ".png")
        assert not (tmp_path / "other").exists()
        (tmp_path / "a.png").mkdir()
        with pytest.raises(ValueError, match=r"out must be a file, got the folder .*a\.png"):
            runs.check_file("out", tmp_path / "a.png", ".png")

    def test_a_file_as_a_setting(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a").write_bytes(b"123")
        described = runs.describe_file("a")
        assert described["path"] == str(tmp_path / "a") and described["bytes"] == 3
        os.utime(tmp_path / "a", ns=(1, 1))
        assert runs.describe_file(tmp_path / "a") != described
        assert (runs.describe_file("d16"), runs.describe_file(None)) == ("d16", None)


class TestSettings:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"seed": 2}, r"\(seed was 1, now 2\)"),
            ({"var": {"path": "a", "bytes": 4}}, r"\(var\.bytes was 3, now 4\)"),
            ({"var": "d16"}, r"\(var\.path was 'a', now None; var\.bytes was 3, now None; var was None, now 'd16'\)"),
            ({"classes": (1, 3)}, r"\(classes was \[1, 2\], now \[1, 3\]\)"),
            ({"m": 4}, r"\(m was None, now 4\)"),
            (
                {"seed": 2, "cfg": 2.0, "a": 1, "b": 2},
                r"\(seed was 1, now 2; cfg was 1\.5, now 2\.0; a was None, now 1\)",
            ),
        ],
        ids=str,
    )
    def test_other_settings_are_refused(self, tmp_path, changes, said):
        runs.claim(tmp_path, FORMER)
        before = contents(tmp_path)
        with pytest.raises(
            ValueError, match=rf"{tmp_path} was made with other settings {said}: choose another folder$"
        ):
            runs.claim(tmp_path, {**FORMER, **changes})
        assert contents(tmp_path) == before

    def test_the_same_settings_are_taken(self, tmp_path):
        """As they are after JSON, in any order."""
        runs.claim(tmp_path, FORMER)
        runs.claim(tmp_path, dict(reversed((FORMER | {"classes": (1, 2)}).items())))
        assert list(contents(tmp_path)) == ["settings.json"]

    @pytest.mark.parametrize("content", ["", "{", "3", "null"], ids=repr)
    def test_a_file_that_is_no_settings(self, tmp_path, content):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json is not a readable settings file: remove"):
            runs.claim(tmp_path, FORMER)

    def test_two_processes_claim_at_once(self, tmp_path):
        pids = [fork(lambda: runs.claim(tmp_path, {"seed": 1}), {"RANK": str(rank)}) for rank in range(4)]
        assert all([ended(pid) for pid in pids])
        assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}
        with pytest.raises(ValueError, match="seed was 1, now 2"):
            runs.claim(tmp_path, {"seed": 2})


class TestLock:
    def test_one_writer_of_a_rank(self, tmp_path):
        read, ready = os.pipe()

        def hold():
            with runs.lock_folder(tmp_path, 0):
                os.write(ready, b"x")
                time.sleep(60)

        pid = fork(hold)
        os.read(read, 1)
        with (
            pytest.raises(runs.BeingWrittenError, match="is being written by another process"),
            runs.lock_folder(tmp_path, 0),
        ):
            pass
        with runs.lock_folder(tmp_path, 1):  # another rank's place is free
            pass
        os.kill(pid, signal.SIGKILL)
        assert not ended(pid)
        with runs.lock_folder(tmp_path, 0):  # the lock went with its process
            pass
        assert [path.name for path in sorted((tmp_path / "progress").iterdir())] == ["rank0.lock", "rank1.lock"]
        assert (tmp_path / "progress" / "rank0.lock").read_bytes() == b""

    def test_the_lock_is_not_that_of_a_child(self, tmp_path):
        """A child that outlives the process that held the lock, such as a reader of data, does not keep it."""
        read, ready = os.pipe()

        def hold():
            with runs.lock_folder(tmp_path, 0):
                child = fork(lambda: time.sleep(60))
                os.write(ready, child.to_bytes(4, "little"))
                time.sleep(60)

        pid = fork(hold)
        child = int.from_bytes(os.read(read, 4), "little")
        os.kill(pid, signal.SIGKILL)
        assert not ended(pid)
        try:
            with runs.lock_folder(tmp_path, 0):
                pass
        finally:
            os.kill(child, signal.SIGKILL)

    def test_one_process_may_not_hold_it_twice(self, tmp_path):
        with (
            runs.lock_folder(tmp_path, 0),
            pytest.raises(runs.BeingWrittenError, match="is being written by another process"),
            runs.lock_folder(tmp_path, 0),
        ):
            pass

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        """Nothing is locked there and nothing is left there."""

        def refuse(*args, **kwargs):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(runs, "lock_descriptor", refuse)
        with runs.lock_folder(tmp_path, 0), runs.lock_folder(tmp_path, 0):
            assert [path.name for path in (tmp_path / "progress").iterdir()] == ["rank0.lock"]


class TestRanks:
    @pytest.mark.parametrize("rank, world", [(None, None), ("0", "1"), ("2", "3")])
    def test_rank_and_number(self, monkeypatch, rank, world):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert runs.find_rank() == (int(rank or 0), int(world or 1))

    @pytest.mark.parametrize("rank, world", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0"), ("0", "")])
    def test_wrong_environment(self, monkeypatch, rank, world):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ValueError, match=f"RANK must be in .*got RANK='{rank}' and WORLD_SIZE='{world}'"):
            runs.find_rank()

    def test_pytorch_without_its_distributed_part(self, monkeypatch):
        """As some builds for Windows are: one process works, several are refused."""
        monkeypatch.setattr(runs, "distributed", type("distributed", (), {"is_available": staticmethod(lambda: False)}))
        with runs.join_ranks(torch.device("cpu")) as ranks:
            assert ranks.size == 1
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="WORLD_SIZE must be 1 with a PyTorch built without"):
            runs.join_ranks(torch.device("cpu")).__enter__()

    @pytest.mark.parametrize("time", range(5))
    def test_two_processes_end(self, time):
        """After sums of tensors that are gone: gloo's thread ends the last one, for which it needs Python's lock."""
        port = free_port()

        def rank(number):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(number), WORLD_SIZE="2")
            with runs.join_ranks(torch.device("cpu")) as ranks:
                assert [float(ranks.sum(torch.ones(50))[0]) for _ in range(20)] == [2.0] * 20

        children = [start_child(lambda number=number: rank(number)) for number in range(2)]
        assert [wait_for(child, seconds=60) for child in children] == [0, 0]

    def test_one_process_alone(self):
        with runs.join_ranks(torch.device("cpu")) as ranks:
            assert (ranks.rank, ranks.size) == (0, 1)
            assert ranks.sum(torch.tensor(3)) == 3
            ranks.agree("anything", True)
