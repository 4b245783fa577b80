"""Every example runs as it stands; what it prints of fusions and agreement, and asserts, goes onto the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.integrations.tiny import ROOT

pytestmark = pytest.mark.integration

# What it cannot do without, and the tool whose version stands on the page.
EXAMPLES = {
    "export": ("torch", "torch"),
    "onnx_export": ("onnxruntime", "onnxruntime"),
    "sentence_embeddings": ("sentence_transformers", "sentence-transformers"),
    "transformers_generate": ("transformers", "transformers"),
    "transformers_pipeline": ("transformers", "transformers"),
    "transformers_quantized": ("transformers", "transformers"),
    "transformers_trainer": ("accelerate", "transformers"),
}
# "what was run: fused {…}; how it agrees"
LINE = re.compile(r"^(?P<ran>[^:\n]+): (?P<fused>(?:fused|packed) [^;]+); (?P<agreement>.*)$", re.MULTILINE)


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name: str, works_with: Callable[..., None]) -> None:
    module, tool = EXAMPLES[name]
    pytest.importorskip(module)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    lines = list(LINE.finditer(result.stdout))
    assert lines, result.stdout
    for line in lines:
        fused = line["fused"].removeprefix("fused ").strip("{}").replace("'", "")
        works_with(tool, f"`examples/{name}.py`, {line['ran']}", fused, line["agreement"])
