"""Token maps in the files of LSRS' own code: there and back, and what is refused."""

import errno
import pickle

import pytest
import torch

from varkern.data import TokenMaps, export_token_maps, import_token_maps

SIDES, LENGTH, VOCABULARY = (1, 2, 4), 21, 4096
COUNTS = (5, 0, 13, 1)


def maps_of(counts=COUNTS, dtype=torch.int16, high=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(high, (count, LENGTH), generator=generator).to(dtype) for count in counts]


def written(path, classes):
    torch.save(classes, path)
    return path


def imported(tmp_path, classes, name="maps", **changes):
    options = {"patch_nums": SIDES, "vocabulary": VOCABULARY, "batch_size": 3, "shard_size": 7} | changes
    import_token_maps(tmp_path / name, written(tmp_path / f"{name}.pth", classes), **options)
    return TokenMaps.open(tmp_path / name, verify=True)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_import(dtype, tmp_path):
    """Samples are int16 there and real maps int64; a class is where its tensor stands in the list."""
    classes = maps_of(dtype=dtype)
    maps = imported(tmp_path, classes)
    assert maps.labels.tolist() == [0] * 5 + [2] * 13 + [3]
    assert torch.equal(maps.gather(range(19)), torch.cat(classes).long())
    manifest = maps.manifest
    assert (manifest.num_classes, manifest.vocabulary, manifest.patch_nums, manifest.total) == (4, 4096, SIDES, 19)
    assert manifest.source["file"] == "maps.pth" and manifest.source["per_class"] == list(COUNTS)
    assert len(manifest.source["sha256"]) == 64 and len(manifest.shards) == 3


def test_views_of_one_tensor(tmp_path):
    """As their sampling saves them: a column each of one tensor ``[n, classes, L]``."""
    whole = torch.randint(VOCABULARY, (6, 3, LENGTH)).to(torch.int16)
    maps = imported(tmp_path, [whole[:, label] for label in range(3)])
    assert torch.equal(maps.gather(range(18)), whole.transpose(0, 1).reshape(18, LENGTH).long())
    assert maps.manifest.source["per_class"] == 6


def test_a_class_without_images_may_be_an_empty_list(tmp_path):
    classes = maps_of()
    classes[1] = []
    assert imported(tmp_path, classes).labels.tolist() == [0] * 5 + [2] * 13 + [3]


def test_old_files_that_cannot_be_mapped(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(maps_of(), path, _use_new_zipfile_serialization=False)
    import_token_maps(tmp_path / "maps", path, patch_nums=SIDES, vocabulary=VOCABULARY)
    assert torch.equal(TokenMaps.open(tmp_path / "maps").gather(range(19)), torch.cat(maps_of()).long())


@pytest.mark.parametrize("vocabulary, dtype", [(4096, torch.int16), (32768, torch.int16), (32769, torch.int32)])
def test_there_and_back(vocabulary, dtype, tmp_path):
    classes = maps_of(dtype=torch.int64, high=vocabulary)
    classes[0][0, 0] = vocabulary - 1
    maps = imported(tmp_path, classes, vocabulary=vocabulary)
    assert export_token_maps(maps, tmp_path / "back.pth") == list(COUNTS)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert type(back) is list and [b.dtype for b in back] == [dtype] * 4
    assert all(torch.equal(a, b.long()) for a, b in zip(classes, back, strict=True))
    # Each tensor of the file holds its own rows alone, so that a class can be read without the others.
    assert all(b.untyped_storage().nbytes() == b.numel() * b.element_size() for b in back)
    again = imported(tmp_path, back, "again", vocabulary=vocabulary)
    assert torch.equal(again.gather(range(19)), maps.gather(range(19)))
    assert again.labels.tolist() == maps.labels.tolist()


def test_a_dataset_of_mixed_order(tmp_path):
    """Exported by class, each class in the dataset's order."""
    from tests.training.small import write_maps

    labels, tokens = torch.tensor([2, 0, 2, 1, 0]), torch.randint(64, (5, LENGTH))
    export_token_maps(write_maps(tmp_path / "maps", labels, tokens), tmp_path / "file.pth")
    for label, found in enumerate(torch.load(tmp_path / "file.pth", weights_only=True)):
        assert torch.equal(found.long(), tokens[labels == label])


class Refusal:
    def __reduce__(self):
        return print, ("unpickled",)


WRONG = {
    "no list": ({"a": torch.zeros(1, LENGTH).long()}, "must hold a list with one tensor per class, got dict"),
    "nothing": ([], "must hold a list with one tensor per class, got list"),
    "floats": ([torch.zeros(2, LENGTH)], r"integers \[n, 21\] for class 0, got torch.float32 of shape \[2, 21\]"),
    "three dimensions": ([torch.zeros(2, 1, LENGTH).long()], r"for class 0, got torch.int64 of shape \[2, 1, 21\]"),
    "a number": ([torch.zeros(2, LENGTH).long(), 3], "for class 1, got int"),
    "other scales": ([torch.zeros(2, 30).long()], r"patch_nums must have .* class 0 in .*, 30, got 21"),
    "no image": (maps_of((0, 0)), "must hold token maps, got 2 classes without any"),
    "a token beyond": ([torch.full((2, LENGTH), 4096)], r"tokens must be in 0..4095, got 4096..4096"),
    "a negative token": ([torch.full((2, LENGTH), -1).short()], r"tokens must be in 0..4095, got -1..-1"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_other_files_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, content)


def test_nothing_is_unpickled(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps([Refusal()], protocol=2))
    torch.save([Refusal()], tmp_path / "new.pth")
    for name in ("bad.pth", "new.pth"):
        with pytest.raises(ValueError, match="is not a file of tensors"):
            import_token_maps(tmp_path / "maps", tmp_path / name, patch_nums=SIDES, vocabulary=64)
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match=r"path must be a file of token maps, got .*, which does not exist"):
        import_token_maps(tmp_path / "maps", tmp_path / "none.pth", patch_nums=SIDES, vocabulary=64)


def test_a_file_that_is_there_is_kept(tmp_path):
    maps, path = imported(tmp_path, maps_of()), tmp_path / "maps.pth"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out must be a new file, got .*maps\.pth, which exists"):
        export_token_maps(maps, path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    maps = imported(tmp_path, maps_of())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device, while writing .*back\.pth"):
        export_token_maps(maps, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()
