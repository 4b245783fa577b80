"""RNN, LSTM and GRU that hold their weights in few bits; made by `fuse_pass.pack`."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fuse_pass.quantization.layers.packed import PackedLinear, PackedParts
from fuse_pass.quantization.layers.recurrence import GRUSteps, LSTMSteps, Products, Recurrence, RNNSteps, State
from fuse_pass.quantization.packing import PackSpec

_PARTS = ("ih", "hh", "hr")


class _PackedRecurrent(PackedParts, Recurrence):
    """Every weight is a `PackedLinear`, with the bias that belongs to it: `ih_l0`, `hh_l0`, `hr_l0`, `ih_l0_reverse` …

    States are in the dtype of the input and are not rounded, but for the products. The gates are computed in the open,
    step by step. Called and answered as the layer of `torch.nn`; `to_float()` gives one back.

    Args:
        layer: whose weights are packed, with the same bias Parameters.
        spec: how they are packed.

    Raises:
        ValueError: see `packing.packed`.
    """

    float_type: ClassVar[type[nn.RNNBase]]

    def __init__(self, layer: nn.RNNBase, spec: PackSpec) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.proj_size = layer.input_size, layer.hidden_size, layer.proj_size
        self.num_layers, self.batch_first, self.bias = layer.num_layers, layer.batch_first, layer.bias
        self.bidirectional, self.dropout = bool(layer.bidirectional), layer.dropout
        self.spec = spec
        self.plain_weights = names_of_weights(layer)
        for name in self.plain_weights:
            part = name.removeprefix("weight_")
            bias: Any = getattr(layer, f"bias_{part}", None)
            setattr(self, part, PackedLinear.of_weight(cast(Tensor, getattr(layer, name)), spec, bias))
        self.train(layer.training)

    def products(self, suffix: str) -> Products:
        return Products(*(getattr(self, f"{part}{suffix}", None) for part in _PARTS))  # type: ignore[arg-type]

    def check_sizes(self, data: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        expected_dim = 3 if batch_sizes is None else 2
        if data.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {data.dim()}")
        if data.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.shape[-1]}"
            )
        rows = data.shape[0 if self.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        for place, (found, size) in enumerate(
            zip(state, (self.proj_size or self.hidden_size, self.hidden_size), strict=False)
        ):
            expected = (self.num_layers * (2 if self.bidirectional else 1), rows, size)
            if tuple(found.shape) != expected:
                which = "hidden size" if len(state) == 1 else f"hidden[{place}] size"
                raise RuntimeError(f"Expected {which} {expected}, got {list(found.shape)}")

    @torch.no_grad()
    def to_float(self) -> nn.RNNBase:
        """The layer of `torch.nn` with the real numbers that the codes stand for."""
        options: dict[str, Any] = {"proj_size": self.proj_size} if self.proj_size else {}
        float_type: Any = self.float_type
        layer: nn.RNNBase = float_type(
            self.input_size, self.hidden_size, num_layers=self.num_layers, bias=self.bias, batch_first=self.batch_first,
            dropout=self.dropout, bidirectional=self.bidirectional, device="meta", **self._own_options(), **options,
        )  # fmt: skip
        for name in self.plain_weights:
            part = name.removeprefix("weight_")
            linear = cast(PackedLinear, self.get_submodule(part)).to_float()
            setattr(layer, name, linear.weight)
            if linear.bias is not None:
                setattr(layer, f"bias_{part}", linear.bias)
        return layer.train(self.training)

    def _own_options(self) -> dict[str, Any]:
        return {}

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, {self.spec}"


def names_of_weights(layer: nn.RNNBase) -> tuple[str, ...]:
    """Of the Parameters that are packed."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    parts = _PARTS if layer.proj_size else _PARTS[:2]
    return tuple(
        f"weight_{part}_l{place}{direction}"
        for place in range(layer.num_layers)
        for direction in directions
        for part in parts
    )


class PackedRNN(_PackedRecurrent, RNNSteps):
    """`nn.RNN` with packed weights."""

    float_type = nn.RNN

    def __init__(self, layer: nn.RNN, spec: PackSpec) -> None:
        super().__init__(layer, spec)
        self.nonlinearity = layer.nonlinearity

    def _own_options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}


class PackedLSTM(_PackedRecurrent, LSTMSteps):
    """`nn.LSTM` with packed weights."""

    float_type = nn.LSTM


class PackedGRU(_PackedRecurrent, GRUSteps):
    """`nn.GRU` with packed weights."""

    float_type = nn.GRU
