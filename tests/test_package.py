"""What is installed is what the repository holds."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import varkern
from varkern import cards

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
        weights = {f"demo/weights/{name}.safetensors" for name in ("vae", "var", "scorer", "second", "classifier")}
        assert found == {"py.typed", "demo/README.md", "studies/presets.toml"} | weights

    def test_every_dependency_is_imported(self):
        """What a user must install is what the package imports."""
        wanted = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in CONFIG["project"]["dependencies"]}
        files = [path for folder in ("varkern", "kernels") for path in (ROOT / folder).rglob("*.py")]
        text = "\n".join(path.read_text() for path in files)
        assert wanted == {name for name in wanted if re.search(rf"^\s*(from|import) {name}\b", text, re.MULTILINE)}

    def test_every_dependency_has_a_lowest_version(self):
        """.ci/run tests with the lowest versions, which it reads from pyproject.toml by this pattern."""
        script = (ROOT / ".ci/run").read_text(encoding="utf-8")
        pattern = re.search(r"s/\.\*(.*?)\.\*/", script)[1].replace("\\(", "(").replace("\\)", ")")
        found = [re.search(pattern, f'"{line}"') for line in CONFIG["project"]["dependencies"]]
        assert None not in found
        assert [match[1] for match in found] == [
            re.match(r"[\w-]+", line)[0] for line in CONFIG["project"]["dependencies"]
        ]

    def test_one_version(self):
        """The package has the version; what repeats it agrees."""
        assert CONFIG["project"]["dynamic"] == ["version"] and "version" not in CONFIG["project"]
        assert CONFIG["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "varkern.__version__"}}
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == varkern.__version__
        versions = re.findall(r"^## \[([^]]+)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert versions[0] == varkern.__version__ and len(set(versions)) == len(versions)

    def test_one_address(self):
        address = CONFIG["project"]["urls"]["Repository"]
        assert all(url.startswith(address) for url in CONFIG["project"]["urls"].values())
        assert cards.REPOSITORY == address
        for name in ("README.md", "CHANGELOG.md", "CITATION.cff"):
            found = re.findall(r"https://[\w.]+/[\w.-]+/varkern\b", (ROOT / name).read_text())
            assert {url.replace("raw.githubusercontent", "github") for url in found} == {address}

    def test_python_versions(self):
        """The classifiers begin at the oldest supported version and have no gap."""
        found = [c.rpartition(" ")[2] for c in CONFIG["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
        oldest = int(CONFIG["project"]["requires-python"].removeprefix(">=3."))
        assert found == [f"3.{minor}" for minor in range(oldest, oldest + len(found))]
        assert CONFIG["tool"]["ruff"]["target-version"] == f"py3{oldest}"

    def test_citation(self):
        """The keys that version 1.2.0 of the Citation File Format requires, and the papers that README names."""
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
        for work in (citation | {"type": "software"}, *citation["references"]):
            assert work["title"] and work["type"] and work["authors"]
            assert all(set(a) in ({"name"}, {"family-names", "given-names"}) for a in work["authors"])
        papers = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", (ROOT / "README.md").read_text()))
        assert {reference["url"] for reference in citation["references"]} == papers
