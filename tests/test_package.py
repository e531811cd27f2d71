"""What is installed is what the repository holds."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import varkern

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


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
        assert found == {"py.typed", "demo/README.md", "studies/presets.toml"} | weights

    def test_every_dependency_is_imported(self):
        """What a user must install is what the package imports."""
        wanted = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in CONFIG["project"]["dependencies"]}
        files = [path for folder in ("varkern", "kernels") for path in (ROOT / folder).rglob("*.py")]
        text = "\n".join(path.read_text() for path in files)
        assert wanted == {name for name in wanted if re.search(rf"^\s*(from|import) {name}\b", text, re.MULTILINE)}

    def test_version(self):
        assert CONFIG["project"]["version"] == varkern.__version__
