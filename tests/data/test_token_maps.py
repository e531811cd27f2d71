"""Reading a dataset: what is in it, that nothing is read before it is asked for, and what is said of a damaged one."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from varkern.data import Batch, Manifest, TokenMaps, file_sha256, write_token_maps

from .helpers import small_manifest, source, tokens_of


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "maps"
    write_token_maps(folder, small_manifest(), source(small_manifest()))
    return folder


@pytest.fixture
def dataset(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "maps"))


def edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(path: Path, name: str, place, value: int) -> None:
    """Change one number of a shard."""
    content = load_file(path)
    content[name].numpy()[place] = value
    path.write_bytes(save(content, {"skipped": "[]"}))


class TestReading:
    @pytest.mark.parametrize(
        "indices",
        [[3], [49, 0, 7, 6, 7, 48, 13, 14], list(range(50)), list(range(49, -1, -2)), []],
        ids=["one", "across shards", "all", "backwards", "none"],
    )
    @pytest.mark.parametrize(
        "kind",
        [list, np.array, torch.tensor, lambda i: torch.tensor(i, dtype=torch.int64).repeat_interleave(2)[::2]],
        ids=["list", "array", "tensor", "non-contiguous"],
    )
    def test_gather(self, dataset, indices, kind):
        maps, manifest = TokenMaps.open(dataset), small_manifest()
        tokens = maps.gather(kind(indices))
        assert tokens.dtype == torch.int64 and tokens.shape == (len(indices), 14)
        wanted = [tokens_of(number, manifest) for number in indices]
        assert np.array_equal(tokens.numpy(), np.array(wanted).reshape(-1, 14))

    def test_labels_and_length(self, dataset):
        maps = TokenMaps.open(dataset)
        assert len(maps) == 50 and maps.labels.dtype == np.int64
        assert maps.labels.tolist() == [number % 5 for number in range(50)]

    def test_split(self, dataset):
        maps = TokenMaps.open(dataset)
        tokens = maps.gather([4, 40])
        first, second, third = maps.split(tokens)
        assert [part.shape for part in (first, second, third)] == [(2, 1), (2, 4), (2, 9)]
        assert torch.equal(first, tokens[:, :1]) and torch.equal(third, tokens[:, 5:])
        assert [part.shape for part in maps.split(tokens[:0])] == [(0, 1), (0, 4), (0, 9)]

    @pytest.mark.parametrize("indices", [[50], [-1], [0, 51, 3]], ids=str)
    def test_gather_out_of_range(self, dataset, indices):
        with pytest.raises(IndexError, match=r"indices must be in 0\.\.49"):
            TokenMaps.open(dataset).gather(indices)

    def test_every_uint16(self, tmp_path):
        manifest = small_manifest(vocabulary=65536, patch_nums=(256,), total=1, shard_size=1)
        every = torch.arange(65536)[None]
        write_token_maps(tmp_path / "maps", manifest, lambda wanted: [Batch(every, [0])])
        assert torch.equal(TokenMaps.open(tmp_path / "maps", verify=True).gather([0]), every)

    def test_files_are_plain_safetensors(self, dataset):
        path = dataset / "shard-00001.safetensors"
        content = load_file(path)
        assert content["tokens"].dtype == torch.uint16 and content["tokens"].shape == (7, 14)
        assert content["labels"].dtype == torch.int32 and content["labels"].shape == (7,)
        assert np.array_equal(content["tokens"][2].numpy(), tokens_of(9, small_manifest()))
        assert TokenMaps.open(dataset).manifest.shards[1].sha256 == file_sha256(path)

    def test_pickle(self, dataset):
        again = pickle.loads(pickle.dumps(TokenMaps.open(dataset)))
        assert torch.equal(again.gather([11]), TokenMaps.open(dataset).gather([11]))

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process's memory")
    def test_opening_reads_no_tokens(self, tmp_path):
        """1.28 million images of 680 tokens, as files with holes: nothing is read of them, and no file is held open."""
        sides, count = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096
        labels, tokens = 4 * count, 2 * count * 680
        header = {
            "__metadata__": {"skipped": "[]"},
            "labels": {"dtype": "I32", "shape": [count], "data_offsets": [0, labels]},
            "tokens": {"dtype": "U16", "shape": [count, 680], "data_offsets": [labels, labels + tokens]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (tmp_path / "shard-00000.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + labels + tokens)
        entry = {"file": "shard-00000.safetensors", "count": count, "sha256": "", "skipped": []}
        manifest = Manifest(sides, 4096, 1000, 313 * count, {}, shard_size=count)
        text = {**json.loads(manifest.to_json()), "shards": [entry] * 313}
        (tmp_path / "manifest.json").write_text(json.dumps(text))

        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        before, descriptors = resident(), len(os.listdir("/proc/self/fd"))
        maps = TokenMaps.open(tmp_path)
        assert len(maps) == 313 * count and maps.gather([0, 1_280_000]).sum() == 0
        assert resident() - before < 100e6  # the tokens alone are 1.7e9
        assert len(os.listdir("/proc/self/fd")) == descriptors


class TestDamage:
    def test_no_dataset(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is not a token-map dataset: it has no manifest\.json"):
            TokenMaps.open(tmp_path)

    @pytest.mark.parametrize(
        "text, said",
        [
            ("{", "not readable as JSON"),
            ("\x00\xff", "not readable as JSON"),
            ("[]", "not the manifest of a token-map dataset"),
            ('{"format": "other"}', "not the manifest of a token-map dataset"),
        ],
        ids=["cut", "binary", "list", "other format"],
    )
    def test_no_manifest(self, dataset, text, said):
        (dataset / "manifest.json").write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=f"manifest.json is {said}"):
            TokenMaps.open(dataset)

    @pytest.mark.parametrize("version", [0, 1, "2", None], ids=repr)
    def test_other_version(self, dataset, version):
        edit(dataset, version=version)
        with pytest.raises(ValueError, match=rf"must have format version 2, got {version!r}"):
            TokenMaps.open(dataset)

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"vocabulary": 65537}, "vocabulary must be at most 65536, .* got 65537"),
            ({"vocabulary": 0}, "vocabulary must be an int >= 1, got 0"),
            ({"num_classes": "5"}, "num_classes must be an int >= 1, got '5'"),
            ({"patch_nums": []}, "patch_nums must be sides >= 1"),
            ({"patch_nums": [1, 2.5]}, "patch_nums must be sides >= 1"),
            ({"source": 3}, "source must be a mapping"),
            ({"colour": "red"}, "colour"),
            ({"shards": [{}]}, "a shard's description is wrong"),
            ({"shards": [3]}, "a shard's description is wrong"),
            ({"shards": 3}, "not a usable manifest"),
        ],
        ids=str,
    )
    def test_impossible_manifest(self, dataset, changes, said):
        edit(dataset, **changes)
        with pytest.raises(ValueError, match=said):
            TokenMaps.open(dataset)

    def test_shards_of_another_folder(self, dataset):
        shards = json.loads((dataset / "manifest.json").read_text())["shards"]
        edit(dataset, shards=[{**shards[0], "file": "../shard-00000.safetensors"}])
        with pytest.raises(ValueError, match=r"must be in the manifest's folder, got \.\./shard-00000"):
            TokenMaps.open(dataset)

    def test_other_schedule(self, dataset):
        """Tokens that do not fit the manifest's scales are not taken for others."""
        edit(dataset, patch_nums=[1, 2])
        with pytest.raises(ValueError, match=r"00000\.safetensors was altered: it must have uint16 tokens \[7, 5\] "):
            TokenMaps.open(dataset)

    def test_unfinished(self, dataset):
        edit(dataset, shards=None)
        with pytest.raises(
            ValueError, match="must be a finished dataset, got an unfinished one: run its command again"
        ):
            TokenMaps.open(dataset)

    @pytest.mark.parametrize(
        "left", [0, 5, 64, 128, -1], ids=lambda left: f"to {left} bytes" if left >= 0 else "by one"
    )
    def test_truncated(self, dataset, left):
        path = dataset / "shard-00002.safetensors"
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors was truncated or altered"):
            TokenMaps.open(dataset)

    def test_too_long(self, dataset):
        with (dataset / "shard-00002.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors was truncated or altered"):
            TokenMaps.open(dataset)

    def test_missing(self, dataset):
        (dataset / "shard-00007.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"shard-00007\.safetensors is missing from the dataset"):
            TokenMaps.open(dataset)

    @pytest.mark.parametrize("place", [-2, -14 * 2 * 7 - 4], ids=["tokens", "labels"])
    def test_altered(self, dataset, place):
        """One bit, which leaves every size and range as it was: found by the checksum alone."""
        path = dataset / "shard-00002.safetensors"
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        maps = TokenMaps.open(dataset)
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors was altered: its sha256 differs from the"):
            maps.verify()
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors was altered"):
            TokenMaps.open(dataset, verify=True)

    @pytest.mark.parametrize("label", [5, -1], ids=["beyond", "negative"])
    def test_label_beyond_the_classes(self, dataset, label):
        change(dataset / "shard-00003.safetensors", "labels", 4, label)
        with pytest.raises(ValueError, match=r"shard-00003\.safetensors must have labels in 0\.\.4, got "):
            TokenMaps.open(dataset)

    def test_token_beyond_the_vocabulary(self, dataset):
        path = dataset / "shard-00001.safetensors"
        change(path, "tokens", (3, 5), 100)
        shards = json.loads((dataset / "manifest.json").read_text())["shards"]
        shards[1]["sha256"] = file_sha256(path)
        edit(dataset, shards=shards)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors must have tokens below 100, got 100"):
            TokenMaps.open(dataset).verify()

    def test_whole_is_verified(self, dataset):
        seen = []
        TokenMaps.open(dataset).verify(after_shard=lambda: seen.append(1))
        assert len(seen) == 8
