"""Datasets of images: the VQ-VAE's own token maps, the same after any kill, with broken files skipped and named."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varkern.data import ImageFolder, Manifest, TokenMaps, encode_token_maps
from varkern.data.images import read_image

from ..helpers import small_vae
from .helpers import contents, count_calls, ended, fork, kill_at_random_calls, kill_before_changes

SIDES = (1, 2, 4)
SIZE = 8  # of an image, two resolutions above the last side
SETTINGS = {"batch_size": 3, "shard_size": 4, "workers": 2}
BROKEN = ["ant/04.png", "bird/07.png", "cat/00.png", "cat/01.png", "cat/02.png"]


@pytest.fixture(scope="module")
def vae():
    return small_vae(SIDES)


@pytest.fixture(autouse=True)
def one_thread():
    """What is compared byte for byte is summed in one order, in forked children too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFolder:
    """5 + 8 + 8 images of random sizes and forms; broken are a whole shard, and one of a batch with two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("ant", 5), ("bird", 8), ("cat", 8)):
        (root / name).mkdir()
        for number in range(count):
            colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            size = tuple(rng.integers(8, 20, 2).tolist())
            path = root / name / f"{number:02d}.{'jpg' if number % 4 == 1 and name != 'cat' else 'png'}"
            Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path)
    for name in BROKEN:
        (root / name).write_bytes((root / name).read_bytes()[:40])
    return ImageFolder.open(root)


def write(folder: Path, vae, images, **changes) -> Manifest | None:
    return encode_token_maps(folder, vae, images, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def unbroken(vae, images, tmp_path_factory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unbroken") / "maps"
    write(folder, vae, images)
    return contents(folder)


class TestEncoding:
    def test_tokens_are_those_of_the_vae(self, vae, images, unbroken, tmp_path):
        """Of each image by itself, from pixels brought to [-1, 1] in float64."""
        write(tmp_path, vae, images)
        maps = TokenMaps.open(tmp_path, verify=True)
        whole = [n for n, path in enumerate(images.paths) if path not in BROKEN]
        assert len(maps) == 16 and maps.labels.tolist() == [images.labels[n] for n in whole]
        different = 0
        for place, number in enumerate(whole):
            pixels = read_image(images.root / images.paths[number], SIZE).astype(np.float64)
            image = torch.from_numpy(2 * (pixels / 255) - 1).float()[None]
            wanted = torch.cat(vae.img_to_idxBl(image), 1)[0]
            different += (maps.gather([place])[0] != wanted).sum().item()
        assert different <= 2  # of 336: a code as near as another, by another batch's rounding

    def test_manifest(self, images, vae, tmp_path):
        manifest = write(tmp_path, vae, images, provenance={"vae": {"sha256": "12"}})
        assert manifest == Manifest.read(tmp_path)
        assert [shard.count for shard in manifest.shards] == [4, 3, 4, 0, 4, 1]
        assert manifest.skipped == BROKEN and manifest.count == 16 and manifest.total == 21
        assert manifest.source["classes"] == ["ant", "bird", "cat"] and manifest.num_classes == 3
        assert manifest.source["images_sha256"] == images.digest
        assert (manifest.source["size"], manifest.source["resize"]) == (SIZE, 1.125)
        assert manifest.source["vae"] == {"sha256": "12"}
        assert manifest.patch_nums == SIDES and manifest.vocabulary == 64

    @pytest.mark.parametrize("workers", [1, 5])
    def test_workers_change_nothing(self, vae, images, unbroken, tmp_path, workers):
        write(tmp_path, vae, images, workers=workers)
        assert contents(tmp_path) == unbroken

    def test_resize_counts(self, vae, images, unbroken, tmp_path):
        write(tmp_path, vae, images, resize=1.5)
        assert contents(tmp_path)["shard-00000.safetensors"] != unbroken["shard-00000.safetensors"]
        with pytest.raises(ValueError, match=r"source\.resize was 1\.5, now 1\.125"):
            write(tmp_path, vae, images)

    def test_a_changed_folder_is_another_setting(self, vae, tmp_path):
        for name in "ab":
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "images" / name / "0.png")
        write(tmp_path / "maps", vae, ImageFolder.open(tmp_path / "images"))
        Image.new("RGB", (19, 19)).save(tmp_path / "images" / "b" / "0.png")
        with pytest.raises(ValueError, match=r"source\.images_sha256"):
            write(tmp_path / "maps", vae, ImageFolder.open(tmp_path / "images"))

    def test_on_the_device(self, images, tmp_path, device):
        vae = small_vae(SIDES).to(device)
        manifest = write(tmp_path, vae, images)
        assert manifest.count == 16 and manifest.source["device"] == device.type

    def test_half_precision(self, images, tmp_path):
        manifest = write(tmp_path, small_vae(SIDES).bfloat16(), images)
        assert manifest.count == 16 and manifest.source["dtype"] == "bfloat16"


class TestKills:
    def test_before_random_changes_on_disk(self, vae, images, unbroken, tmp_path):
        folder = tmp_path / "maps"
        kills = kill_before_changes(lambda: write(folder, vae, images), folder, random.Random(5))
        assert kills >= 3 and contents(folder) == unbroken

    def test_at_random_moments(self, vae, images, unbroken, tmp_path):
        calls = count_calls(lambda: write(tmp_path / "once", vae, images))
        rng, kills, rounds = random.Random(6), 0, 0
        while kills < 7:
            folder, rounds = tmp_path / f"{rounds}", rounds + 1
            kills += kill_at_random_calls(lambda folder=folder: write(folder, vae, images), calls, rng)
            assert contents(folder) == unbroken

    def test_two_ranks(self, vae, images, unbroken, tmp_path):
        places = [{"RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
        assert all([ended(pid) for pid in [fork(lambda: write(tmp_path, vae, images), place) for place in places]])
        assert contents(tmp_path) == unbroken


class TestWrongInput:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"resize": 0.9}, r"resize must be a finite number >= 1, got 0\.9"),
            ({"resize": float("nan")}, "resize must be a finite number >= 1, got nan"),
            ({"resize": float("inf")}, "resize must be a finite number >= 1, got inf"),
            ({"workers": 0}, "workers must be an int >= 1, got 0"),
            ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ],
        ids=str,
    )
    def test_settings(self, vae, images, tmp_path, changes, said):
        with pytest.raises(ValueError, match=said):
            write(tmp_path / "maps", vae, images, **changes)
        assert not (tmp_path / "maps").exists()

    def test_all_broken(self, vae, tmp_path):
        (tmp_path / "images" / "a").mkdir(parents=True)
        (tmp_path / "images" / "a" / "0.png").touch()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"images must hold a readable image, but all 1 in .* are unreadable"):
                write(tmp_path / "maps", vae, ImageFolder.open(tmp_path / "images"))

    def test_an_image_that_went_away(self, vae, tmp_path):
        """Between listing and reading: an error that names it, and nothing is noted as done."""
        for number in range(3):
            (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a" / f"{number}.png")
        images = ImageFolder.open(tmp_path / "images")
        (tmp_path / "images" / "a" / "1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1\.png"):
            write(tmp_path / "maps", vae, images)
        assert not list((tmp_path / "maps").glob("*.safetensors"))
