"""``varkern check``."""

import pytest

from varkern import cli

SCRIPT = """
import torch
from tests.helpers import small_var
from tests.standins.forks import ForkedVAR, fork

model = small_var()

def load_model():
    return fork(ForkedVAR)

def nothing():
    return torch.nn.Linear(2, 2)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments, lines",
    [
        (
            ["my_script:model"],
            ["method: autoregressive_infer_cfg", "loop: fused", "a published method"],
        ),
        (
            ["my_script:load_model"],
            ["family: VAR", "loop: own", "reason: tests.standins.forks.ForkedVAR"],
        ),
        (["my_script:load_model", "--method", "car_inference"], ["method: car_inference", "loop: own"]),
    ],
    ids=["a model", "a function", "another method"],
)
def test_it_says_which_loop_and_why(script, capsys, arguments, lines):
    assert cli.main(["check", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in lines)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("my_script", "model must be MODULE:NAME, such as my_script:load_model, got 'my_script'"),
        ("my_script:other", "got 'my_script:other': my_script has no 'other'"),
        ("no_such_script:model", "there is no module 'no_such_script'"),
        ("my_script:nothing", "Linear fits no family of models"),
    ],
)
def test_what_is_wrong(script, capsys, argument, message):
    assert cli.main(["check", argument]) == 2
    assert message in capsys.readouterr().err
