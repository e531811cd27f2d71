"""``varkern`` and ``varkern.kernels`` come from one checkout or installation, in every way of installing."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import varkern

ROOT = Path(__file__).parent.parent
IMPORT = "import sys, varkern; print(varkern.__file__, *(m for m in sys.modules if 'kernels' in m or 'triton' in m))"
# What `pip install -e` puts on sys.meta_path, behind Python's own finders: these packages come from these folders.
FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = {mapping!r}.get(name)
        return folder and spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.append(Finder)
"""


def checkout(root: Path, kernels: str = "kernels") -> Path:
    """The package with nothing but the check, and kernels, as in a checkout or (``varkern/kernels``) installed."""
    for folder in ("varkern", kernels):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    (root / kernels / "launching.py").write_text("")
    shutil.copy(ROOT / "varkern" / "installation.py", root / "varkern")
    code = "from varkern.installation import check_kernels\ncheck_kernels(__path__[0])\n"
    (root / "varkern" / "__init__.py").write_text(code)
    return root


def run(*path: Path, editable: Path | None = None, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Import varkern in a new process with these folders on PYTHONPATH, beside an editable install of a checkout."""
    mapping = {}
    if editable is not None:
        mapping = {"varkern": str(editable / "varkern"), "varkern.kernels": str(editable / "kernels")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-S", "-c", FINDER.format(mapping=mapping) + IMPORT]
    # Python also looks for packages in the current folder.
    return subprocess.run(command, env=environment, cwd=folder or ROOT / "docs", capture_output=True, text=True)


@pytest.mark.parametrize("way", ["editable", "wheel", "editable through a link", "kernels left out"])
def test_one_origin_passes(way, tmp_path):
    """Neither the kernels nor Triton are imported by the check."""
    inside, beside = "varkern/kernels", "kernels"
    root = checkout(tmp_path / "a", inside if way == "wheel" else beside)
    if way == "editable through a link":
        if os.name == "nt":
            pytest.skip("links need a privilege on Windows")
        (tmp_path / "link").symlink_to(root)
        done = run(root, editable=tmp_path / "link")
    elif way == "kernels left out":  # a copy of the package alone runs in plain PyTorch
        shutil.rmtree(root / "kernels")
        done = run(root)
    else:
        done = run(root) if way == "wheel" else run(editable=root)
    assert done.stdout.split() == [str(root / "varkern" / "__init__.py")], done.stderr


@pytest.mark.parametrize("way", ["on PYTHONPATH", "current folder"])
def test_a_clone_beside_an_editable_install_is_refused(way, tmp_path):
    installed, clone = checkout(tmp_path / "installed"), checkout(tmp_path / "clone")
    done = run(clone, editable=installed) if way == "on PYTHONPATH" else run(editable=installed, folder=clone)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: varkern is imported from {clone / 'varkern'}, but varkern.kernels from {installed / 'kernels'}, "
        f"another checkout or installation: run pip install -e {clone}, or take {clone} off PYTHONPATH and start "
        "Python in another folder"
    )


@pytest.mark.parametrize("beside", [None, "wheel"], ids=["alone", "beside a wheel"])
def test_a_clone_whose_kernels_nobody_finds_is_refused(beside, tmp_path):
    clone = checkout(tmp_path / "clone")
    others = [checkout(tmp_path / "site", "varkern/kernels")] if beside else []
    done = run(clone, *others)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: varkern is imported from {clone / 'varkern'}, a checkout that is not installed, so that Python "
        f"does not find its kernels in {clone / 'kernels'}: run pip install -e {clone}"
    )


def test_the_package_checks_before_it_imports_anything_else():
    statements = ast.parse(Path(varkern.__file__).read_text()).body[1:3]  # after the docstring
    assert [ast.unparse(statement) for statement in statements] == [
        "from varkern.installation import check_kernels",
        "check_kernels(__path__[0])",
    ]


def test_the_tests_run_the_checkout_they_stand_in():
    assert Path(varkern.__file__).parent == ROOT / "varkern"
    assert Path(sys.modules["varkern.installation"].__file__).parent == ROOT / "varkern"
