"""``varkern sample``: what it writes, and that it goes on where it stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import varkern
from varkern.scorer import Scorer, ScorerConfig
from varkern.studies import sampling

from .conftest import SCORER


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """The images of a folder by file name, without the sheet."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: int = 0) -> bool:
    return first.keys() == second.keys() and all(
        np.abs(first[name].astype(int) - second[name]).max() <= tolerance for name in first
    )


class TestSample:
    def test_files(self, command, weights, tmp_path, capsys):
        assert command() == 0
        out = tmp_path / "out"
        assert sorted(path.name for path in out.iterdir()) == [
            "000000-class0003-seed5.png",
            "000001-class0003-seed5.png",
            "000002-class0003-seed5.png",
            "000003-class0007-seed5.png",
            "000004-class0007-seed5.png",
            "000005-class0007-seed5.png",
            "settings.json",
            "sheet.png",
        ]
        assert json.loads((out / "settings.json").read_text())["classes"] == [3, 7]
        output = capsys.readouterr().out
        assert str(out / "sheet.png") in output.replace("\n", "") and "6 images" in output

    def test_images_are_those_of_generate(self, command, weights, tmp_path):
        """Every option reaches the generation, and image n has seed n of image_seeds(seed, total)."""
        command(cfg=2.5, top_k=20, top_p=0.8, pick="resample", temperature=0.001, first_scale=0, last_scale=1)
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        search = varkern.BestOfM(
            Scorer.from_pretrained(weights / "scorer.safetensors"), 3, 0, 1, "resample", temperature=0.001
        )
        labels = torch.tensor([3, 3, 3, 7, 7, 7])
        seeds = varkern.image_seeds(5, 6)
        expected = varkern.generate(model, labels, search=search, seeds=seeds, cfg=2.5, top_k=20, top_p=0.8).images
        expected = (expected.double() * 255).permute(0, 2, 3, 1).numpy()
        found = np.stack(list(pixels(tmp_path / "out").values()))
        assert (
            np.abs(found - expected).max() <= 0.51
        )  # half a level from rounding; batches of 4 and 6 differ in the last bit

    def test_blocks(self, command, weights, tmp_path):
        """With proposals the search improves a map block by block, by resampling unless another pick is asked for."""
        command(proposals=2, sweeps=2, m=3, first_scale=2)
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        scorer = Scorer.from_pretrained(weights / "scorer.safetensors")
        search = varkern.BlockResample(scorer, 3, 2, sweeps=2, first_scale=2)
        labels, seeds = torch.tensor([3, 3, 3, 7, 7, 7]), varkern.image_seeds(5, 6)
        told = json.loads((tmp_path / "out" / "settings.json").read_text())
        assert (told["proposals"], told["sweeps"], told["pick"]) == (2, 2, "resample")
        options = {name: told[name] for name in ("cfg", "top_k", "top_p")}
        expected = varkern.generate(model, labels, search=search, seeds=seeds, **options).images
        expected = (expected.double() * 255).permute(0, 2, 3, 1).numpy()
        found = np.stack(list(pixels(tmp_path / "out").values()))
        assert np.abs(found - expected).max() <= 0.51

    @pytest.mark.parametrize(
        "options, named",
        [
            ({"proposals": 2, "scorer": None, "m": None}, "proposals must be 0 without a scorer, got 2: give --scorer"),
            ({"proposals": -1}, "proposals must be an int >= 0, got -1"),
            ({"proposals": 2, "sweeps": 0}, "sweeps must be an int >= 1, got 0"),
            ({"sweeps": 0}, "sweeps must be >= 1, got 0"),
            ({"proposals": 2, "pick": "2"}, "pick must be one of 'best', 'resample', got 2"),
            ({"proposals": 2, "m": "1,2,2"}, "m must be an int >= 1, got [1, 2, 2]"),
        ],
        ids=str,
    )
    def test_wrong_blocks(self, command, tmp_path, one_line, options, named):
        assert command(**options) == 2 and named in one_line()
        assert not list((tmp_path / "out").glob("*"))

    def test_two_scorers(self, command, weights, scorer_on_top, tmp_path):
        scorers = [weights / "scorer.safetensors", scorer_on_top]
        options = {"pick": "resample", "temperature": 0.01}
        assert command(scorer=scorers, **options) == 0
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        search = varkern.BestOfM(varkern.SumOfScorers(*map(Scorer.from_pretrained, scorers)), 3, **options)
        sampling = {"seeds": varkern.image_seeds(5, 6), "cfg": 1.5, "top_k": 900, "top_p": 0.96}
        wanted = varkern.generate(model, torch.tensor([3, 3, 3, 7, 7, 7]), search=search, **sampling).images
        wanted = (wanted.double() * 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(list(pixels(tmp_path / "out").values())) - wanted).max() <= 0.51
        settings = json.loads((tmp_path / "out" / "settings.json").read_text())["scorer"]
        assert [Path(scorer["path"]).name for scorer in settings] == ["scorer.safetensors", "on-top.safetensors"]
        assert command(scorer=scorers[:1], **options) == 2

    def test_fitted_temperatures(self, command, second_scorer, tmp_path, one_line):
        options = {"scorer": second_scorer, "pick": "resample"}
        assert command(**options, temperature="fitted") == 2
        assert "temperature='fitted' needs a scorer whose file has fitted temperatures" in one_line()
        scorer = Scorer.from_pretrained(second_scorer)
        scorer.save_pretrained(second_scorer, {"temperatures": "[0.01, 0.01, 0.01]"})
        assert command(tmp_path / "a", **options, temperature="fitted") == 0
        assert command(tmp_path / "b", **options, temperature="0.01") == 0
        assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
        assert command(tmp_path / "c", **options, temperature="warm") == 2
        assert one_line() == "varkern: temperature must be a finite number > 0, got 'warm'"

    def test_a_further_scorer_must_be_trained_on_top(self, command, scorer_on_top, second_scorer, tmp_path, one_line):
        assert command(scorer=[scorer_on_top, second_scorer], m=2) == 2
        assert "each must be trained on top of those before it, but second.safetensors was trained by" in one_line()
        assert not (tmp_path / "out").exists()

    def test_no_image_twice(self, command, tmp_path):
        """The seeds of a second batch are not those of the first."""
        command(classes="3", num_per_class=8, batch_size=2)
        images = {image.tobytes() for image in pixels(tmp_path / "out").values()}
        assert len(images) == 8

    def test_batch_size_changes_no_image(self, command, tmp_path):
        command(tmp_path / "a", batch_size=1)
        command(tmp_path / "b", batch_size=5)
        assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"), tolerance=1)

    def test_more_images_keep_the_first(self, command, tmp_path):
        command(tmp_path / "a", classes="3", num_per_class=2)
        command(tmp_path / "b", classes="3", num_per_class=5)
        longer = pixels(tmp_path / "b")
        assert same(pixels(tmp_path / "a"), {name: longer[name] for name in list(longer)[:2]}, tolerance=1)

    @pytest.mark.parametrize(
        "options",
        [
            {"autocast": "bfloat16"},
            {"dtype": "bfloat16"},
            {"m": "1,2,3"},
            {"pick": "2"},
            {"scorer": None, "m": None},
            {"scorer": None, "m": 1},
            {"m": None},
            {"classes": "0-2,11"},
            {"cfg": 0.0, "top_k": 0, "top_p": 0.0},
        ],
        ids=str,
    )
    def test_options(self, command, tmp_path, options):
        assert command(**options, num_per_class=1) == 0
        images = np.stack(list(pixels(tmp_path / "out").values()))
        assert images.shape[1:] == (8, 8, 3) and images.std() > 0

    def test_default_m(self, command, tmp_path):
        """Four candidates with a scorer, one without."""
        command(tmp_path / "a", m=None, num_per_class=1)
        command(tmp_path / "b", m=None, scorer=None, num_per_class=1)
        assert [json.loads((tmp_path / name / "settings.json").read_text())["m"] for name in "ab"] == [4, 1]


class TestArray:
    """``--npz``: the published suite's form."""

    def test_holds_the_images(self, command, tmp_path, capsys):
        assert command(npz=tmp_path / "below" / "all.npz") == 0
        found = np.load(tmp_path / "below" / "all.npz", allow_pickle=False)
        assert found.files == ["arr_0"] and found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], np.stack(list(pixels(tmp_path / "out").values())))
        error = capsys.readouterr().err
        assert "varkern: warning:" in error and "6 images: published figures use 50,000" in error

    def test_batches_keep_their_order(self, command, tmp_path):
        assert command() == 0
        paths = sorted((tmp_path / "out").glob("0*.png"))
        sampling.pack(paths, tmp_path / "all.npz", batch_size=4)
        assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], np.stack([Image.open(path) for path in paths]))

    def test_a_killed_packing_is_made_up_for(self, command, tmp_path, monkeypatch):
        """No file of that name before it is whole; started again, no image is generated again."""
        whole = sampling.write_array

        def killed(path, count, size, batches):
            next(batches)
            raise KeyboardInterrupt

        monkeypatch.setattr(sampling, "write_array", killed)
        assert command(npz=tmp_path / "all.npz") == 130
        assert not (tmp_path / "all.npz").exists() and len(pixels(tmp_path / "out")) == 6
        monkeypatch.setattr(sampling, "write_array", whole)
        monkeypatch.setattr(sampling, "generate", None)
        assert command(npz=tmp_path / "all.npz") == 0
        assert len(np.load(tmp_path / "all.npz")["arr_0"]) == 6

    def test_may_be_asked_for_later(self, command, tmp_path):
        assert command() == 0
        assert command(npz=tmp_path / "all.npz") == 0
        assert (tmp_path / "all.npz").exists()

    def test_repeated_images_are_told(self, command, tmp_path, monkeypatch, capsys):
        whole = sampling.generate
        monkeypatch.setattr(
            sampling, "generate", lambda model, labels, **options: whole(model, labels * 0, **options | {"seeds": 1})
        )
        assert command(npz=tmp_path / "all.npz", batch_size=3, m=1, scorer=None) == 0
        error = capsys.readouterr().err
        assert "3 of the 6 images" in error and "000003-class0007-seed5.png of 000000-class0003-seed5.png" in error

    @pytest.mark.parametrize("name, named", [("all.npy", "npz must end in .npz"), ("folder.npz", "npz must be a file")])
    def test_wrong_place(self, command, tmp_path, one_line, name, named):
        (tmp_path / "folder.npz").mkdir()
        assert command(npz=tmp_path / name) == 2
        assert named in one_line()
        assert not (tmp_path / "out").exists()


class TestResume:
    @pytest.fixture
    def interrupt(self, monkeypatch):
        """Makes the n-th batch of a run end as Ctrl-C would, and gives the sizes of the batches that were begun."""

        def at(batch: int) -> list[int]:
            sizes, whole = [], sampling.generate

            def generate(model, labels, **options):
                sizes.append(len(labels))
                if len(sizes) == batch:
                    monkeypatch.setattr(sampling, "generate", whole)
                    raise KeyboardInterrupt
                return whole(model, labels, **options)

            monkeypatch.setattr(sampling, "generate", generate)
            return sizes

        return at

    @pytest.mark.parametrize("sampler", ["philox", "multinomial"])
    def test_goes_on_where_it_stopped(self, command, interrupt, tmp_path, capsys, sampler, one_line):
        command(tmp_path / "whole", sampler=sampler, batch_size=2)
        capsys.readouterr()
        interrupt(2)
        out = tmp_path / "broken"
        assert command(out, sampler=sampler, batch_size=2) == 130
        assert one_line() == "varkern: interrupted"
        assert len(pixels(out)) == 2 and not (out / "sheet.png").exists()
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
        sizes = interrupt(100)
        assert command(out, sampler=sampler, batch_size=2) == 0
        assert sizes == [2, 2]
        assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
        assert same(pixels(out), pixels(tmp_path / "whole"))
        assert (out / "sheet.png").read_bytes() == (tmp_path / "whole" / "sheet.png").read_bytes()

    def test_multinomial_makes_whole_batches_again(self, command, tmp_path):
        """There an image depends on its batch, so a lost one comes back only with its batch."""
        command(sampler="multinomial", batch_size=4)
        out = tmp_path / "out"
        before = pixels(out)
        for name in list(before)[1:6:4]:
            (out / name).unlink()
        assert command(sampler="multinomial", batch_size=4) == 0
        assert same(pixels(out), before)

    def test_half_written_image_is_made_again(self, command, tmp_path, monkeypatch):
        """A kill while a file is written leaves no file under the image's own name."""
        save = Image.Image.save

        def killed(self, target, *args, **kwargs):
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", killed)
        assert command() == 130
        assert not pixels(tmp_path / "out")
        monkeypatch.setattr(Image.Image, "save", save)
        assert command() == 0
        assert len(pixels(tmp_path / "out")) == 6

    @pytest.mark.parametrize(
        "options, named",
        [
            ({"seed": 6}, "seed was 5, now 6"),
            ({"m": 2}, "m was 3, now 2"),
            ({"classes": "3,8"}, "classes was [3, 7], now [3, 8]"),
            ({"cfg": 1.0}, "cfg"),
            ({"top_k": 3}, "top_k"),
            ({"autocast": "bfloat16"}, "autocast"),
            ({"sampler": "multinomial"}, "sampler"),
            ({"scorer": None, "m": 1}, "scorer"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused(self, command, tmp_path, capsys, options, named, one_line):
        out = tmp_path / "out"
        out.mkdir()
        command()
        before = pixels(out)
        capsys.readouterr()
        assert command(**options) == 2
        line = one_line()
        assert "other settings" in line and named in line
        assert same(pixels(out), before)

    def test_batch_size_is_a_setting_of_multinomial_only(self, command, tmp_path):
        assert command(tmp_path / "a", batch_size=2) == command(tmp_path / "a", batch_size=3) == 0
        assert command(tmp_path / "b", batch_size=2, sampler="multinomial") == 0
        assert command(tmp_path / "b", batch_size=3, sampler="multinomial") == 2

    def test_changed_checkpoint_is_another_setting(self, command, weights, tmp_path, capsys):
        copy = tmp_path / "scorer.safetensors"
        copy.write_bytes((weights / "scorer.safetensors").read_bytes())
        assert command(scorer=copy) == 0
        Scorer(ScorerConfig(**SCORER, hidden=(8,))).save_pretrained(copy)
        assert command(scorer=copy) == 2

    def test_unreadable_settings(self, command, tmp_path, one_line):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "settings.json").write_text("{")
        assert command() == 2
        assert "settings.json" in one_line()
