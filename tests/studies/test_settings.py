"""A sweep's settings file: what it means, and that what is wrong in it is named."""

import pytest

from varkern.studies.cells import Cell
from varkern.studies.settings import SweepSettings, read

WHOLE = """
images = 30
cfg = 2
alpha = "median"
var = "demo"
scorer = { pointwise = "a.safetensors", "x y" = "b" }
[[grid]]
m = [1, 4, [1, 2, 3]]
pick = ["best", 2]
scorer = "pointwise"
[[grid]]
n = 50
alpha = [2.3, 2]
strategy = "hybrid"
cfg = 1.5
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return write


def test_cells(file):
    settings = SweepSettings(**read(file(WHOLE)))
    best = [Cell(m=m, pick=pick, scorer="pointwise") for m in (4, (1, 2, 3)) for pick in ("best", 2)]
    density = [Cell(n=50, alpha=2.3, cfg=1.5), Cell(n=50, alpha=2.0, cfg=1.5)]
    assert settings.cells().cells == [Cell(), *best, *density]
    assert (settings.images, settings.cfg, settings.seeds, settings.top_k) == (30, 2, 3, None)
    assert settings.scorer == {"pointwise": "a.safetensors", "x y": "b"}


@pytest.mark.parametrize(
    "text",
    [WHOLE, 'preset = "lsrs-table5"', 'vae = "\\u007f \\"é\\\\"\ncfg = 1.23456789e-7'],
    ids=["grid", "preset", "odd"],
)
def test_printed_and_read_again(file, text):
    settings = SweepSettings(**read(file(text)))
    assert SweepSettings(**read(file(settings.as_toml()))) == settings


@pytest.mark.parametrize(
    "text, said",
    [
        ("images = ", "must be TOML: "),
        ("imagse = 3", "unknown setting imagse; did you mean images\\?"),
        ("qqq = 3", "unknown setting qqq; known are alpha, autocast, "),
        ('images = "3"', "images must be an integer, got '3'"),
        ("images = 3.0", r"images must be an integer, got 3\.0"),
        ("images = true", "images must be an integer, got True"),
        ('cfg = "much"', "cfg must be a number, got 'much'"),
        ("features = 3", "features must be a text, got 3"),
        ('alpha = "much"', "alpha must be a number or median, got 'much'"),
        ("scorer = { a = 3 }", "scorer must be a text, got 3"),
        ("grid = 3", r"grid must be tables, each headed \[\[grid\]\], got 3"),
        ("[grid]\nm = 3", r"grid must be tables, each headed \[\[grid\]\]"),
        ("[[grid]]\npick = 2", "grid 1: m or n must be given"),
        ("[[grid]]\nm = 2\n[[grid]]\nM = 2", "grid 2: unknown setting M; known are alpha, bandwidth"),
        ("[[grid]]\nn = 2\npick = 2", "grid 1: pick must not be given without m, got 2"),
        ("[[grid]]\nn = 2\nproposals = 4", "grid 1: proposals must not be given without m, got 4"),
        ("[[grid]]\nm = 2\nscale = [1, 2]", r"grid 1: scale must not be given without n, got \[1, 2\]"),
        ("[[grid]]\nm = []", "grid 1: m must have at least one value, got none"),
        ("[[grid]]\nm = [[1, 'x']]", "grid 1: m must be an integer, got 'x'"),
        (
            "[[grid]]\nm = 2\ntemperature = ['fitted', 'hot']",
            "grid 1: temperature must be a number or fitted, got 'hot'",
        ),
        ("[[grid]]\nn = 2\nalpha = ['median', 'much']", "grid 1: alpha must be a number or median, got 'much'"),
        ("[[grid]]\nm = 2\npick = [[1]]", r"grid 1: pick must be a text or a number, got \[1\]"),
    ],
)
def test_wrong(file, text, said):
    with pytest.raises(ValueError, match=f"sweep.toml.*{said}"):
        read(file(text))


def test_not_there(tmp_path):
    with pytest.raises(OSError, match=r"settings must be a TOML file, got .*nowhere.*, which is not a file"):
        read(tmp_path / "nowhere.toml")
