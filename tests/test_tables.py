"""Markdown tables: every cell in its column, rows of another length refused."""

import pytest

from varkern.tables import markdown_table


def test_lines():
    found = markdown_table(["", "M"], [["alone", 1], (None, 2.5)])
    assert found == "|  | M |\n| --- | --- |\n| alone | 1 |\n|  | 2.5 |\n"


def test_no_rows():
    assert markdown_table(["a"], iter(())) == "| a |\n| --- |\n"


@pytest.mark.parametrize("row", [[], ["x"], ["x", "y", "z"]], ids=len)
def test_a_row_of_another_length(row):
    with pytest.raises(ValueError, match=f"must have 2 cells, one per title, got {len(row)}"):
        markdown_table(["a", "b"], [["x", "y"], row])
