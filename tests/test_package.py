"""What is installed is what the repository holds, and README's examples run as they stand."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

import varkern
from varkern.demo import run

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class TestPackage:
    def test_every_folder_is_installed(self):
        """The list in pyproject.toml names each package of the repository and no other."""
        found = {"varkern.kernels"}
        for file in (ROOT / "varkern").rglob("__init__.py"):
            found.add(".".join(file.parent.relative_to(ROOT).parts))
        assert set(CONFIG["tool"]["setuptools"]["packages"]) == found
        assert CONFIG["tool"]["setuptools"]["package-dir"] == {"varkern.kernels": "kernels"}

    @pytest.mark.parametrize("name", sorted(CONFIG["tool"]["setuptools"]["packages"]))
    def test_packages_import(self, name):
        assert import_module(name).__doc__

    def test_kernels_come_from_the_repository(self):
        assert Path(import_module("varkern.kernels").__file__).parent == ROOT / "kernels"

    def test_data_is_installed(self):
        """The patterns of package-data find the type marker, the weights and the demo's page."""
        patterns = CONFIG["tool"]["setuptools"]["package-data"]["varkern"]
        found = {str(path.relative_to(ROOT / "varkern")) for p in patterns for path in (ROOT / "varkern").glob(p)}
        weights = {f"demo/weights/{name}.safetensors" for name in ("vae", "var", "scorer", "classifier")}
        assert found == {"py.typed", "demo/README.md"} | weights

    def test_version(self):
        assert CONFIG["project"]["version"] == varkern.__version__


class TestReadme:
    def test_commands_that_do_everything(self):
        """.ci/run takes these two lines from README.md."""
        commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install -e")]
        assert commands == ["pip install -e '.[demo]' && varkern demo", "pip install -e '.[test]' && pytest"]

    def test_options_exist(self):
        """Every option that README gives a varkern command is one."""
        from typer.main import get_command

        from varkern import cli

        lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("varkern")]
        assert len(lines) >= 5
        for line in lines:
            words, command = shlex.split(line, comments=True)[1:], get_command(cli.app)
            while hasattr(command, "commands") and words and not words[0].startswith("-"):
                command = command.commands[words.pop(0)]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known

    @pytest.mark.parametrize("place", range(3), ids=["patch", "scorer", "search"])
    def test_examples(self, place, tmp_path, monkeypatch):
        """The Python blocks run, with the demo's models where a user's stand."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "scorer.safetensors").write_bytes((run.WEIGHTS / "scorer.safetensors").read_bytes())
        model, _ = run.load_demo()
        names = {"var": model, "labels": torch.arange(8)}
        before = dict(vars(model))
        examples = blocks("python")
        assert len(examples) == 3
        exec(examples[place], names)
        images = names["images"] if place == 0 else names["result"].images
        assert images.shape == (8, 3, 24, 24) and images.isfinite().all()
        assert vars(model) == before

    def test_links_and_pictures_exist(self):
        for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', README + (ROOT / "CONTRIBUTING.md").read_text()):
            target = "".join(target)
            assert target.startswith("https://") or (ROOT / target).exists(), target
