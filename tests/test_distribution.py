"""What is in the wheel and in the source distribution, as setuptools builds them from the files of this checkout."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import varkern

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools replaces sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""
NAME = f"varkern-{varkern.__version__}"


@pytest.fixture(scope="module")
def files() -> set[str]:
    """All files of the repository that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory) -> Path:
    """A folder with both distributions."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "varkern" / "left.pyc").write_bytes(b"")
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        yield archive


def test_the_wheel_has_the_package_and_its_kernels_alone(wheel, files):
    """Every file of varkern/, every file of kernels/ as varkern/kernels/, and nothing else: no tests, no benchmarks."""
    found = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    package = {name for name in files if name.startswith("varkern/")}
    assert found == package | {f"varkern/{name}" for name in files if name.startswith("kernels/")}
    weights = {f"varkern/demo/weights/{name}.safetensors" for name in ("vae", "var", "scorer", "second", "classifier")}
    assert weights | {"varkern/py.typed", "varkern/__init__.py", "varkern/kernels/launching.py"} <= found


def test_the_wheel_says_what_the_package_index_shows(wheel):
    metadata = email.message_from_string(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    assert metadata["Version"] == varkern.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert {"demo", "plots", "train", "measure", "digits", "hub", "test"} <= set(metadata.get_all("Provides-Extra"))
    scripts = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert re.search(r"^varkern = varkern\.cli:main$", scripts, re.MULTILINE)


def test_the_source_distribution_is_the_repository(built, files):
    """It has every tracked file, so that it can run its tests, and nothing else but what setuptools adds."""
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        found = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    added = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found if not name.startswith("varkern.egg-info/")} - added == files
