"""Scorers of the hub on the command line: ``--scorer user/repo@revision``."""

import json
import shutil

import pytest

from varkern import Scorer, cli


@pytest.fixture
def pushed(hub, weights):
    """The small scorer in a repository, and another one at the revision v2."""
    Scorer.from_pretrained(weights / "scorer.safetensors").push_to_hub("user/repo")
    shutil.copy(weights / "other_scorer.safetensors", hub.folder("user/repo", "v2") / "scorer.safetensors")
    return hub


def images(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-seed*.png")}


class TestSample:
    def test_the_images_are_those_of_the_file(self, command, pushed, tmp_path):
        for out, scorer in (("file", "file"), ("hub", "user/repo"), ("revision", "user/repo@main")):
            options = {} if scorer == "file" else {"scorer": scorer}
            assert command(tmp_path / out, num_per_class=1, **options) == 0
        assert images(tmp_path / "file") == images(tmp_path / "hub") == images(tmp_path / "revision")
        assert len(images(tmp_path / "hub")) == 2
        settings = json.loads((tmp_path / "revision" / "settings.json").read_text())["scorer"]
        assert settings["repository"] == "user/repo@main" and len(settings["sha256"]) == 64

    def test_a_scorer_that_changed_on_the_hub_is_another_setting(self, command, pushed, weights, capsys):
        assert command(scorer="user/repo", num_per_class=1) == 0
        assert command(scorer="user/repo", num_per_class=1) == 0
        scorer = Scorer.from_pretrained(weights / "scorer.safetensors")
        scorer.out_proj.bias.fill_(1.0)
        scorer.push_to_hub("user/repo")
        capsys.readouterr()
        assert command(scorer="user/repo", num_per_class=1) == 2
        assert "scorer.sha256 was" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "scorer, said",
        [
            ("user/repo@v9", "no revision v9 in the hub's repository user/repo"),
            ("user/repo@", "revision must not be empty, got 'user/repo@'"),
            ("user/none", "neither a local path user/none nor such a repository on the hub"),
            ("user/repo@v2", "scorer was made for channels=4, but the model has channels=8"),
        ],
    )
    def test_errors_are_one_line(self, command, pushed, scorer, said, one_line, tmp_path):
        assert command(scorer=scorer) == 2
        assert said in one_line()
        assert not list((tmp_path / "out").glob("*.png"))

    def test_a_folder(self, command, weights, tmp_path):
        Scorer.from_pretrained(weights / "scorer.safetensors").save_pretrained(tmp_path / "folder")
        assert command(tmp_path / "a", num_per_class=1) == 0
        assert command(tmp_path / "b", scorer=tmp_path / "folder", num_per_class=1) == 0
        assert images(tmp_path / "a") == images(tmp_path / "b")


class TestOthers:
    def test_explain(self, weights, pushed, tmp_path):
        arguments = [
            "--var",
            str(weights / "var.safetensors"),
            "--vae",
            str(weights / "vae.safetensors"),
            "--class",
            "3",
        ]
        arguments += ["--m", "2", "--device", "cpu"]
        for name, scorer in (("hub", "user/repo"), ("file", str(weights / "scorer.safetensors"))):
            out = str(tmp_path / f"{name}.png")
            assert cli.main(["explain", *arguments, "--scorer", scorer, "--out", out]) == 0
        assert (tmp_path / "hub.json").read_text() == (tmp_path / "file.json").read_text()

    def test_sweep(self, weights, pushed, monkeypatch):
        """The checksum of the downloaded file tells one revision's results from another's."""
        from varkern.cli import sweep
        from varkern.studies.settings import SweepSettings

        scorers = {"a": "user/repo", "b": "user/repo@v2", "c": str(weights / "scorer.safetensors")}
        settings = SweepSettings(var=str(weights / "var.safetensors"), scorer=scorers)
        found = sweep.load_models_lazily(settings, "cpu").scorer_facts
        assert found["a"] == found["c"] != found["b"]
        assert sweep.parse_files("scorer", ["a=user/repo@refs/pr/3", "b=user/repo"]) == {
            "a": "user/repo@refs/pr/3",
            "b": "user/repo",
        }
