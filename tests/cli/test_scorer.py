"""``varkern scorer``: from token maps to a scorer and its report, on small models and on the demo's."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import varkern
from tests.cli.conftest import CLASSES, PATCH_NUMS
from tests.training.small import free_port, random_tokens, start_child, wait_for, write_maps
from varkern import cli
from varkern.demo import run as demo_run
from varkern.demo import train as demo_train
from varkern.ops import use_backend
from varkern.training.scorer import read_facts

SMALL = {"widths": "8", "embedding": 4, "hidden": 8, "epochs": 1, "warmup-epochs": 0.5, "batch-size": 8}


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Token maps of twelve classes that fit the small VQ-VAE of the command's tests."""
    folder = tmp_path_factory.mktemp("maps")
    labels = torch.arange(60) % CLASSES
    assert PATCH_NUMS == (1, 2, 4)
    for seed, (name, high) in enumerate((("real", 32), ("generated", 64))):
        write_maps(folder / name, labels, random_tokens(60, seed, high), num_classes=CLASSES)
    return folder


@pytest.fixture
def command(weights, maps, tmp_path):
    """``varkern scorer train`` (or another) on the small models, options changed by keyword; its exit code."""

    def run(name="train", **changes):
        settings = {"real": maps / "real", "generated": maps / "generated", "vae": weights / "vae.safetensors"}
        settings |= {"device": "cpu", "out": tmp_path / "scorer.safetensors"}
        settings |= SMALL if name == "train" else {}
        settings |= {key.replace("_", "-"): value for key, value in changes.items()}
        arguments = ["scorer", name]
        for key, value in settings.items():
            if value is not None:
                arguments += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return cli.main(arguments)

    return run


class TestTrain:
    def test_a_scorer_that_loads_and_searches(self, command, weights, tmp_path, capsys):
        assert command() == 0
        out = capsys.readouterr().out
        assert re.search(r"scale 0: loss [\d.]+, accuracy [\d.]+\n.*scale 2: loss", out, re.S)
        assert re.search(r"\d+ pairs/s; shares of the time: data \d+%, fuse \d+%, model \d+%", out)
        assert "on 12 held-out pairs" in out and f"wrote {tmp_path / 'scorer.safetensors'}" in out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["scorer.csv", "scorer.safetensors"]
        scorer = varkern.Scorer.from_pretrained(tmp_path / "scorer.safetensors")
        assert (scorer.config.num_classes, scorer.config.widths) == (CLASSES, (8,))
        var = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        found = varkern.generate(var, [3, 7], search=varkern.BestOfM(scorer, 2), seeds=0)
        assert found.scores[1].isfinite().all()

    def test_options_reach_the_training(self, command, tmp_path):
        changes = {"loss": "pointwise", "first_scale": 1, "features": "own", "seed": 3, "precision": "bfloat16"}
        changes |= {"learning_rate": 0.01, "weight_decay": 0.1, "max_norm": 2.0, "validation": 0.3, "epochs": 0.5}
        assert command(**changes) == 0
        settings = read_facts(tmp_path / "scorer.safetensors")["settings"]
        assert {name: settings[name] for name in changes} == changes

    def test_the_default_sizes_are_the_published_ones(self, command, monkeypatch):
        given = []
        monkeypatch.setattr(cli.scorer, "train_scorer", lambda *arguments, **_: given.extend(arguments))
        monkeypatch.setattr(cli.scorer, "find_rank", lambda: (1, 2))  # which prints nothing
        assert command(widths=None, embedding=None, hidden=None) == 0
        (config,) = (one for one in given if isinstance(one, varkern.ScorerConfig))
        assert (config.num_classes, config.num_scales, config.channels, config.size) == (CLASSES, 3, 8, 4)
        published = replace(config, num_classes=1000, num_scales=10, channels=32, size=16, widths=None)
        assert sum(p.numel() for p in varkern.Scorer(published).parameters()) == 4_007_425
        assert config.widths == (64,) and config.dropout == 0.05

    def test_a_recipe_and_options_that_replace_its_own(self, command, tmp_path, capsys):
        """An option that is given counts, also where it is the other recipe's default."""
        assert command(recipe="published", validation=0.5, pair_share=0.5, out=tmp_path / "published.safetensors") == 0
        settings = read_facts(tmp_path / "published.safetensors")["settings"]
        wanted = {"validation": 0.5, "pair_share": 0.5, "validation_pairs": 0.1, "best_by": "accuracy", "epochs": 1.0}
        assert {name: settings[name] for name in wanted} == wanted and settings["precision"] == "float32"
        assert command(recipe="published", validation=0.02, out=tmp_path / "other.safetensors") == 0
        assert read_facts(tmp_path / "other.safetensors")["settings"]["validation"] == 0.02
        assert command(best_by="loss", out=tmp_path / "paper.safetensors") == 0
        settings = read_facts(tmp_path / "paper.safetensors")["settings"]
        assert (settings["best_by"], settings["pair_share"], settings["validation"]) == ("loss", None, 0.02)

    def test_done_already(self, command, capsys, tmp_path):
        assert command() == 0
        first = (tmp_path / "scorer.safetensors").read_bytes()
        assert command() == 0
        assert (tmp_path / "scorer.safetensors").read_bytes() == first
        outputs = capsys.readouterr().out.split("wrote")
        assert outputs[0].split("scale 0")[1].strip() == outputs[1].split("scale 0")[1].strip()

    def test_restart(self, command, tmp_path, one_line):
        assert command() == 0
        assert command(seed=4) == 2
        assert "was made with other settings (seed was 0, now 4): choose another file or restart" in one_line()
        assert command(seed=4, restart=True) == 0
        assert read_facts(tmp_path / "scorer.safetensors")["settings"]["seed"] == 4

    def test_as_torchrun_starts_it(self, command, tmp_path):
        """Two processes by their environment alone; one scorer, of both."""

        def rank(number, port):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(number), WORLD_SIZE="2")
            with use_backend("torch"):
                assert command(out=tmp_path / "new" / "scorer.safetensors") == 0

        port = free_port()
        children = [start_child(lambda number=number: rank(number, port)) for number in range(2)]
        assert [wait_for(child) for child in children] == [0, 0]
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["scorer.csv", "scorer.safetensors"]
        assert read_facts(tmp_path / "new" / "scorer.safetensors")["ranks"] == 2

    def test_classes_left_out_are_counted(self, command, tmp_path, capsys):
        write_maps(tmp_path / "few", torch.arange(40) % 10, random_tokens(40, 4), num_classes=CLASSES)
        assert command(generated=tmp_path / "few") == 0
        assert "10 real images were left out: no generated image has their class" in capsys.readouterr().out


class TestReport:
    @pytest.fixture
    def trained(self, command, tmp_path):
        assert command() == 0
        return tmp_path / "scorer.safetensors"

    def test_files(self, command, trained, tmp_path, capsys):
        assert command("report", scorer=trained, out=tmp_path / "report") == 0
        out = capsys.readouterr().out
        assert "12 pairs, held out of the scorer's training" in out and out.count("\n| ") >= 4
        assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.json", "scores.png"]
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        validation = read_facts(trained)["validation"]
        assert [row["accuracy"] for row in report["scales"]] == pytest.approx(validation["accuracy"])
        assert [row["pairwise_loss"] for row in report["scales"]] == pytest.approx(validation["loss"], rel=1e-4)

    def test_temperatures_are_added_to_the_file(self, command, trained, tmp_path, capsys, one_line):
        path = shutil.copy(trained, tmp_path / "copy.safetensors")
        assert command("report", scorer=path, out=tmp_path / "report", first_scale=1, save_temperatures=True) == 0
        assert f"added the fitted temperatures to {path}" in capsys.readouterr().out.replace("\n", " ")
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        before, after = varkern.Scorer.from_pretrained(trained), varkern.Scorer.from_pretrained(path)
        assert before.temperatures is None
        assert after.temperatures == (1.0, *(row["temperature"] for row in report["scales"]))
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
        assert after.metadata["training"] == before.metadata["training"]
        capsys.readouterr()
        assert command("report", scorer=tmp_path, out=tmp_path / "report", save_temperatures=True) == 2
        assert "save_temperatures needs a local .safetensors file, got" in one_line()

    def test_against_a_second(self, command, trained, tmp_path, capsys):
        other = tmp_path / "other.safetensors"
        assert command(first_scale=1, out=other) == 0
        capsys.readouterr()
        assert command("report", scorer=trained, against=other, out=tmp_path / "report") == 0
        out = capsys.readouterr().out
        assert "| scale | accuracy, scorer.safetensors | accuracy, other.safetensors | change |" in out
        assert re.search(r"\| 0 \| [\d.]+ \| - \| - \|", out) and re.search(r"\| 1 \| [\d.]+ \| [\d.]+ \| [+-]", out)
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        assert report["against"][0]["scorer"] == "other.safetensors"

    def test_a_scorer_made_elsewhere(self, command, weights, tmp_path, capsys):
        assert command("report", scorer=weights / "scorer.safetensors", out=tmp_path / "report") == 0
        assert "60 pairs, of other maps" in capsys.readouterr().out


class TestRefused:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"widths": "8,x"}, "widths must be numbers such as 64,128,256, got '8,x'"),
            ({"widths": "8,8,8"}, "widths must have one number for each of the 1 stages"),
            ({"every": 0}, "every must be >= 1, got 0"),
            ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
            ({"epochs": -1}, "epochs must be a finite number > 0, got -1"),
            ({"first_scale": 3}, "first_scale must be in 0..2, the scales of the token maps, got 3"),
            ({"validation": 1}, "validation must be in [0, 1), got 1"),
            ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_an_option(self, changes, message, command, one_line, tmp_path):
        assert command(**changes) == 2
        assert message in one_line()
        assert not list(tmp_path.glob("scorer*"))

    def test_no_dataset(self, command, one_line, tmp_path):
        assert command(real=tmp_path) == 2
        assert "is not a token-map dataset" in one_line()

    def test_an_altered_shard(self, command, one_line, tmp_path):
        write_maps(tmp_path / "maps", torch.arange(24) % CLASSES, random_tokens(24, 0), num_classes=CLASSES)
        shard = sorted((tmp_path / "maps").glob("shard-*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-2] ^= 1
        shard.write_bytes(content)
        assert command(real=tmp_path / "maps") == 2
        assert f"{shard.name} was altered" in one_line()

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"patch_nums": (1, 4, 2)}, "same patch_nums, got (1, 2, 4) and (1, 4, 2)"),
            ({"vocabulary": 65}, "same vocabulary, got 64 and 65"),
            ({"num_classes": CLASSES + 1}, "same num_classes, got 12 and 13"),
        ],
        ids=["scale schedule", "vocabulary", "classes"],
    )
    def test_datasets_that_do_not_fit(self, changes, message, command, one_line, tmp_path):
        options = {"num_classes": CLASSES} | changes
        write_maps(tmp_path / "maps", torch.arange(24) % CLASSES, random_tokens(24, 0), **options)
        assert command(generated=tmp_path / "maps") == 2
        assert message in one_line()

    def test_no_shared_class(self, command, one_line, tmp_path):
        for name, first in (("low", 0), ("high", 6)):
            labels = torch.arange(12) % 6 + first
            write_maps(tmp_path / name, labels, random_tokens(12, 0), num_classes=CLASSES)
        assert command(real=tmp_path / "low", generated=tmp_path / "high") == 2
        wanted = "must share a class, got 6 classes (0, 1, 2, 3, 4, 5) and 6 classes (6, 7, 8, 9, 10, 11)"
        assert wanted in one_line()

    def test_a_vae_that_is_none(self, command, weights, one_line):
        assert command(vae=weights / "var.safetensors") == 2
        assert "is not a VQ-VAE checkpoint" in one_line()
        assert command(vae=weights / "var.safetensors", features="own") == 2
        assert "is not a VQ-VAE checkpoint" in one_line()

    def test_a_vae_of_other_codes(self, command, one_line):
        assert command(vae=demo_run.WEIGHTS / "vae.safetensors") == 2
        assert "vae has patch_nums (1, 2, 3, 4, 6), but the token maps have (1, 2, 4)" in one_line()

    def test_another_vae_than_the_maps_were_made_with(self, weights, command, one_line, tmp_path):
        """Same sizes, other weights: only its checksum tells."""
        from varkern.models import load_vae
        from varkern.models.loading import save_model

        vae = load_vae(weights / "vae.safetensors")
        arguments = ["tokens", "generate", "--var", str(weights / "var.safetensors"), "--per-class", "1"]
        arguments += ["--vae", str(weights / "vae.safetensors"), "--out", str(tmp_path / "maps"), "--device", "cpu"]
        assert cli.main(arguments) == 0
        vae.quantize.embedding.weight.mul_(1.5)
        save_model(vae, tmp_path / "other.safetensors")
        assert command(vae=tmp_path / "other.safetensors", generated=tmp_path / "maps") == 2
        assert re.search(r"vae must be the file that made .*maps, with sha256 [0-9a-f]{64}, got .*other", one_line())
        assert command(generated=tmp_path / "maps") == 0

    def test_no_matplotlib(self, command, weights, one_line, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert command("report", scorer=weights / "scorer.safetensors", out=tmp_path / "report") == 2
        assert "pip install 'varkern[train]'" in one_line()
        assert not (tmp_path / "report").exists()

    def test_no_scorer(self, command, one_line, tmp_path, weights):
        assert command("report", scorer=tmp_path / "nothing.safetensors", out=tmp_path / "report") == 2
        assert "no scorer at" in one_line()
        assert command("report", scorer=weights / "other_scorer.safetensors", out=tmp_path / "report") == 2
        assert "the scorer's channels must be 8 for these token maps, got 4" in one_line()


def test_three_commands_on_the_demo_model(tmp_path):
    """Real digits' token maps, generated ones, a scorer: in miniature, from nothing, it tells digits from forgeries.

    The forgeries are made with too much guidance, which is soon learned. Of 303 held-out pairs more than 65% are told
    right at the last scale, which by chance has a probability below 1e-6. (Here it is 74%.) Everything is seeded.
    """
    recipe, vae = demo_train.Recipe(real_maps=1000), demo_run.WEIGHTS / "vae.safetensors"
    demo_train.write_real_tokens(recipe, demo_run.WEIGHTS, torch.device("cpu"), tmp_path / "real")

    def command(*names, **options):
        arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        assert cli.main([*names, "--device", "cpu", *arguments]) == 0

    command("tokens", "generate", var="demo", per_class=50, cfg=4, top_k=0, out=tmp_path / "generated", batch_size=500)
    data = {"real": tmp_path / "real", "generated": tmp_path / "generated", "vae": vae}
    scorer, sizes = tmp_path / "scorer.safetensors", {"widths": "16,32", "embedding": 8, "hidden": "32"}
    settings = {"learning_rate": 4e-3, "batch_size": 32, "epochs": 2, "warmup_epochs": 0.2, "validation": 0.3}
    command("scorer", "train", **data, **sizes, **settings, out=scorer)
    command("scorer", "report", **data, scorer=scorer, out=tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["pairs"] == 303 and report["scales"][-1]["accuracy"] > 0.65
    assert report["scales"][-1]["mean_difference"] > 0
