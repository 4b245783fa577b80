"""What the documents say: their code runs, their figures are those that were measured, their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuse_pass.bench.results import read

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.mark.parametrize(("page", "least"), [("extending", 4), ("export", 3)])
def test_the_code_of_a_page_runs(page: str, least: int, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert len(blocks) >= least
    script = tmp_path / "tutorial.py"
    script.write_text("\n\n".join(blocks))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_readme_shows_rows_of_the_committed_run() -> None:
    measured = {result.name: result for result in read(ROOT / "benchmarks" / "amd-epyc-avx512.json").results}
    rows = re.findall(r"^\| `([\w-]+/[\w/-]+)` \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(rows) >= 6
    for name, cells in rows:
        result = measured[name]
        milliseconds = [f"{1000 * result.seconds[who].median:.3g}" for who in ("eager", "torch.compile", "fuse_pass")]
        ratios = result.time_by_ours
        best = min(ratio for who, ratio in ratios.items() if who != "eager")
        assert cells.split(" | ") == [*milliseconds, f"{ratios['torch.compile']:.2f}", f"{best:.2f}"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|json))`", document.read_text())
    homes = (ROOT, ROOT / "fuse_pass", document.parent)
    assert [name for name in named if not any((home / name).exists() for home in homes)] == []
