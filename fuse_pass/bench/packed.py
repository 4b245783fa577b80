"""The rows of `bench` about packed weights: what `fuse_pass.pack` gives, against the model in eager float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fuse_pass.bench.models import mlp
from fuse_pass.bench.rows import minilm
from fuse_pass.commands import sentence_encoder
from fuse_pass.commands.named_models import Example
from fuse_pass.numerics.bit_codes import VARIANTS
from fuse_pass.quantization.pack import pack, unpack


@dataclass(frozen=True)
class Models:
    """A float model with its inputs, and the same model packed."""

    plain: Example
    packed: torch.nn.Module


@dataclass(frozen=True)
class PackedRow:
    """One line of the benchmark.

    Attributes:
        name: what is measured.
        spec: of `fuse_pass.pack`.
        build: the float model with its inputs, on the CPU.
        needs: modules without which there is no model.
    """

    name: str
    spec: str
    build: Callable[[], Example]
    needs: tuple[str, ...] = ()
    is_reference: ClassVar[bool] = False

    def models(self, device: str = "cpu") -> Models:
        """Built anew. Weights of 1 and 1.58 bits are for models that were trained with them: for those the float model
        holds the values that its weights have there."""
        built = self.build()
        model = built.model.to(device).eval()
        packed = pack(model, self.spec)
        plain = unpack(packed) if self.spec in VARIANTS else model
        return Models(Example(plain, tuple(value.to(device) for value in built.args)), packed)


def _mlp(rows: int) -> Callable[[], Example]:
    return lambda: Example(mlp(768, 3072), (torch.randn(rows, 768),))


PACKED_ROWS = (
    *(
        PackedRow(f"numbers/packed/{spec}/{rows}", spec, _mlp(rows))
        for spec, counts in {
            "int8": (1, 16, 512, 4096),
            "int8_weight_only": (1, 16, 512),
            "int4_weight_only": (1, 4, 16, 512),
            "b1.58": (1, 16, 512),
        }.items()
        for rows in counts
    ),
    *(
        PackedRow(f"numbers/packed/{spec}/minilm/{count}", spec, minilm(count), sentence_encoder.NEEDS)
        for spec in ("int8", "int4_weight_only")
        for count in (1, 40)
    ),
)
