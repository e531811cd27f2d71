"""Tables of a page, between the markers ``<!-- table NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from varkern.studies import report
from varkern.studies.cells import Cell
from varkern.studies.sweep import Entry
from varkern.tables import markdown_table

from . import scorers, tables

REFERENCE_FIGURES = ("fid", "sfid", "inception_score", "precision", "recall")
REFERENCES = {"real": "other real digits", "reconstructed": "the same, encoded and decoded by the VQ-VAE"}


def list_tables() -> list[str]:
    return [*tables.presets(), "references", "scorers"]


def fill(page: str, found: Mapping[str, str], others: Collection[str] = ()) -> str:
    """Put every table of ``found`` between its markers in ``page``; the tables ``others`` stay as they are.

    Raises:
        ValueError: if ``page`` has markers of an unknown table.
    """

    def block(match: re.Match) -> str:
        if match[1] in others and match[1] not in found:
            return match[0]
        if match[1] not in found:
            raise ValueError(f"the page's tables must be among {', '.join(found)}, got {match[1]!r}")
        return f"<!-- table {match[1]} -->\n{found[match[1]].strip()}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def read_tables(folder: Path) -> dict[str, str]:
    """The tables of a folder of figures as Markdown, by name; those that the folder has."""
    found = {}
    for name, preset in tables.presets().items():
        if (path := folder / f"{name}.json").exists():
            found[name] = report.markdown(report.from_file(path, preset))
    for name, as_markdown in (("references", references), ("scorers", scorers.markdown)):
        if (path := folder / f"{name}.json").exists():
            found[name] = as_markdown(json.loads(path.read_text()))
    return found


def references(rows: Mapping[str, list[dict]]) -> str:
    """The table of other real digits and of the same digits after the VQ-VAE."""
    lines = []
    for name, title in REFERENCES.items():
        entry = Entry(Cell(), rows[name])
        lines.append(
            [title, *(report.format_summary(report.summary(entry, n), report.FIGURES[n][1]) for n in REFERENCE_FIGURES)]
        )
    heading = {name: title for name, (title, _) in report.FIGURES.items()} | report.OTHER_FEATURES
    return markdown_table(["", *(heading[name] for name in REFERENCE_FIGURES)], lines)
