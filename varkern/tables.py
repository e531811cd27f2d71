"""Tables in Markdown, for reports and pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Make a table; every line ``| cell | cell |`` ends with a line break.

    Args:
        head: titles of the columns.
        rows: rows with one cell per column; None is an empty cell.

    Raises:
        ValueError: if a row has a different number of cells.
    """
    rows = list(rows)
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row must have {len(head)} cells, one per title, got {len(row)}: {list(row)}")
    lines = [head, ["---"] * len(head), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
