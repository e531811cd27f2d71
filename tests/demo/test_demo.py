"""The demo: real digits, training that survives a kill, the shipped weights, and ``varkern demo`` from end to end."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import varkern
from varkern import cli
from varkern.data import TokenMaps, file_sha256
from varkern.demo import digits, run, train
from varkern.ops import use_backend
from varkern.training import loop
from varkern.training import scorer as scorer_training
from varkern.training.scorer import read_facts

TINY = train.Recipe(
    batch_size=4, vae_steps=15, var_steps=9, classifier_steps=6, scorer_epochs=0.6, real_maps=40, generated_maps=40
)
STAGES = ("vae", "var", "classifier", "scorer", "second")


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.75, PyTorch's bicubic."""
    a, t = -0.75, np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def resampled(image: np.ndarray, angle: float, scale: float, right: float, down: float) -> np.ndarray:
    """An 8x8 image in [-1, 1], turned by ``angle``, scaled and moved (in shares of its side), at 24x24, in float64."""
    at = (np.arange(24) + 0.5) / 12 - 1
    x, y = at[None, :], at[:, None]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    column = ((cos * x - sin * y + 2 * right) + 1) * 4 - 0.5
    row = ((sin * x + cos * y + 2 * down) + 1) * 4 - 0.5
    taps = np.arange(8)
    weights = cubic(row[..., None, None] - taps[:, None]) * cubic(column[..., None, None] - taps)
    return np.clip((weights * (image + 1)).sum((-2, -1)) - 1, -1, 1)


@pytest.fixture(scope="module", autouse=True)
def soon_restarted():
    """Unused codes start anew within the few steps of a tiny training, between the last checkpoint and the kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "STEPS_BETWEEN_RESTARTS", 10)
        yield


@pytest.fixture(scope="module")
def unbroken(soon_restarted, tmp_path_factory):
    """The weights of a tiny training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    with use_backend("torch"):
        train.train(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a small demo returned, and its picture."""
    out = tmp_path_factory.mktemp("demo") / "pictures" / "demo.png"
    with use_backend("torch"):
        return run.run(out, seed=3, m=4, num_per_class=2), out


class TestDigits:
    def test_originals(self):
        images, labels = digits.originals()
        assert images.shape == (1797, 1, 8, 8) and labels.shape == (1797,)
        assert images.min() == -1 and images.max() == 1
        assert sorted(labels.unique().tolist()) == list(range(10)) and labels.bincount().min() > 170

    def test_jitter_is_one_bicubic_affine_resampling(self):
        images = digits.originals()[0][:12]
        found = digits.jitter(images, torch.Generator().manual_seed(3))
        angles, scales, right, down = (2 * torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) - 1).tolist()
        expected = [
            resampled(image[0], math.radians(10 * angle), 0.9 + 0.06 * scale, 0.06 * x, 0.06 * y)
            for image, angle, scale, x, y in zip(images.double().numpy(), angles, scales, right, down, strict=True)
        ]
        assert found.shape == (12, 3, 24, 24) and found.dtype == torch.float32
        assert (found[:, 0] == found[:, 1]).all() and (found[:, 0] == found[:, 2]).all()
        torch.testing.assert_close(found[:, 0].double(), torch.from_numpy(np.stack(expected)), atol=2e-5, rtol=0)

    def test_jitter_keeps_its_range(self):
        images = digits.jitter(digits.originals()[0])
        assert images.min() >= -1 and images.max() <= 1

    def test_generator_fixes_a_batch(self):
        first, second, other = (digits.real_batch(20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert not torch.equal(first[0], other[0])

    def test_one_image(self):
        images, labels = digits.real_batch(1)
        assert images.shape == (1, 3, 24, 24) and labels.shape == (1,)


class TestTraining:
    def test_writes_weights_token_maps_and_nothing_else(self, unbroken):
        weights = [f"{name}.safetensors" for name in STAGES]
        wanted = sorted([*weights, "scorer.csv", "second.csv", "tokens"])
        assert sorted(path.name for path in unbroken.iterdir()) == wanted
        real, generated = (TokenMaps.open(unbroken / "tokens" / name, verify=True) for name in ("real", "generated"))
        assert len(real) == len(generated) == 40 and generated.manifest.source["seed"] == TINY.sampling_seed
        assert (generated.labels == np.arange(40) % 10).all() and len(set(real.labels.tolist())) > 5

    def test_the_second_scorer_is_on_top_of_the_first(self, unbroken):
        """Trained on maps that the first resampled, of other seeds, from other initial weights."""
        first, second = (varkern.Scorer.from_pretrained(unbroken / f"{name}.safetensors") for name in STAGES[3:])
        assert second.on_top_of == ("scorer.safetensors",) and first.on_top_of == ()
        resampled = TokenMaps.open(unbroken / "tokens" / "resampled", verify=True)
        source, search = resampled.manifest.source, varkern.BestOfM(first, m=16, pick="resample")
        assert source["search"] == repr(search) and source["seed"] == TINY.sampling_seed + 5
        model = varkern.load_var(unbroken / "var.safetensors", vae=unbroken / "vae.safetensors")
        seeds, labels = varkern.image_seeds(source["seed"], 40), torch.from_numpy(resampled.labels)
        wanted = varkern.generate(model, labels, search=search, seeds=seeds, top_k=0, **train.SAMPLING).tokens
        assert torch.equal(resampled.gather(range(40)), torch.cat(wanted, 1))
        settings = [read_facts(unbroken / f"{name}.safetensors")["settings"] for name in STAGES[3:]]
        assert [one["seed"] for one in settings] == [7, 57]

    def test_token_maps_of_real_digits(self, unbroken):
        """Those that the VQ-VAE gives for jittered digits, whose seed the dataset's own names."""
        maps = TokenMaps.open(unbroken / "tokens" / "real")
        images, labels = digits.real_batch(40, torch.Generator().manual_seed(maps.manifest.source["seed"] * 1_000_003))
        wanted = torch.cat(varkern.load_vae(unbroken / "vae.safetensors").img_to_idxBl(images), dim=1)
        assert torch.equal(maps.gather(range(40)), wanted) and maps.labels.tolist() == labels.tolist()

    def test_the_scorers_facts(self, unbroken):
        settings = read_facts(unbroken / "scorer.safetensors")["settings"]
        wanted = json.loads(json.dumps(asdict(TINY.scorer_training())))
        assert {name: settings[name] for name in wanted} == wanted | {"precision": "float32"}

    def test_weights_load(self, unbroken):
        var = varkern.load_var(unbroken / "var.safetensors", vae=unbroken / "vae.safetensors")
        scorer = varkern.Scorer.from_pretrained(unbroken / "scorer.safetensors")
        generation = varkern.generate(var, [1, 2], search=varkern.BestOfM(scorer, 2), seeds=0, **train.SAMPLING)
        assert generation.images.shape == (2, 3, 24, 24) and generation.images.isfinite().all()
        assert train.load_classifier(unbroken)(generation.images).shape == (2, 10)

    def test_done_stages_are_not_done_again(self, unbroken):
        times = [path.stat().st_mtime_ns for path in sorted(unbroken.iterdir())]
        train.train(unbroken, TINY)
        assert [path.stat().st_mtime_ns for path in sorted(unbroken.iterdir())] == times

    @pytest.mark.parametrize("stage", STAGES)
    def test_killed_training_ends_in_the_same_weights(self, unbroken, tmp_path, monkeypatch, stage):
        """Killed between two checkpoints of one stage, then run again: equal to the last bit."""
        for earlier in STAGES[: STAGES.index(stage)]:
            (tmp_path / f"{earlier}.safetensors").write_bytes((unbroken / f"{earlier}.safetensors").read_bytes())
        fit = loop.fit
        where = scorer_training if stage in ("scorer", "second") else train

        def killed(name, model, batch_loss, steps, **options):
            def loss(step):
                if step == steps * 2 // 3:
                    raise KeyboardInterrupt
                # The clock is set so that the last checkpoint lies some steps before the kill.
                monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0 if step <= steps // 3 else 1e9)
                return batch_loss(step)

            fit(name, model, loss, steps=steps, **options)

        monkeypatch.setattr(where, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path, TINY)
        assert (tmp_path / f"{stage}.checkpoint.pt").exists() and not (tmp_path / f"{stage}.safetensors").exists()
        monkeypatch.setattr(where, "fit", fit)
        monkeypatch.setattr(train, "STAGES", {stage: train.STAGES[stage]})
        train.train(tmp_path, TINY)
        expected, found = (load_file(folder / f"{stage}.safetensors") for folder in (unbroken, tmp_path))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    def test_seed_matters(self, unbroken, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "STAGES", {"classifier": train.train_classifier})
        train.train(tmp_path, replace(TINY, seed=1))
        first, second = (load_file(folder / "classifier.safetensors") for folder in (unbroken, tmp_path))
        assert not torch.equal(first["head.weight"], second["head.weight"])


class TestShippedWeights:
    def test_all_are_there_and_small(self):
        files = [run.WEIGHTS / f"{name}.safetensors" for name in STAGES]
        assert all(path.is_file() for path in files)
        assert sum(path.stat().st_size for path in files) < 8e6

    def test_the_second_scorer_is_on_top_of_the_shipped_first(self):
        told = read_facts(run.WEIGHTS / "second.safetensors")["data"]["generated"]
        sha256 = file_sha256(run.WEIGHTS / "scorer.safetensors")
        assert (told["scorers"], told["pick"]) == ([{"file": "scorer.safetensors", "sha256": sha256}], "resample")

    def test_models_are_of_the_full_sized_classes(self):
        model, scorer = run.load_demo()
        assert type(model) is varkern.models.VAR and type(model.vae_proxy[0]) is varkern.models.VQVAE
        assert type(scorer) is varkern.Scorer
        assert model.patch_nums == (1, 2, 3, 4, 6) and model.V == 256 and model.Cvae == 16

    def test_generated_digits_are_read_as_their_class(self):
        """The model alone, 200 digits: the classifier agrees on most. Chance would be 20 of them."""
        model, _ = run.load_demo()
        labels = torch.arange(200) % 10
        images = varkern.generate(model, labels, seeds=11, **train.SAMPLING).images
        guessed = train.load_classifier(run.WEIGHTS)(images * 2 - 1).argmax(1)
        assert (guessed == labels).float().mean() > 0.9


class TestDemo:
    def test_images_are_those_of_generate(self, results):
        model, scorer = run.load_demo()
        labels = torch.arange(10).repeat_interleave(2)
        searches = [None, varkern.BestOfM(scorer, 4), varkern.BestOfM(scorer, 4, pick="resample")]
        searches.append(varkern.BlockResample(scorer, 4, proposals=4))
        for result, search in zip(results[0], searches, strict=True):
            expected = varkern.generate(model, labels, search=search, seeds=3, **train.SAMPLING)
            torch.testing.assert_close(result.images.flatten(0, 1), expected.images, atol=1e-5, rtol=0)

    def test_scores_are_those_of_the_kept_candidates(self):
        """Scoring finished images gives what the search itself thought of the last scale's candidate that it kept."""
        model, scorer = run.load_demo()
        labels = torch.arange(10)
        generation = varkern.generate(model, labels, search=varkern.BestOfM(scorer, 4), seeds=3, **train.SAMPLING)
        found = run.score_images(model, scorer, labels, generation.tokens)
        torch.testing.assert_close(found, generation.scores[-1].max(1).values, atol=1e-3, rtol=1e-4)

    def test_search_raises_the_score(self, results):
        alone, *searched = (result.scores.mean() for result in results[0])
        assert len(searched) == 3 and all(score > alone for score in searched)

    def test_picture_shows_every_image(self, results):
        """Every generated image stands in the picture, enlarged, row by row."""
        runs, out = results
        picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
        for result in runs:
            for image in result.images.flatten(0, 1)[::7]:
                wanted = (image * 255).round().permute(1, 2, 0).numpy().astype(int).repeat(3, 0).repeat(3, 1)
                assert appears(picture, wanted)

    def test_command(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["demo", "--m", "2", "--num-per-class", "1"]) == 0
        captured = capsys.readouterr()
        assert (
            "wrote demo.png" in captured.out
            and "M=2 greedy" in captured.out
            and "M=2 blocks" in captured.out
            and not captured.err
        )
        rows = [line.split("│")[1].strip() for line in captured.out.splitlines() if line.startswith("│")]
        assert rows == [*map(str, range(10)), "all", "seconds"]
        assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]

    def test_sample_from_the_shipped_models(self, tmp_path):
        """``--var demo`` brings its VQ-VAE and its scorer."""
        assert cli.main(["sample", "--var", "demo", "--classes", "0-9", "--cfg", "0", "--out", str(tmp_path)]) == 0
        assert len(list(tmp_path.glob("0*.png"))) == 10


def appears(picture: np.ndarray, wanted: np.ndarray) -> bool:
    """True if ``wanted`` is a part of ``picture``, to one level of grey."""
    height, width = wanted.shape[:2]
    possible = np.ones((picture.shape[0] - height + 1, picture.shape[1] - width + 1), bool)
    for row in range(1, height, 9):  # some pixels leave few places, and those are compared whole
        for column in range(1, width, 9):
            there = picture[row : row + possible.shape[0], column : column + possible.shape[1], 0]
            possible &= np.abs(there - wanted[row, column, 0]) <= 1
    places = [picture[row : row + height, column : column + width] for row, column in np.argwhere(possible)]
    return any(np.abs(place - wanted).max() <= 1 for place in places)
