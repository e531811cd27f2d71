"""Puts the figures of ``varkern demo table`` into README.md beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from varkern.studies import report as sweep_report
from varkern.studies.cells import Cell
from varkern.studies.sweep import Entry

from . import scorers
from .tables import presets


def check(page: str) -> None:
    """Raise ``ValueError`` if ``page`` has a place for a table that is not among those to come."""
    fill(page, dict.fromkeys((*presets(), "references", "scorers"), ""))


def fill(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with every table between its markers, ``<!-- table NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: if the page asks for a table that is not there.
    """

    def block(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"the page has a place for table {match[1]!r}, known are {', '.join(tables)}")
        return f"<!-- table {match[1]} -->\n{tables[match[1]].strip()}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def read_tables(folder: Path) -> dict[str, str]:
    """The tables of a folder of figures in Markdown, by name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "preset" in report:
            preset = presets()[report["preset"]]
            found[preset.name] = sweep_report.markdown(sweep_report.from_file(path, preset))
    rows = json.loads((folder / "references.json").read_text())
    titles = {"real": "real digits, another draw", "reconstructed": "the same through the VQ-VAE"}
    entries = {titles[name]: Entry(Cell(), repeats) for name, repeats in rows.items()}
    found["references"] = sweep_report.rows(entries, ["fid", "sfid", "inception_score", "precision", "recall"])
    found["scorers"] = scorers.markdown(json.loads((folder / "scorers.json").read_text()))
    return found
