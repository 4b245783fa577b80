"""What worked with which tool goes into docs/works-with.md, with `--write-works-with`; see `make test-integrations`.

A test records a row after its last assertion, so that a row of the page is a test that passed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.integrations.page import ROW, Row, written

PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
_OPTION = "--write-works-with"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, action="store_true", help="write what was recorded into docs/works-with.md")


@pytest.fixture
def works_with(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`works_with(package, what was run, what was fused, agreement with eager)` records a row."""

    def record(package: str, ran: str, fused: str, agreement: str) -> None:
        record_property(ROW, Row(package, version(package), ran, fused, agreement).to_json())

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    is_part = hasattr(config, "workerinput")  # of pytest-xdist: a process that ran some of the tests
    if is_part or not config.getoption(_OPTION, default=False):  # the option is unknown where this is found later
        return
    faults = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
    if faults:
        terminalreporter.write_line(f"{PAGE.name} stays as it was: {len(faults)} tests failed")
        return
    reports = terminalreporter.stats.get("passed", [])
    rows = [Row.of_json(value) for report in reports for name, value in report.user_properties if name == ROW]
    PAGE.write_text(written(PAGE.read_text(), rows))
    terminalreporter.write_line(f"{PAGE.name}: {len(rows)} rows")
