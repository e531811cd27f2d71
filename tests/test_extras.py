"""What a missing package is answered with, and which commands need no more than their extra."""

import re
import sys
from pathlib import Path

import pytest

from varkern import cli
from varkern.extras import require_matplotlib, require_pillow

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# The modules of all optional packages, by the package that brings them.
MODULES = {
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "torch-fidelity": "torch_fidelity",
}


def packages(extra: str) -> set[str]:
    """The packages that an extra brings, with those of the extras that it names."""
    found = set()
    for requirement in EXTRAS[extra]:
        others = re.fullmatch(r"varkern\[([\w,]+)\]", requirement)
        if others:
            found.update(*(packages(other) for other in others[1].split(",")))
        else:
            found.add(re.match(r"[\w-]+", requirement)[0].replace("_", "-"))
    return found


@pytest.mark.parametrize("module, require", [("PIL", require_pillow), ("matplotlib", require_matplotlib)])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, module, require):
    require("plots")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs (pillow|matplotlib): pip install 'varkern\[plots\]'"):
        require("plots")


def test_errors_name_extras_that_bring_what_is_missing():
    """Every extra that the package's messages and checks name exists, and no other is offered."""
    text = "".join(path.read_text() for path in (ROOT / "varkern").rglob("*.py"))
    named = set(re.findall(r"varkern\[(\w+)\]", text)) | set(re.findall(r"require_\w+\(\"(\w+)\"\)", text))
    assert named == set(EXTRAS) - {"bench", "docs", "test", "types", "all"}
    for extra in re.findall(r"require_pillow\(\"(\w+)\"\)", text):
        assert "pillow" in packages(extra)
    for extra in re.findall(r"require_matplotlib\(\"(\w+)\"\)", text):
        assert {"matplotlib", "pillow"} <= packages(extra)
    assert "scikit-learn" in packages("digits") and "torch-fidelity" in packages("measure")


def test_all_is_all():
    assert packages("all") == set().union(*map(packages, set(EXTRAS) - {"all"}))


def test_the_page_on_installing_has_every_extra():
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs" / "index.md").read_text(), re.M)
    assert {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)} == set(EXTRAS) - {"all"}
    for names, brought in rows:
        if "pyproject" not in brought:
            assert set(brought.replace("_", "-").split(", ")) == packages(names.strip("`"))


@pytest.mark.parametrize(
    "extra, command",
    [("demo", "demo --num-per-class 1 --m 2 --out DIR/demo.png"), ("plots", "sample --var demo --classes 3 --out DIR")],
    ids=["demo", "sample"],
)
def test_a_command_runs_with_the_packages_of_its_extra(extra, command, tmp_path, monkeypatch):
    """`varkern sample` needs no scikit-learn, and neither does `varkern demo`."""
    for package in set(MODULES) - packages(extra):
        monkeypatch.setitem(sys.modules, MODULES[package], None)
    assert cli.main(command.replace("DIR", str(tmp_path)).split()) == 0
