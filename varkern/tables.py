"""Tables in Markdown, as reports and pages hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines ``| cell | cell |`` under ``head``, each line with its line break.

    Args:
        head: the columns' titles.
        rows: as many cells each as there are titles; None is an empty cell.

    Raises:
        ValueError: if a row has another number of cells.
    """
    rows = list(rows)
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row must have {len(head)} cells, one per title, got {len(row)}: {list(row)}")
    lines = [head, ["---"] * len(head), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
