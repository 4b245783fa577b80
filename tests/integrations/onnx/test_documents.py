"""What docs/onnx.md shows and the example run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parents[3]


def test_the_document(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "onnx.md").read_text(), flags=re.M | re.S)
    assert len(blocks) == 1
    (tmp_path / "document.py").write_text(blocks[0])
    result = subprocess.run([sys.executable, "document.py"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "packed.onnx").exists()
