"""mypy and pyright on the package and on two files of user code: one that must pass, one whose mistakes must be seen.

The name keeps it out of a plain ``pytest``, because it takes half a minute; ``.ci/run`` names it. It needs the extra
``types``. pyright is the original one: with the extra ``nodejs`` its package holds Node, so nothing is downloaded.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD, BAD = (f"tests/typing/{name}.py" for name in ("good", "bad"))


def run(*command: str) -> str:
    """The output of a checker, by this Python, in the root of the repository."""
    # An editable installation is one that type checkers do not follow, so the checkout is put on the path.
    found = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert found.returncode in (0, 1), found.stdout + found.stderr  # others: the checker itself failed
    return found.stdout


def errors_of_mypy() -> set[tuple[str, int]]:
    """With those in the package itself: in ``varkern`` and all that it imports."""
    found = re.findall(r"^(.+?):(\d+): error: ", run("mypy", "varkern/__init__.py", GOOD, BAD), re.MULTILINE)
    return {(Path(file).as_posix(), int(line)) for file, line in found}


def errors_of_pyright() -> set[tuple[str, int]]:
    found = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, GOOD, BAD))["generalDiagnostics"]
    return {
        (Path(error["file"]).relative_to(ROOT).as_posix(), error["range"]["start"]["line"] + 1)
        for error in found
        if error["severity"] == "error"
    }


@pytest.mark.parametrize("errors", [errors_of_mypy, errors_of_pyright])
def test_only_the_marked_mistakes_are_errors(errors):
    lines = enumerate((ROOT / BAD).read_text(encoding="utf-8").splitlines(), 1)
    assert errors() == {(BAD, number) for number, line in lines if line.endswith("  # error")}


def test_every_public_name_has_a_type():
    """What pyright reads from the annotations of ``varkern``, ``varkern.search`` and ``varkern.ops`` alone."""
    # A class of PyTorch is partly unknown to pyright, and so is what derives from it: only causes in varkern count.
    report = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, "--verifytypes", "varkern"))
    symbols = report["typeCompleteness"]["symbols"]
    parts = r"literals|spec|search|scorer\.Scorer|models\.(var\.VAR|vqvae\.VQVAE)|ops\.\w+\.[a-z]"
    found = {
        symbol["name"]: cause["message"]
        for symbol in symbols
        if symbol["isExported"] and (symbol["name"].count(".") == 1 or re.match(rf"varkern\.({parts})", symbol["name"]))
        for cause in symbol["diagnostics"]
        if "annotation" in cause["message"]
    }
    assert len(symbols) > 1000 and found == {}
