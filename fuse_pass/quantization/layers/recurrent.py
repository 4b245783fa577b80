"""RNN, LSTM and GRU whose hidden (and cell) state is quantised at every step.

    gates  = W_ih x_t + b_ih + W_hh h + b_hh          quantised x, W, b; gates in torch's order
    h, c   = cell(gates, h, c), quantised             what the next step and the next layer see

The steps are those of `recurrence`. The state dict is that of `torch.nn`; `batch_first` is True by default.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated
from fuse_pass.quantization.layers.recurrence import GRUSteps, LSTMSteps, Product, Products, RNNSteps, State


class _Recurrent(QuantizedLayer, nn.RNNBase):
    """The parameters, quantised where they are multiplied; comes before the steps in the bases."""

    states: int

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, spec: QuantSpec, *, batch_first: bool = True, **options: Any
    ) -> None:
        super().__init__(mode, input_size, hidden_size, batch_first=batch_first, **options)
        self.spec = spec

    def products(self, suffix: str) -> Products:
        weights = [self._weight(cast(Tensor, getattr(self, f"weight_{part}{suffix}"))) for part in ("ih", "hh")]
        biases = [self._bias(cast(Any, getattr(self, f"bias_{part}{suffix}", None))) for part in ("ih", "hh")]
        projection = cast(Any, getattr(self, f"weight_hr{suffix}", None))
        return Products(
            _by(weights[0], biases[0]),
            _by(weights[1], biases[1]),
            None if projection is None else _by(self._weight(projection), None),
        )

    def check_sizes(self, data: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        self.check_input(data, batch_sizes)
        self.check_hidden_size(state[0], cast(Any, self).get_expected_hidden_size(data, batch_sizes))
        if self.states > 1:
            expected = (state[0].shape[0], state[0].shape[1], self.hidden_size)
            self.check_hidden_size(state[1], expected, "Expected hidden[1] size {}, got {}")


def _by(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


class QuantizedRNN(_Recurrent, RNNSteps):
    """`nn.RNN`: `h = tanh(W_ih x + b_ih + W_hh h + b_hh)`, or ReLU.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        num_layers: layers on top of each other.
        bias: whether there are biases.
        nonlinearity: `"tanh"` or `"relu"`.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: `batch_first` (here True by default), `dropout`, `bidirectional`, `device`, `dtype`.
    """

    float_type = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        num_layers: int = 1,
        bias: bool = True,
        nonlinearity: str = "tanh",
        rmode: int | str = 1,
        *,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, spec or simulated(exp_bits, sig_bits, rmode),
            num_layers=num_layers, bias=bias, **options,
        )  # fmt: skip


class QuantizedLSTM(_Recurrent, LSTMSteps):
    """`nn.LSTM` (1997 Hochreiter and Schmidhuber, with forget gate): hidden and cell state are quantised at every step.

    Args:
        input_size: features of the input.
        hidden_size: features of the cell state.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        num_layers: layers on top of each other.
        bias: whether there are biases.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: `batch_first` (here True by default), `dropout`, `bidirectional`, `proj_size`, `device`, `dtype`.
    """

    float_type = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        num_layers: int = 1,
        bias: bool = True,
        rmode: int | str = 1,
        *,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, spec or simulated(exp_bits, sig_bits, rmode),
            num_layers=num_layers, bias=bias, **options,
        )  # fmt: skip


class QuantizedGRU(_Recurrent, GRUSteps):
    """`nn.GRU` (1406.1078), reset gate after the product as in cuDNN and `torch.nn`.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        num_layers: layers on top of each other.
        bias: whether there are biases.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: `batch_first` (here True by default), `dropout`, `bidirectional`, `device`, `dtype`.
    """

    float_type = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        num_layers: int = 1,
        bias: bool = True,
        rmode: int | str = 1,
        *,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, spec or simulated(exp_bits, sig_bits, rmode),
            num_layers=num_layers, bias=bias, **options,
        )  # fmt: skip
