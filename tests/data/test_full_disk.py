"""A disk that is full: a clear error, nothing half-written that is ever read, and the same bytes once there is room."""

import ctypes
import errno
import os
import sys
from pathlib import Path

import pytest

from varkern.data import writer

from .helpers import contents, ended, fork, write


class TestFullDisk:
    @pytest.mark.parametrize("limit, name", [(100, "manifest.json"), (300, "shard-00000.safetensors")])
    def test_file_size_limit(self, unbroken, tmp_path, limit, name):
        """The kernel itself refuses to write on, in the middle of a file; a shard has 392 bytes."""
        if name != "manifest.json":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writer, "write_shards", lambda *arguments, **named: None)
                write(tmp_path)
        read, ready = os.pipe()

        def limited():
            import resource  # does not exist on Windows, which cannot fork either

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                write(tmp_path)
            except OSError as error:
                os.write(ready, f"{error}".encode())

        assert ended(fork(limited))
        said = os.read(read, 4000).decode()
        assert "File too large" in said and name in said and "run again to continue" in said
        assert not [path for path in contents(tmp_path) if name in path]
        write_token_maps_again(tmp_path, unbroken)

    def test_no_space_at_any_write(self, unbroken, tmp_path, monkeypatch):
        """Every file in turn meets a full disk when it is flushed; nothing half-written is left or read."""
        flush, left = os.fsync, 0

        def full(descriptor):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        failures = 0
        while True:
            left = 1
            try:
                if write(tmp_path):
                    break
            except OSError as error:
                failures += 1
                assert error.errno == errno.ENOSPC and "No space left on device" in str(error)
                assert str(tmp_path) in str(error) and not list(tmp_path.rglob("*.partial"))
            if failures % 5 == 0:  # a little room
                left = 2
                try:
                    write(tmp_path)
                except OSError:
                    failures += 1
        assert failures >= 7 and contents(tmp_path) == unbroken

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    def test_dev_full(self, unbroken, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "write_shards", lambda *arguments, **named: None)
            write(tmp_path)
        (tmp_path / "progress").mkdir(exist_ok=True)
        (tmp_path / "progress" / "shard-00001.safetensors.0.partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device, while writing .*shard-00001\.safetensors"):
            write(tmp_path)
        write_token_maps_again(tmp_path, unbroken)

    def test_small_tmpfs(self, unbroken, tmp_path):
        """A file system of 24 kB that fills up, and is then given room."""
        read, ready = os.pipe()

        def on_tmpfs():
            if not mount_tmpfs(tmp_path, "size=24k"):
                os.write(ready, b"not allowed")
                return
            try:
                write(tmp_path / "maps")
            except OSError as error:
                os.write(ready, f"{error}; ".encode())
            half = {name for name in contents(tmp_path) if name.endswith(".partial")}
            mount_tmpfs(tmp_path, "remount,size=4m")
            write(tmp_path / "maps")
            equal = contents(tmp_path / "maps") == unbroken
            os.write(ready, f"left half-written: {half or None}, bytes equal: {equal}".encode())

        assert ended(fork(on_tmpfs))
        said = os.read(read, 4000).decode()
        if said == "not allowed":
            pytest.skip("mounting needs user namespaces, which this kernel does not allow; the others above do without")
        assert "No space left on device, while writing" in said
        assert "left half-written: None, bytes equal: True" in said


def write_token_maps_again(folder: Path, unbroken: dict[str, bytes]) -> None:
    write(folder)
    assert contents(folder) == unbroken


def mount_tmpfs(folder: Path, options: str) -> bool:
    """Mount a tmpfs, for this process alone and until it ends; False if that is not allowed."""
    if sys.platform != "linux":
        return False
    libc, new_namespaces, remount = ctypes.CDLL(None, use_errno=True), 0x10000000 | 0x00020000, 32
    user, group = os.getuid(), os.getgid()
    flags = remount if options.startswith("remount,") else 0
    if not flags:
        if libc.unshare(new_namespaces):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = options.removeprefix("remount,")
    mounted = libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode()) == 0
    if mounted and not flags:
        os.chdir(folder)
    return mounted
