"""Every example of the seeds on layers runs as it is written there, with only the import changed."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass.nn

SEEDS = Path(__file__).parent.parent / "data" / "seeds"
IMPORTS = "import torch; from fuse_pass.nn import *; from fuse_pass import *\n"
MARKDOWN = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RST = re.compile(r"^( *)\.\. code-block:: python\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
PRINTED = re.compile(r"^print\(.*\)  # (?:Expected: )?(torch\.Size\(.*\))$", re.MULTILINE)
SHAPE_OF = re.compile(r"^(\w+)\b.* = .*# Shape: \[(.*)\]$", re.MULTILINE)
SHAPE_OF_NAME = re.compile(r"(\w+): \[([\d, ]+)\]")
SIGNATURE = re.compile(r"^\.\. class:: (\w+)(\(.*\))$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A code block of a seed, and what the seed says in words instead of numbers.

    Attributes:
        seed: name of the file.
        number: of the block among the file's examples.
        shapes: of tensors that the block makes and whose shape it does not state.
    """

    seed: str
    number: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def code(self) -> str:
        return blocks_of(self.seed)[self.number]


EXAMPLES = (
    Example("fused_dense_gelu_dense", 0, {"out": (1, 512)}),
    Example("fused_dense_gelu_dense", 1, {"out": (1, 256)}),
    Example("fused_dense_gelu_dense", 2, {"out": (1, 512)}),
    Example("fused_dropout_layer_norm", 0, {"output": (1, 512)}),
    Example("fused_dropout_layer_norm", 1, {"output": (10, 512)}),
    Example("fused_dropout_layer_norm", 2, {"output": (1, 512)}),
    Example("bit_linear", 0, {"output": (128, 20)}),
    Example("bit_linear", 1, {"output": (128, 20)}),
    Example("bit_linear", 2, {"output": (128, 20)}),
    Example("quantized_layers", 0, {"y": (2, 5)}),
    Example("quantized_layers", 1, {"y": (2, 10, 512), "weights": (2, 10, 10)}),
    Example("quantized_layers", 2, {"y": (2, 10, 512)}),
    Example("quantized_layers", 3, {"y": (2, 16, 30, 30)}),
    Example("quantized_layers", 4, {"y": (2, 5, 20), "h": (1, 2, 20)}),
    Example("quantized_layers", 5, {"y": (2, 5, 20), "h": (1, 2, 20), "c": (1, 2, 20)}),
    Example("quantized_layers", 6, {"y": (2, 5, 20), "h": (1, 2, 20)}),
    Example("quantized_layers", 7, {"y": (2, 3, 32, 32)}),
)


def text_of(seed: str) -> str:
    return (SEEDS / f"{seed}.txt").read_text(encoding="utf-8")


def blocks_of(seed: str) -> list[str]:
    """The examples: all Python blocks but those that only show a signature."""
    text = text_of(seed)
    blocks = MARKDOWN.findall(text) + [textwrap.dedent(block) for _, block in RST.findall(text)]
    return [block for block in blocks if re.search(r"^\w.* = \w+\(", block, re.MULTILINE)]


def stated_shapes(code: str) -> dict[str, tuple[int, ...]]:
    """What the comments behind assignments say of the assigned tensors."""
    found = SHAPE_OF.findall(code)
    for comment in re.findall(r"#.*$", code, re.MULTILINE):
        found += SHAPE_OF_NAME.findall(comment.replace("Shape:", ""))
    return {name: tuple(int(size) for size in sizes.split(",")) for name, sizes in found}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.seed}-{example.number}")
def test_example(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.sub(r"from zeta\.nn(\.quant)? import", "from fuse_pass.nn import", example.code)
    space: dict[str, Any] = {"__name__": "example"}
    # Some blocks go on where an earlier one ended and import nothing themselves.
    exec(compile(code if "import" in code else IMPORTS + code, example.seed, "exec"), space)
    assert capsys.readouterr().out.splitlines() == PRINTED.findall(code), "what the comments say is printed"
    stated = stated_shapes(code)
    assert stated.items() <= example.shapes.items(), "read from the comments"
    for name, shape in example.shapes.items():
        tensor = space[name]
        assert isinstance(tensor, Tensor)
        assert tuple(tensor.shape) == shape
        assert torch.isfinite(tensor).all()
    module = next(value for value in space.values() if isinstance(value, nn.Module))
    used = {type(part).__name__ for part in module.modules() if type(part).__module__.startswith("fuse_pass")}
    assert used, "the layer is ours"


def test_no_example_is_missing() -> None:
    assert all(blocks_of(seed) for seed in {example.seed for example in EXAMPLES})
    there = [(path.stem, number) for path in SEEDS.glob("*.txt") for number, _ in enumerate(blocks_of(path.stem))]
    assert sorted(there) == sorted((example.seed, example.number) for example in EXAMPLES)
    stated = [stated_shapes(example.code) or PRINTED.findall(example.code) for example in EXAMPLES]
    assert sum(map(bool, stated)) == len(EXAMPLES) - 2, "all but two blocks state a shape"


@pytest.mark.parametrize(("name", "signature"), SIGNATURE.findall(text_of("quantized_layers")))
def test_signature(name: str, signature: str) -> None:
    """The seed's parameters come first, in its order and with its defaults; those without one may have one here."""
    space: dict[str, Any] = {}
    exec(f"def stated{signature}: ...", space)
    stated = inspect.signature(space["stated"]).parameters
    ours = inspect.signature(getattr(fuse_pass.nn, name)).parameters
    assert list(ours)[: len(stated)] == list(stated)
    for key, parameter in stated.items():
        assert ours[key].kind is parameter.kind
        assert parameter.default in (inspect.Parameter.empty, ours[key].default)
