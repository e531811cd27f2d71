"""Wrong input gets one line on stderr and exit code 2, and is told before any work."""

import subprocess
import sys

import pytest
import torch

from varkern import cli
from varkern.studies import sampling

WRONG = {
    "no_such_var": ({"var": "/nowhere/var.pth"}, "/nowhere/var.pth"),
    "no_such_vae": ({"vae": "/nowhere/vae.pth"}, "/nowhere/vae.pth"),
    "no_such_scorer": ({"scorer": "/nowhere/scorer"}, "/nowhere/scorer"),
    "no_vae": ({"vae": None}, "vae must be given"),
    "garbage_var": ({"var": "{weights}/garbage.pth"}, "garbage.pth"),
    "other_var": ({"var": "{weights}/other.safetensors"}, "not a VAR checkpoint"),
    "vae_as_var": ({"var": "{weights}/vae.safetensors"}, "not a VAR checkpoint"),
    "var_as_vae": ({"vae": "{weights}/var.safetensors"}, "not a VQ-VAE checkpoint"),
    "var_as_scorer": ({"scorer": "{weights}/var.safetensors"}, "not a scorer"),
    "scorer_of_another_model": ({"scorer": "{weights}/other_scorer.safetensors"}, "channels=4"),
    "class_out_of_range": ({"classes": "3,12"}, "classes must be in 0..11, got 12"),
    "class_negative": ({"classes": "-1"}, "classes must be"),
    "class_no_number": ({"classes": "dog"}, "classes must be"),
    "class_range_backwards": ({"classes": "7-3"}, "classes must be"),
    "class_none": ({"classes": ""}, "classes must be"),
    "m_zero": ({"m": 0}, "m must be >= 1, got 0"),
    "m_negative": ({"m": -2}, "m must be >= 1, got -2"),
    "m_no_number": ({"m": "many"}, "m must be a number"),
    "m_of_other_scales": ({"m": "1,2"}, "m must have one number for each of 3 scales"),
    "m_without_scorer": ({"scorer": None}, "--scorer"),
    "first_scale_beyond": ({"first_scale": 3}, "first_scale must be < 3"),
    "first_scale_negative": ({"first_scale": -1}, "first_scale must be"),
    "last_scale_before_first": ({"first_scale": 2, "last_scale": 1}, "last_scale must be"),
    "pick_unknown": ({"pick": "worst"}, "pick must be 'best', 'resample' or an int >= 1, got 'worst'"),
    "pick_zero": ({"pick": 0}, "pick must be"),
    "pick_unknown_without_search": ({"pick": "worst", "m": 1}, "pick must be"),
    "temperature_zero": ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
    "top_k_negative": ({"top_k": -1}, "top_k must be"),
    "top_p_above_one": ({"top_p": 1.5}, "top_p must be in [0, 1], got 1.5"),
    "top_p_nan": ({"top_p": "nan"}, "top_p must be in [0, 1]"),
    "cfg_nan": ({"cfg": "nan"}, "cfg must be a finite number"),
    "cfg_no_number": ({"cfg": "much"}, "--cfg"),
    "seed_too_large": ({"seed": 2**64}, "seed must be < 2**64"),
    "seed_no_number": ({"seed": "x"}, "--seed"),
    "batch_size_zero": ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    "num_per_class_zero": ({"num_per_class": 0}, "num_per_class must be >= 1, got 0"),
    "dtype_unknown": ({"dtype": "int8"}, "--dtype"),
    "autocast_unknown": ({"autocast": "float8"}, "--autocast"),
    "sampler_unknown": ({"sampler": "dice"}, "--sampler"),
    "device_unknown": ({"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
    "device_not_here": ({"device": "cuda:99"}, "device must be present, got 'cuda:99'"),
}


class TestWrongInput:
    @pytest.mark.parametrize("options, named", WRONG.values(), ids=WRONG.keys())
    def test_sample(self, command, weights, tmp_path, options, named, one_line):
        options = {
            name: value.format(weights=weights) if isinstance(value, str) else value for name, value in options.items()
        }
        assert command(**options) == 2
        assert named in one_line()
        assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("settings.json"))

    @pytest.mark.parametrize(
        "arguments, named",
        [
            (["nonsense"], "nonsense"),
            (["sample"], "--var"),
            (["sample", "--nonsense"], "--nonsense"),
            (["demo", "nonsense"], "nonsense"),
            (["demo", "--m", "1"], "m must be >= 2, got 1"),
            (["demo", "--m", "few"], "--m"),
            (["demo", "--num-per-class", "0"], "num_per_class must be >= 1, got 0"),
            (["demo", "--device", "cuda:99"], "cuda:99"),
            (["demo", "--seed", str(2**64)], "seed must be < 2**64"),
            (["demo", "--out", "demo.jpg"], "out must end in .png, got demo.jpg"),
            (["demo", "train"], "--out"),
            (["demo", "train", "--out", "{file}"], "exists"),
            (["env", "--device", "abacus"], "abacus"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_other_commands(self, tmp_path, monkeypatch, arguments, named, one_line):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
        assert cli.main([argument.format(**places) for argument in arguments]) == 2
        assert named in one_line()
        assert not list(tmp_path.rglob("*.png"))

    @pytest.mark.parametrize("arguments", [["demo"], ["sample"]], ids=" ".join)
    def test_unwritable_out(self, command, tmp_path, arguments, one_line):
        """Below a file there can be no folder; the answer comes before any work."""
        (tmp_path / "file").touch()
        if arguments == ["demo"]:
            assert cli.main(["demo", "--out", str(tmp_path / "file" / "demo.png")]) == 2
        else:
            assert command(tmp_path / "file" / "out") == 2
        assert "file" in one_line()

    def test_demo_out_is_a_folder(self, tmp_path, one_line):
        (tmp_path / "demo.png").mkdir()
        assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 2
        assert "folder" in one_line()

    @pytest.mark.parametrize("arguments", [["demo"], ["sample"]], ids=" ".join)
    def test_missing_matplotlib(self, command, tmp_path, monkeypatch, arguments, one_line):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code = cli.main(["demo", "--out", str(tmp_path / "demo.png")]) if arguments == ["demo"] else command()
        assert code == 2
        assert f"pip install 'varkern[{'demo' if arguments == ['demo'] else 'plots'}]'" in one_line()

    def test_missing_scikit_learn(self, tmp_path, monkeypatch, one_line):
        from varkern.demo.digits import originals

        originals.cache_clear()
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        assert cli.main(["demo", "train", "--out", str(tmp_path / "weights")]) == 2
        assert "pip install 'varkern[digits]'" in one_line()
        assert not (tmp_path / "weights").exists()

    def test_missing_hub(self, command, monkeypatch, one_line):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert command(var="d16", vae=None) == 2
        assert "pip install 'varkern[hub]'" in one_line()

    def test_train_of_another_seed(self, tmp_path, capsys, monkeypatch, one_line):
        """Weights of two seeds in one folder would be a mixture of stages."""
        monkeypatch.setattr("varkern.demo.train.train", lambda *arguments: None)
        assert cli.main(["demo", "train", "--out", str(tmp_path), "--seed", "1"]) == 0
        capsys.readouterr()
        assert cli.main(["demo", "train", "--out", str(tmp_path), "--seed", "2"]) == 2
        assert "seed was 1, now 2" in one_line()

    def test_long_message_is_cut(self, command, monkeypatch, one_line):
        def fail(*args, **kwargs):
            raise ValueError("first\n\tsecond " + "x" * 10_000)

        monkeypatch.setattr(cli.sample, "load_var", fail)
        assert command() == 2
        line = one_line()
        assert line.startswith("varkern: first second x") and len(line) < 1000

    def test_out_of_memory(self, command, monkeypatch, one_line):
        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

        monkeypatch.setattr(sampling, "generate", fail)
        assert command() == 1
        assert "--batch-size" in one_line()

    def test_defects_are_not_hidden(self, command, monkeypatch):
        """Only what a user can mend becomes one line."""

        def fail(*args, **kwargs):
            raise TypeError("a defect")

        monkeypatch.setattr(sampling, "generate", fail)
        with pytest.raises(TypeError, match="a defect"):
            command()

    def test_traceback_on_demand(self):
        with pytest.raises(ValueError, match="abacus"):
            cli.main(["--traceback", "env", "--device", "abacus"])

    def test_as_a_process(self, tmp_path):
        arguments = ["sample", "--var", "demo", "--classes", "cat", "--out", str(tmp_path / "out")]
        result = subprocess.run(
            [sys.executable, "-m", "varkern.cli", *arguments], capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 2
        assert result.stderr == "varkern: classes must be numbers and ranges such as 207,88 or 0-9, got 'cat'\n"


def test_no_help_is_taken_for_markup():
    """Typer reads words in brackets as a style, and leaves them out."""
    from typer.main import get_command

    def texts(command, name):
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
        for child, sub in getattr(command, "commands", {}).items():
            yield from texts(sub, f"{name} {child}")

    found = dict(texts(get_command(cli.app), "varkern"))
    assert len(found) > 100 and not [name for name, text in found.items() if "[" in text and "=[" not in text]
