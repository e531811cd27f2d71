"""Writing a dataset: the same bytes after any kill, by any number of processes; wrong input."""

import json
import os
import random
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from varkern.data import Batch, Manifest, TokenMaps, write_token_maps, writer

from .helpers import (
    contents,
    count_calls,
    die_before_change,
    ended,
    fork,
    kill_at_random_calls,
    kill_before_changes,
    small_manifest,
    source,
    write,
)

TOKENS, LABELS = torch.zeros(4, 14, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)


class TestWriting:
    def test_files(self, unbroken):
        shards = [f"shard-{number:05d}.safetensors" for number in range(8)]
        assert sorted(unbroken) == sorted(["manifest.json", *shards])

    def test_manifest(self, unbroken, tmp_path):
        write(tmp_path)
        manifest, text = Manifest.read(tmp_path), json.loads(unbroken["manifest.json"])
        assert (manifest.length, manifest.lengths, manifest.count, manifest.skipped) == (14, [1, 4, 9], 50, [])
        assert [shard.count for shard in manifest.shards] == [7] * 7 + [1]
        assert text["format"] == "varkern token maps" and text["version"] == 2
        assert text["patch_nums"] == [1, 2, 3] and text["source"] == {"kind": "test"}

    @pytest.mark.parametrize("maps", [True, False], ids=["K maps", "one tensor"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
    def test_forms_of_a_batch(self, unbroken, tmp_path, maps, dtype):
        manifest = small_manifest()

        def batches(wanted):
            for tokens, labels, _ in source(manifest)(wanted):
                tokens = tokens.to(dtype).T.contiguous().T
                yield Batch(tokens.split(manifest.lengths, 1) if maps else tokens, torch.tensor(labels))

        write_token_maps(tmp_path, manifest, batches)
        assert contents(tmp_path) == unbroken

    def test_skipped(self, tmp_path):
        """Images that cannot be read leave no row, whole shards of them too."""
        manifest = small_manifest()

        def batches(wanted):
            for numbers, batch in zip(wanted, source(manifest)(wanted), strict=True):
                kept = [place for place, number in enumerate(numbers) if number % 3 and not 14 <= number < 21]
                names = [f"{number}.png" for place, number in enumerate(numbers) if place not in kept]
                yield Batch(batch.tokens[kept], torch.tensor(batch.labels)[kept], names)

        manifest = write_token_maps(tmp_path, manifest, batches)
        left = [number for number in range(50) if number % 3 and not 14 <= number < 21]
        maps = TokenMaps.open(tmp_path, verify=True)
        assert len(maps) == manifest.count == len(left) and maps.labels.tolist() == [n % 5 for n in left]
        assert maps.gather(range(len(left)))[:, 2:].tolist() == [
            row.tolist()[2:] for row in next(iter(source(small_manifest(batch_size=50))([range(50)]))).tokens[left]
        ]
        assert manifest.skipped == [f"{n}.png" for n in range(50) if n not in left]
        assert manifest.shards[2].count == 0

    def test_batches_do_not_cross_shards(self):
        manifest = small_manifest()
        parts = [part for number in range(manifest.num_shards) for part in manifest.batches(number)]
        assert [number for part in parts for number in part] == list(range(50))
        assert [len(part) for part in parts] == [4, 3] * 7 + [1]

    def test_finished_is_left_alone(self, tmp_path):
        write(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        manifest = write_token_maps(tmp_path, small_manifest(), lambda wanted: pytest.fail("nothing is missing"))
        assert manifest == Manifest.read(tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


class TestKills:
    def test_before_random_changes_on_disk(self, unbroken, tmp_path):
        """Between any two steps: within a file, before it has its name, in the clearing up."""
        kills = kill_before_changes(lambda: write(tmp_path / "maps"), tmp_path / "maps", random.Random(0))
        assert kills >= 7 and contents(tmp_path / "maps") == unbroken

    def test_before_each_change_of_the_end(self, unbroken, tmp_path):
        """All shards are there: each step from there to the finished folder, one kill after another."""
        folder, kills = tmp_path / "maps", 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "finish", lambda *arguments: None)
            write(folder)
        for number in range(1, 50):
            if ended(fork(lambda number=number: (die_before_change(folder, number), write(folder)))):
                break
            kills += 1
        assert kills >= 3 and contents(folder) == unbroken

    def test_at_random_moments(self, unbroken, tmp_path):
        calls, rng, kills, rounds = count_calls(lambda: write(tmp_path / "once")), random.Random(1), 0, 0
        while kills < 7:
            folder, rounds = tmp_path / f"{rounds}", rounds + 1
            kills += kill_at_random_calls(lambda folder=folder: write(folder), calls, rng)
            assert contents(folder) == unbroken

    def test_whole_shards_are_kept(self, tmp_path):
        asked, manifest = [], small_manifest()

        def batches(wanted, stop):
            for numbers, batch in zip(wanted, source(manifest)(wanted), strict=True):
                asked.append(numbers.start)
                if numbers.start == stop:
                    raise KeyboardInterrupt
                yield batch

        with pytest.raises(KeyboardInterrupt):
            write_token_maps(tmp_path, manifest, lambda wanted: batches(wanted, 18))
        with pytest.raises(ValueError, match="must be a finished dataset"):
            TokenMaps.open(tmp_path)
        assert asked == [0, 4, 7, 11, 14, 18]
        asked.clear()
        write_token_maps(tmp_path, manifest, lambda wanted: batches(wanted, None))
        assert asked[:3] == [14, 18, 21]

    @pytest.mark.parametrize("damage", ["cut", "gone", "other", "fewer", "labels", "not one"])
    def test_damaged_since(self, unbroken, tmp_path, damage):
        """A shard that is no longer whole, or never was, is made again."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "finish", lambda *arguments: None)
            write(tmp_path)
        path, other = tmp_path / "shard-00004.safetensors", tmp_path / "shard-00003.safetensors"
        content = load_file(path)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "gone":
            path.unlink()
        elif damage == "other":
            path.write_bytes(save({"tokens": content["tokens"]}, {"skipped": "[]"}))
        elif damage == "fewer":
            path.write_bytes(save({name: tensor[:6] for name, tensor in content.items()}, {"skipped": "[]"}))
        elif damage == "labels":
            path.write_bytes(save({**content, "labels": content["labels"] + 5}, {"skipped": "[]"}))
        else:
            path.write_bytes(other.read_bytes()[:9] + b"}" * 400)
        write(tmp_path)
        assert contents(tmp_path) == unbroken

    def test_half_written_files_of_a_kill(self, unbroken, tmp_path):
        tmp_path.joinpath("progress").mkdir()
        (tmp_path / "progress" / "manifest.json.0.partial").write_bytes(b"{")
        (tmp_path / "progress" / "shard-00003.safetensors.2").write_bytes(b"half")
        write(tmp_path)
        assert contents(tmp_path) == unbroken


class TestRanks:
    @pytest.mark.parametrize("world", [2, 3, 8, 11])
    def test_processes_at_once(self, unbroken, tmp_path, world):
        """Equal bytes for any number of ranks, more than there are shards too."""
        places = [{"RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world)]
        pids = [fork(lambda: write(tmp_path), place) for place in places]
        assert all([ended(pid) for pid in pids])
        assert contents(tmp_path) == unbroken

    def test_ranks_take_shards_that_no_other_takes(self, tmp_path, monkeypatch):
        manifest, taken = small_manifest(), []

        def batches(wanted):
            taken.append({numbers.start // 7 for numbers in wanted})
            return source(manifest)(wanted)

        results = []
        for rank in (2, 0, 1):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            results.append(write_token_maps(tmp_path, manifest, batches))
        assert taken == [{2, 5}, {0, 3, 6}, {1, 4, 7}]
        assert results == [None, None, Manifest.read(tmp_path)]

    def test_killed_ranks_taken_up_by_others(self, unbroken, tmp_path):
        """Two ranks, each killed at some time, then three, then one."""
        rng, folder = random.Random(2), tmp_path / "maps"
        for world in (2, 3):
            for rank in range(world):
                place = {"RANK": str(rank), "WORLD_SIZE": str(world)}
                changes = rng.randint(3, 6)
                pid = fork(lambda n=changes: (die_before_change(folder, n), write(folder)), place)
                assert not ended(pid)
        write(folder)
        assert contents(folder) == unbroken

    def test_two_see_the_end_at_once(self, unbroken, tmp_path, monkeypatch):
        """Another rank writes the manifest and clears up, right before this one would write it."""
        placed = writer.place

        def late(folder, name, content, rank):
            if name == "manifest.json" and b'"shards": null' not in content and rank == 0:
                writer.finish(folder, small_manifest(), 1)
            placed(folder, name, content, rank)

        monkeypatch.setattr(writer, "place", late)
        assert write(tmp_path) == Manifest.read(tmp_path)
        assert contents(tmp_path) == unbroken

    def test_the_same_command_twice_at_once(self, tmp_path):
        read, ready = os.pipe()

        def hold():
            manifest = small_manifest()

            def batches(wanted):
                os.write(ready, b"x")
                time.sleep(60)
                return source(manifest)(wanted)

            write_token_maps(tmp_path, manifest, batches)

        pid = fork(hold)
        os.read(read, 1)
        with pytest.raises(ValueError, match="is being written by another process"):
            write(tmp_path)
        os.kill(pid, 9)
        assert not ended(pid)
        assert write(tmp_path) is not None  # the lock went with its process


class TestWrongInput:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"source": {"kind": "test", "cfg": 2.0}}, "source.cfg was None, now 2.0"),
            ({"total": 51}, "total was 50, now 51"),
            ({"batch_size": 5}, "batch_size was 4, now 5"),
            ({"shard_size": 8}, "shard_size was 7, now 8"),
            ({"vocabulary": 200}, "vocabulary was 100, now 200"),
            ({"patch_nums": (1, 2, 4)}, r"patch_nums was \[1, 2, 3\], now \[1, 2, 4\]"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
    def test_other_settings(self, tmp_path, changes, said, finished):
        with pytest.MonkeyPatch.context() as patch:
            if not finished:
                patch.setattr(writer, "write_shards", lambda *arguments, **named: None)
            write(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"made with other settings .*{said}.*: choose another folder"):
            write(tmp_path, **changes)
        assert contents(tmp_path) == before

    def test_folder_of_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(
            ValueError, match=r"out must be an empty folder or a dataset, got .*, which holds thesis\.tex"
        ):
            write(tmp_path)
        assert contents(tmp_path) == {"thesis.tex": b"x"}

    def test_folder_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            write(tmp_path / "file" / "maps")

    @pytest.mark.parametrize(
        "batch, said",
        [
            ((TOKENS[:3], LABELS), r"must have tokens \[4, 14\] and labels \[4\], got \[3, 14\] and \[4\]"),
            ((TOKENS[:, :13], LABELS), r"got \[4, 13\]"),
            ((TOKENS, LABELS[:3]), r"got \[4, 14\] and \[3\]"),
            ((TOKENS, LABELS, ["a.png"]), r"must have tokens \[3, 14\]"),
            ((TOKENS + 100, LABELS), r"tokens must be in 0\.\.99, got 100\.\.100"),
            ((TOKENS - 1, LABELS), r"tokens must be in 0\.\.99, got -1\.\.-1"),
            ((TOKENS, LABELS + 5), r"labels must be in 0\.\.4, got 5\.\.5"),
            ((TOKENS, LABELS - 1), r"labels must be in 0\.\.4, got -1"),
            ((TOKENS.float(), LABELS), r"tokens must be integers, got torch\.float32"),
            ((TOKENS, LABELS.bool()), r"labels must be integers, got torch\.bool"),
            (None, r"batch_source must yield images 0\.\.3, got no further batch"),
        ],
        ids=[
            "rows", "columns", "labels", "skipped", "token beyond", "token below", "label beyond", "label below",
            "float", "bool", "ended",
        ],
    )  # fmt: skip
    def test_batch_that_does_not_fit(self, tmp_path, batch, said):
        with pytest.raises(ValueError, match=said):
            write_token_maps(tmp_path, small_manifest(), lambda wanted: [] if batch is None else [Batch(*batch)])
        assert not list(tmp_path.glob("*.safetensors"))

    @pytest.mark.parametrize(
        "changes, said",
        [
            (
                {"vocabulary": 65537},
                "vocabulary must be at most 65536, because token ids are stored as uint16, got 65537",
            ),
            ({"vocabulary": 0}, "vocabulary must be an int >= 1, got 0"),
            ({"vocabulary": None}, "vocabulary must be an int >= 1, got None"),
            ({"num_classes": True}, "num_classes must be an int >= 1, got True"),
            ({"total": 0}, "total must be an int >= 1, got 0"),
            ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
            ({"shard_size": -1}, "shard_size must be an int >= 1, got -1"),
            ({"patch_nums": ()}, "patch_nums must be sides >= 1"),
            ({"patch_nums": ((1, 2),)}, "patch_nums must be sides >= 1"),
            ({"patch_nums": (0, 1)}, "patch_nums must be sides >= 1"),
            ({"source": [1]}, "source must be a mapping"),
            ({"source": {"cfg": torch.zeros(1)}}, "source must hold JSON values: .*Tensor"),
        ],
        ids=str,
    )
    def test_manifest(self, changes, said):
        with pytest.raises(ValueError, match=said):
            small_manifest(**changes)

    def test_numpy_sizes(self):
        manifest = small_manifest(total=np.int64(50), patch_nums=(np.int32(1), 2, 3))
        assert manifest == small_manifest() and json.loads(manifest.to_json())["total"] == 50
