"""The presets: each has the paper's figures for its own cells, and its searches can be built."""

from dataclasses import replace

import pytest

from varkern.studies.cells import Cell
from varkern.studies.presets import PRESETS, PRESETS_FILE, read_presets, tomllib
from varkern.studies.report import FIGURES


def scorer(labels, features, scale):
    return features.mean((2, 3, 4))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_preset(preset):
    assert len(set(preset.cells)) == len(preset.cells)
    for cell, printed in preset.rows:
        assert set(printed) <= set(FIGURES)
        assert all(isinstance(value, float) and value > 0 for value in printed.values())
        cell.search(scorer, 1.0)
        assert not cell.needs_alpha and cell.fits(10) and cell.model in ("", "d16", "d20", "d24", "d30")
    assert set(preset.shown) <= set(FIGURES) and preset.title and preset.claim.endswith(".")


def test_format(tmp_path):
    """A value without a list is that of all cells, "" is a default, and other tables' rows come first and once."""
    (tmp_path / "a.toml").write_text(
        '[a]\ntitle = "A"\nclaim = "a."\ncells.m = [1, 2]\ncells.cfg = ["", 0.5]\npaper.fid = [3.0, 2.0]\n'
        '[b]\ntitle = "B"\nclaim = ""\ncfg = 1.0\nshown = ["fid"]\nrows_of = ["a"]\ncells.m = [2, 1]\ncells.pick = 2\n'
    )
    a, b = read_presets(tmp_path / "a.toml").values()
    assert a.rows == ((Cell(), {"fid": 3.0}), (Cell(m=2, cfg=0.5), {"fid": 2.0})) and (a.cfg, a.timing) == (1.5, False)
    assert b.cells == [Cell(), Cell(m=2, cfg=0.5), Cell(m=2, pick=2)] and (b.cfg, b.shown) == (1.0, ("fid",))


def test_every_list_has_one_value_per_cell():
    for name, table in tomllib.loads(PRESETS_FILE.read_text()).items():
        columns = [*table.get("cells", {}).values(), *table.get("paper", {}).values()]
        assert len({len(column) for column in columns if isinstance(column, list)}) == (name != "lsrs-fig3"), name


def test_every_table_is_there():
    tables = {f"lsrs-table{number}" for number in range(2, 10)}
    tables |= {f"var-scaling-table{number}" for number in ("2", "3a", "3b", "3c", "3d", "3e")}
    assert set(PRESETS) == tables | {"lsrs-fig3", "lsrs-fig6", "resampling"}


@pytest.mark.parametrize(
    "name, cell, printed",
    [
        ("lsrs-table2", Cell(m=8, scorer="pointwise"), {"fid": 1.76, "inception_score": 303.2, "sfid": 6.64}),
        ("lsrs-table3", Cell(m=32, first_scale=0), {"fid": 2.30}),
        ("lsrs-table4", Cell(m=128, model="d20", scorer="d20"), {"fid": 2.54, "recall": 0.59}),
        ("lsrs-table5", Cell(m=128), {"fid": 1.66, "sfid": 6.41}),
        ("lsrs-table6", Cell(m=32, first_scale=0), {"fid": 2.30, "sfid": 8.82}),
        ("lsrs-table7", Cell(m=256), {"mean_difference": 0.206, "trace_generated": 174.797}),
        ("lsrs-table8", Cell(m=128, pick=2), {"fid": 1.63}),
        ("lsrs-table9", Cell(m=256, pick=16), {"inception_score": 298.1}),
        ("var-scaling-table2", Cell(n=100, scale=6, alpha=1.9), {"fid": 2.09}),
        ("var-scaling-table3a", Cell(n=50, alpha=2.7, model="d24"), {"fid": 2.24}),
        ("var-scaling-table3b", Cell(n=50, strategy="top"), {"fid": 2.46, "inception_score": 304.7}),
        ("var-scaling-table3c", Cell(n=20, alpha=2.3, representatives=15), {"fid": 2.13}),
        ("var-scaling-table3d", Cell(cfg=1.5), {"fid": 2.01}),
        ("var-scaling-table3e", Cell(n=100, alpha=2.4, metric="cosine"), {"fid": 2.18}),
    ],
)
def test_one_figure_of_each(name, cell, printed):
    """Looked up in the papers by hand; figures of one table may stand in another's rows by mistake."""
    assert printed.items() <= PRESETS[name].paper[cell].items()


@pytest.mark.parametrize("paper", ["lsrs", "var-scaling"])
def test_shared_cells_have_one_figure(paper):
    """Tables repeat one another's rows, to within their own rounding."""
    seen, shared = {}, 0
    for preset in PRESETS.values():
        for cell, printed in preset.rows:
            if "fid" not in printed or not preset.name.startswith(paper):
                continue
            cell = replace(cell, scorer="" if cell.scorer == "pairwise" else cell.scorer)
            cell = replace(cell, model="" if cell.model == "d30" else cell.model)
            shared += cell in seen
            assert abs(seen.setdefault(cell, printed["fid"]) - printed["fid"]) <= 0.0101, (preset.name, cell.name)
    assert shared >= 15
