"""Datasets of what a model draws: the model's own draws, from seeds of their own, the same after any kill."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import varkern
from varkern.data import DATASET_SEED, Manifest, TokenMaps, generate_token_maps, generation
from varkern.ops.backend import use_backend

from ..helpers import TINY_SIDES, on, recorded, small_var
from .helpers import contents, count_calls, ended, fork, kill_at_random_calls, kill_before_changes

SETTINGS = {"per_class": 3, "batch_size": 2, "shard_size": 5, "seed": 77, "top_k": 30, "top_p": 0.9}
NUM_CLASSES = 4
TOTAL = 12


@pytest.fixture(scope="module")
def model():
    return small_var(TINY_SIDES[:3], num_classes=NUM_CLASSES, depth=1)


@pytest.fixture(autouse=True)
def one_thread():
    """What is compared byte for byte is summed in one order, in forked children too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mean_feature(labels, features, scale):
    return features.mean((-3, -2, -1))


def write(folder: Path, model, **changes) -> Manifest | None:
    return generate_token_maps(folder, model, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unbroken") / "maps"
    with use_backend("torch"):
        write(folder, model)
    return contents(folder)


class TestGenerating:
    def test_tokens_are_those_of_generate(self, model, tmp_path):
        """Image n has class n % classes and seed n; every option reaches the generation."""
        write(tmp_path, model, cfg=2.5)
        maps = TokenMaps.open(tmp_path, verify=True)
        assert maps.labels.tolist() == [0, 1, 2, 3] * 3
        assert maps.manifest.patch_nums == TINY_SIDES[:3] and maps.manifest.vocabulary == 64
        seeds = varkern.image_seeds(77, TOTAL)
        for part in [range(0, 2), range(4, 5), range(7, 9), range(10, 12)]:
            labels = torch.tensor(part) % NUM_CLASSES
            wanted = varkern.generate(model, labels, seeds=seeds[part], cfg=2.5, top_k=30, top_p=0.9).tokens
            for found, tokens in zip(maps.split(maps.gather(part)), wanted, strict=True):
                assert torch.equal(found, tokens)

    @pytest.mark.parametrize(
        "change", [{"cfg": 0.0}, {"top_k": 2}, {"top_p": 0.2}, {"seed": 78}, {"more_smooth": True}], ids=str
    )
    def test_every_setting_counts(self, model, unbroken, tmp_path, change):
        """In the tokens, and in the manifest by its name."""
        write(tmp_path, model, **change)
        found = contents(tmp_path)
        assert any(found[name] != unbroken[name] for name in found if name.startswith("shard"))
        ((name, value),) = change.items()
        assert json.loads(found["manifest.json"])["source"][name] == value

    def test_autocast(self, model, unbroken, tmp_path):
        write(tmp_path, model, autocast=torch.bfloat16)
        manifest = Manifest.read(tmp_path)
        assert manifest.source["autocast"] == "bfloat16" and manifest.source["dtype"] == "float32"
        assert contents(tmp_path)["shard-00000.safetensors"] != unbroken["shard-00000.safetensors"]

    def test_defaults_are_the_published_sampling(self, model, tmp_path):
        generate_token_maps(tmp_path, model, per_class=1)
        told = Manifest.read(tmp_path).source
        assert (told["cfg"], told["top_k"], told["top_p"], told["autocast"]) == (1.5, 900, 0.96, None)
        assert told["seed"] == DATASET_SEED and told["seeds"] == [0, NUM_CLASSES] and told["classes"] == [0, 1, 2, 3]

    def test_seeds_are_not_those_of_evaluation(self):
        """100,000 images of a dataset share no seed with 100,000 of a sampling from 0."""
        dataset, evaluation = (varkern.image_seeds(seed, 100_000).numpy() for seed in (DATASET_SEED, 0))
        assert not np.isin(dataset, evaluation).any()

    def test_some_classes(self, model, tmp_path):
        write(tmp_path, model, classes=[3, 1])
        maps = TokenMaps.open(tmp_path)
        assert maps.labels.tolist() == [3, 1] * 3 and maps.manifest.num_classes == NUM_CLASSES
        assert maps.manifest.source["classes"] == [3, 1]

    def test_a_smaller_one_is_the_beginning_of_a_larger(self, model, unbroken, tmp_path):
        write(tmp_path, model, per_class=5)
        found = contents(tmp_path)
        assert all(found[name] == unbroken[name] for name in ("shard-00000.safetensors", "shard-00001.safetensors"))

    @pytest.mark.parametrize("kind", [varkern.BestOfM, varkern.BlockResample], ids=lambda kind: kind.__name__)
    def test_maps_of_a_search(self, model, unbroken, tmp_path, kind):
        search = kind(mean_feature, m=4, first_scale=0, pick="resample", temperature=0.02)
        write(tmp_path, model, search=search)
        maps = TokenMaps.open(tmp_path)
        total = len(maps)
        labels, seeds = torch.arange(total) % NUM_CLASSES, varkern.image_seeds(SETTINGS["seed"], total)
        sampling = {name: SETTINGS[name] for name in ("cfg", "top_k", "top_p") if name in SETTINGS}
        part = list(range(SETTINGS["batch_size"]))
        wanted = varkern.generate(model, labels[part], search=search, seeds=seeds[part], **sampling).tokens
        assert torch.equal(maps.gather(part), torch.cat(wanted, 1))
        assert maps.manifest.source["search"] == repr(search)
        assert contents(tmp_path)["shard-00000.safetensors"] != unbroken["shard-00000.safetensors"]
        for other in (None, kind(mean_feature, m=5, first_scale=0, pick="resample", temperature=0.02)):
            with pytest.raises(ValueError, match=r"other settings \(source.search was .*choose another folder"):
                write(tmp_path, model, search=other)

    def test_without_a_search_none_is_recorded(self, unbroken):
        assert "search" not in json.loads(unbroken["manifest.json"])["source"]

    def test_a_search_that_does_not_fit(self, model, tmp_path):
        with pytest.raises(TypeError, match="search must be a search"):
            write(tmp_path / "a", model, search=3)
        with pytest.raises(ValueError, match="first_scale must be < "):
            write(tmp_path / "a", model, search=varkern.BestOfM(mean_feature, first_scale=99))
        assert not (tmp_path / "a").exists()

    def test_a_patched_model_draws_its_own_maps(self, model, unbroken, tmp_path):
        """The model's distribution is what the scorer is to learn, whatever search is patched in."""
        search = varkern.BestOfM(mean_feature, m=4, first_scale=0)
        with varkern.patched(model, search):
            write(tmp_path, model)
        assert contents(tmp_path) == unbroken

    def test_images_are_left_out_and_change_nothing(self, model, unbroken, tmp_path, monkeypatch):
        """No decoder runs; a dataset made with every image decoded has the same bytes."""
        with recorded(model.vae_proxy[0].decoder) as decoded:
            write(tmp_path / "without", model)
            assert not decoded
            monkeypatch.setattr(generation, "generate", lambda *a, **o: varkern.generate(*a, **{**o, "decode": True}))
            write(tmp_path / "with", model)
            assert len(decoded) == 7  # 12 images in shards of 5, two at a time
        assert contents(tmp_path / "without") == contents(tmp_path / "with") == unbroken

    def test_provenance(self, model, tmp_path):
        write(tmp_path, model, provenance={"var": {"file": "a.pth", "sha256": "12"}})
        assert Manifest.read(tmp_path).source["var"] == {"file": "a.pth", "sha256": "12"}
        with pytest.raises(ValueError, match=r"source\.var\.sha256 was '12', now '13'"):
            write(tmp_path, model, provenance={"var": {"file": "a.pth", "sha256": "13"}})

    def test_on_the_device(self, tmp_path, device, quick_backend):
        """The same maps there as generate's, and a manifest that says where they were made."""
        model = on(small_var(TINY_SIDES[:3], num_classes=NUM_CLASSES, depth=1), device)
        with use_backend(quick_backend):
            write(tmp_path, model)
            wanted = varkern.generate(model, [0, 1], seeds=varkern.image_seeds(77, 2), top_k=30, top_p=0.9).tokens
        maps = TokenMaps.open(tmp_path)
        assert torch.equal(maps.gather([0, 1]), torch.cat(wanted, 1).cpu())
        assert maps.manifest.source["device"] == device.type


class TestKills:
    def test_before_random_changes_on_disk(self, model, unbroken, tmp_path):
        kills = kill_before_changes(lambda: write(tmp_path / "maps", model), tmp_path / "maps", random.Random(3))
        assert kills >= 3 and contents(tmp_path / "maps") == unbroken

    def test_at_random_moments(self, model, unbroken, tmp_path):
        calls = count_calls(lambda: write(tmp_path / "once", model))
        rng, kills, rounds = random.Random(4), 0, 0
        while kills < 7:
            folder, rounds = tmp_path / f"{rounds}", rounds + 1
            kills += kill_at_random_calls(lambda folder=folder: write(folder, model), calls, rng)
            assert contents(folder) == unbroken

    def test_two_ranks(self, model, unbroken, tmp_path):
        places = [{"RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
        assert all([ended(pid) for pid in [fork(lambda: write(tmp_path, model), place) for place in places]])
        assert contents(tmp_path) == unbroken


class TestWrongInput:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"per_class": 0}, "per_class must be an int >= 1, got 0"),
            ({"per_class": 1.5}, "per_class must be an int >= 1, got 1.5"),
            ({"classes": []}, "classes must hold at least one class, got none"),
            ({"classes": [1, 4]}, r"classes must be in 0\.\.3, got 4"),
            ({"classes": [-1]}, r"classes must be in 0\.\.3, got -1"),
            ({"classes": [1, 2, 1]}, "classes must differ, got 1 twice"),
            ({"top_k": -1}, "top_k must be an int >= 0, got -1"),
            ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
            ({"cfg": float("nan")}, "cfg must be a finite number"),
            ({"colour": 3}, "colour"),
            ({"seed": 2**64}, r"seed must be < 2\*\*64"),
            ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
            ({"shard_size": 0}, "shard_size must be an int >= 1, got 0"),
        ],
        ids=str,
    )
    def test_settings(self, model, tmp_path, changes, said):
        with pytest.raises(ValueError, match=said):
            write(tmp_path / "maps", model, **changes)
        assert not (tmp_path / "maps").exists()

    def test_no_model(self, tmp_path):
        with pytest.raises(varkern.UnsupportedModelError):
            write(tmp_path, torch.nn.Linear(1, 1))

    def test_vocabulary_too_large(self, tmp_path):
        """65,537 codes do not fit a uint16, which is told before any work."""
        from ..helpers import small_vae

        model = small_var((1, 2), vae=small_vae((1, 2), vocab_size=65537), depth=1, embed_dim=2, num_heads=1)
        with pytest.raises(ValueError, match=r"vocabulary must be at most 65536, .* got 65537"):
            write(tmp_path / "maps", model)
        assert not (tmp_path / "maps").exists()
