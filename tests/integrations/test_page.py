"""The page holds the rows of the tests, and nothing else changes in it."""

from __future__ import annotations

import pytest

from tests.integrations.page import END, START, Row, written

ROWS = [Row("z", "1", "b", "1 match", "equal"), Row("a", "2", "a", "2 matches", "1e-7")]


def test_rows_are_sorted_between_the_marks() -> None:
    page = written(f"# Title\n\n{START}old\n{END}\nmore\n", ROWS)
    assert page.startswith("# Title\n\n")
    assert page.endswith("\nmore\n")
    assert "old" not in page
    assert page.index("| a ") < page.index("| z ")
    assert written(page, ROWS) == page


def test_a_row_survives_json() -> None:
    assert Row.of_json(ROWS[0].to_json()) == ROWS[0]


def test_no_rows_and_no_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rows"):
        written(f"{START}{END}", [])
    with pytest.raises(ValueError, match="expected a page with"):
        written("# Title\n", ROWS)
