"""mypy and pyright on the package and on two files of user code: one that must pass, one whose mistakes must be seen.

The name keeps it out of a plain ``pytest``, because it takes half a minute; ``.ci/run`` names it. It needs the extra
``types``. pyright is the original one: with the extra ``nodejs`` its package holds Node, so nothing is downloaded.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD, BAD = (f"tests/typing/{name}.py" for name in ("good", "bad"))


def run(*command: str) -> str:
    """The output of a checker, by this Python, in the root of the repository."""
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert found.returncode in (0, 1), found.stdout + found.stderr  # others: the checker itself failed
    return found.stdout


def errors_of_mypy() -> set[tuple[str, int]]:
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
    found = {(file, line) for file, line in errors() if file in (GOOD, BAD)}
    assert found == {(BAD, number) for number, line in lines if line.endswith("  # error")}
