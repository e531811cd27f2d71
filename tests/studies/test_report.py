"""Tables and pictures of a sweep: every figure at its place, the same again from the stored JSON."""

import csv
import io
import json

import pytest
from PIL import Image

from varkern.studies import report as sweep_report
from varkern.studies.cells import Cell
from varkern.studies.presets import PRESETS, Preset
from varkern.studies.report import Found, Summary, from_file, markdown, page, summary, write
from varkern.studies.sweep import Entry

SETTINGS = {"images": 2000, "seed": 5, "cfg": 0.0, "top_p": 0.96, "timing": False, "features": "demo"}


def result(seed, fid, **others):
    return {"seed": seed, "fid": fid, "recall": 0.5, "seconds": 0.004 + seed / 1e3, "missing": {}, **others}


def found(cells, paper=({},), settings=SETTINGS, shown=("fid", "recall", "seconds"), repeats=2):
    paper = [*paper, *[{}] * (len(cells) - len(paper))]
    preset = Preset("own", "A title", "A claim.", tuple(zip(cells, paper, strict=True)), shown)
    entries = [
        Entry(cell, [result(seed, 10.0 * number + seed) for seed in range(repeats)])
        for number, cell in enumerate(cells)
    ]
    return Found(preset, entries, settings, "varkern sweep --out DIR")


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]


def test_summary():
    entry = Entry(Cell(), [{"fid": 3.0, "seconds": 0.25}, {"fid": 4.0, "seconds": 0.125}, {"fid": 8.0, "sfid": None}])
    assert summary(entry, "fid") == Summary(5.0, 2.5)
    assert summary(entry, "seconds") == Summary(125.0, None)  # the minimum, in ms
    assert summary(entry, "sfid") is None and summary(entry, "recall") is None
    assert summary(Entry(Cell(), [{"fid": 3.0}]), "fid") == Summary(3.0, None)


def test_markdown():
    table = lines(markdown(found([Cell(), Cell(m=4, pick="resample"), Cell(m=8, first_scale=0)], [{"fid": 1.95}])))
    assert table[0] == ["m", "first_scale", "pick", "Fréchet distance", "recall", "ms per image", "paper: FID"]
    assert table[2] == ["1", "", "", "0.50 ± 0.50", "0.500 ± 0.000", "4.00", "1.95"]
    assert table[3] == ["4", "1", "resample", "10.50 ± 0.50", "0.500 ± 0.000", "4.00", ""]
    assert table[4] == ["8", "0", "best", "20.50 ± 0.50", "0.500 ± 0.000", "4.00", ""]


def test_inception_is_named_where_it_is():
    other = {**SETTINGS, "features": "inception"}
    assert lines(markdown(found([Cell(), Cell(m=2)], settings=other)))[0][1] == "FID"


def test_density_searches_tell_what_they_found_dense():
    cells = [Cell(), Cell(n=20), Cell(n=20, strategy="top")]
    given = found(cells)
    given.entries[1].repeats[0].update(alpha=1.5, dense=0.25)
    given.entries[1].repeats[1].update(alpha=1.5, dense=0.75)
    table = lines(markdown(given))
    assert table[0][:4] == ["n", "strategy", "alpha", "share of dense images"]
    row = dict(zip(table[0], table[3], strict=True))
    assert (row["n"], row["strategy"], row["alpha"], row["share of dense images"]) == (
        "20",
        "hybrid",
        "1.50",
        "0.50 ± 0.25",
    )
    assert dict(zip(table[0], table[4], strict=True))["alpha"] == ""
    assert table[2][:4] == ["alone", "", "", ""]


def test_what_is_the_same_in_all_cells_that_have_it_is_no_column():
    cells = [Cell(), Cell(n=20, min_distance=0.0), Cell(n=50, min_distance=0.0), Cell(m=4, first_scale=0)]
    assert sweep_report.list_varying(cells) == ["m", "n"]
    assert sweep_report.list_varying([*cells, Cell(n=50)]) == ["m", "n", "min_distance"]
    assert sweep_report.list_varying([Cell(), Cell(cfg=2.0)]) == ["cfg"]


def test_page_says_what_it_is_of():
    text = page(found([Cell(), Cell(m=2)]))
    assert text.startswith("### A title\n") and "The paper: A claim." in text
    assert "2,000 images per cell and seed, seeds 5 to 6; cfg=0.0, top_p=0.96" in text
    assert "`varkern sweep --out DIR`" in text
    assert "seed 5;" in page(found([Cell(), Cell(m=2)], repeats=1))


def test_page_says_what_is_missing(tmp_path):
    """Too few images for a distance: the reason stands there, and nothing is drawn of nothing."""
    given = found([Cell(), Cell(m=2)], shown=("fid", "trace_term"))
    for entry in given.entries:
        for repeat in entry.repeats:
            repeat.update(fid=None, missing={"fid": "too few images", "precision": "not requested"})
    text = page(given)
    assert "Not measured: Fréchet distance: too few images\n" in text and "not requested" not in text
    assert [path.suffix for path in write(given, tmp_path)] == [".md", ".csv", ".json"]


def test_m_of_every_scale_has_no_first_scale():
    cells = [Cell(m=4, first_scale=0), Cell(m=4, first_scale=2), Cell(m=(8, 2, 1))]
    table = lines(markdown(found(cells)))
    assert [row[:2] for row in table[2:]] == [["4", "0"], ["4", "2"], ["8:2:1", ""]]


def test_csv_has_every_seed():
    rows = list(csv.DictReader(io.StringIO(sweep_report.as_csv(found([Cell(), Cell(m=(1, 2, 4))])))))
    assert [(row["m"], row["seed"], row["fid"]) for row in rows] == [
        ("1", "0", "0.0"),
        ("1", "1", "1.0"),
        ("1:2:4", "0", "10.0"),
        ("1:2:4", "1", "11.0"),
    ]
    assert rows[0]["sfid"] == "" and float(rows[1]["seconds"]) == 0.005


def test_files(tmp_path):
    given = found([Cell(), Cell(m=2), Cell(m=(1, 2, 4)), Cell(n=5, alpha=2.0)])
    paths = write(given, tmp_path)
    assert [path.name for path in paths] == ["own.md", "own.csv", "own.json", "own.png"]
    again = from_file(paths[2], given.preset)
    assert again == given and page(again) == paths[0].read_text()
    assert json.loads(paths[2].read_text())["settings"]["images"] == 2000
    with Image.open(paths[3]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


@pytest.mark.parametrize(
    "cells, axes",
    [
        ([Cell(), Cell(m=2), Cell(m=4)], ["m", "seconds"]),
        ([Cell(), Cell(m=2), Cell(m=2, first_scale=0), Cell(m=(1, 5, 2))], ["first_scale", "seconds"]),
        ([Cell(), Cell(n=20), Cell(n=50, scale=2)], ["n", "scale", "seconds"]),
        ([Cell(), Cell(m=2)], ["seconds"]),
        (
            [Cell(), Cell(m=2), Cell(m=4, proposals=4), Cell(m=4, proposals=4, first_scale=0)],
            ["scored", "first_scale", "seconds"],
        ),
    ],
)
def test_axes(cells, axes):
    assert [axis.name for axis in sweep_report.axes_of(found(cells))] == axes


def test_times_of_one_m_are_drawn(tmp_path):
    given = found([Cell(), Cell(m=2)], settings={**SETTINGS, "timing": True}, shown=sweep_report.COSTS)
    assert [axis.name for axis in sweep_report.axes_of(given)] == ["m"] and len(write(given, tmp_path)) == 4


def test_lines_are_told_apart_by_what_the_axis_does_not_show():
    given = found([Cell(), Cell(m=2), Cell(m=4), Cell(m=4, pick="resample"), Cell(m=4, first_scale=0)])
    axis = next(axis for axis in sweep_report.axes_of(given) if axis.name == "m")
    labels = [sweep_report.line_of(given, cell, "m") for cell in given.preset.cells[1:]]
    assert labels == ["first_scale=1, pick=best"] * 2 + ["first_scale=1, pick=resample", "first_scale=0, pick=best"]
    assert [axis.value(entry) for entry in given.entries] == [None, 2.0, 4.0, 4.0, 4.0]
    assert sweep_report.line_of(given, Cell(m=4), "first_scale") == "m=4, pick=best"


def test_searches_of_different_kinds_share_no_line():
    cells = [Cell(), Cell(m=2), Cell(m=(1, 5, 2)), Cell(n=20), Cell(n=20, m=2), Cell(m=8)]
    given = found(cells)
    labels = [sweep_report.line_of(given, cell, "seconds") for cell in cells[1:]]
    assert labels == ["best of M", "M by scale", "density", "density and best of M", "best of M"]


# Between them they have every axis, figure and kind of search of all presets.
DRAWN = ("lsrs-table7", "lsrs-table9", "lsrs-fig3", "lsrs-fig6", "var-scaling-table2")


def of_preset(preset):
    """What a run of a preset finds, with every figure it may have."""
    settings = {**SETTINGS, "features": "inception", "timing": preset.timing}
    figures = {**result(0, 2.0), **dict.fromkeys([*PRESETS["lsrs-table7"].shown, *sweep_report.COSTS], 1.0)}
    entries = [Entry(cell, [figures]) for cell in preset.cells]
    return Found(preset, entries, settings, "varkern sweep")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_the_table_of_every_preset(preset):
    """Nothing in a table depends on figures that a run may lack."""
    given = of_preset(preset)
    table = lines(markdown(given))
    assert len(table) == len(preset.cells) + 2 and len({len(row) for row in table}) == 1
    for row, (cell, printed) in zip(table[2:], preset.rows, strict=True):
        for name, value in printed.items():
            assert row[table[0].index(f"paper: {sweep_report.FIGURES[name][0]}")] == f"{value:g}", (cell, name)


@pytest.mark.parametrize("name", DRAWN)
def test_the_pictures_of_presets(name, tmp_path):
    """Nor does anything in a picture."""
    assert write(of_preset(PRESETS[name]), tmp_path)[-1].stat().st_size > 5000


def test_the_drawn_presets_have_all_that_others_have():
    found = {name: of_preset(preset) for name, preset in PRESETS.items()}

    def shown(names):
        axes = {axis.name for name in names for axis in sweep_report.axes_of(found[name])}
        kinds = {sweep_report.kind(cell) for name in names for cell in PRESETS[name].cells}
        return axes, kinds, {panel for name in names for panel in sweep_report.list_panels(found[name])}

    assert shown(DRAWN) == shown(PRESETS)


def test_lines_are_told_apart_by_colour_and_marker():
    """As the palette by Okabe and Ito has it: no two lines differ by red against green alone."""
    from matplotlib.figure import Figure

    given = found([Cell(), *(Cell(m=m, first_scale=k) for k in range(7) for m in (2, 4))])
    panel = Figure().subplots()
    axis = next(axis for axis in sweep_report.axes_of(given) if axis.name == "m")
    sweep_report.draw_panel(panel, given, "fid", axis)
    lines = [container[0] for container in panel.containers]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines) == 7


def test_blocks_beside_best_of_m():
    """Cells with one whole map and proposals are no model alone, in the table and in the picture."""
    cells = [Cell(), Cell(m=8, pick="resample"), *(Cell(m=m, proposals=8, pick="resample") for m in (1, 8))]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in markdown(found(cells)).splitlines()]
    assert rows[0] == ["m", "proposals"]
    assert rows[2:] == [["1", "0"], ["8", "0"], ["1", "8"], ["8", "8"]]
    assert [sweep_report.kind(cell) for cell in cells] == ["", "best of M", "blocks", "blocks"]
    assert [sweep_report.number_of(cell, "m") for cell in cells] == [None, 8.0, 1.0, 8.0]


def test_blocks_are_drawn_over_the_number_of_scored_maps():
    """Two searches of the same m score different numbers of maps, and lie on one line over them."""
    cells = [Cell(), *(Cell(m=8, proposals=8, sweeps=sweeps, pick="resample") for sweeps in (1, 3)), Cell(m=16)]
    given = found(cells)
    for entry, scored in zip(given.entries, (None, 55.5, 150.0, 16.0), strict=True):
        for repeat in entry.repeats:
            repeat["scored"] = scored
    axis = sweep_report.axes_of(given)[0]
    assert axis.name == "scored" and [axis.value(entry) for entry in given.entries] == [None, 55.5, 150.0, 16.0]
    assert [sweep_report.line_of(given, cell, "scored") for cell in cells[1:]] == [
        "blocks, pick=resample",
        "blocks, pick=resample",
        "best of M, pick=best",
    ]
    assert [row[4] for row in lines(markdown(given))] == ["scored maps per scale", "---", "", "55.5", "150.0", "16.0"]
