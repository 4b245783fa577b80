"""RNN, LSTM and GRU whose hidden (and cell) state is quantised at every step.

    gates  = W_ih x_t + b_ih + W_hh h + b_hh          quantised x, W, b; gates in torch's order
    h, c   = cell(gates, h, c), quantised             what the next step and the next layer see

They derive from `nn.RNNBase` and not from `nn.LSTM` and its like: Dynamo refuses every instance of those three, and
these must compile without a graph break. All else is as in `torch.nn`: several layers, both directions, dropout,
projections, packed sequences, batch-less input, the same state dict. `batch_first` is True by default.

The batch sizes of a packed sequence are data, on which the number of steps depends: such input compiles with graph
breaks, to the same bits, and not with `fullgraph=True`, where padded input does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated

State = tuple[Tensor, ...]


class _Recurrent(QuantizedLayer, nn.RNNBase):
    """Everything but the arithmetic of one step."""

    torch_mode: ClassVar[str]
    states: ClassVar[int] = 1

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, spec: QuantSpec, *, batch_first: bool = True, **options: Any
    ) -> None:
        super().__init__(mode, input_size, hidden_size, batch_first=batch_first, **options)
        self.spec = spec

    def step(self, gates_x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
        """One step: the input's part of the gates `[B, gates·H]` and the state, to the new state."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As `torch.nn`: input `[B, T, F]` (or `[T, F]`, or a PackedSequence) → output and final state.

        A PackedSequence cannot be compiled with `fullgraph=True`; without it, it can.
        """
        packed = input if isinstance(input, PackedSequence) else None
        data, batch_sizes, batched = self._steps_first(input)
        state = self._initial_state(data, batch_sizes, hx, packed, batched=batched)
        # torch.nn's own questions about sizes, with its own messages
        shown = data if packed is not None else (data.transpose(0, 1) if self.batch_first else data)
        self._check(shown, state, None if packed is None else packed.batch_sizes)

        output, final = self._run(data, batch_sizes, state)
        return self._as_asked_for(output, final, packed, batched=batched)

    def _steps_first(self, input: Any) -> tuple[Tensor, list[int] | None, bool]:
        """Data as `[T, B, F]`, or as `[sum of batch sizes, F]` with the batch size of every step."""
        if isinstance(input, PackedSequence):
            return input.data, input.batch_sizes.tolist(), True
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            return input.unsqueeze(1), None, False
        return (input.transpose(0, 1) if self.batch_first else input), None, True

    def _initial_state(
        self, data: Tensor, batch_sizes: list[int] | None, hx: Any, packed: PackedSequence | None, *, batched: bool
    ) -> State:
        rows = batch_sizes[0] if batch_sizes is not None else data.shape[1]
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: self.states]
            return tuple(data.new_zeros(layers, rows, size) for size in sizes)
        given = tuple(hx) if self.states > 1 else (hx,)
        expected = 3 if batched else 2
        for h in given:
            if h.dim() != expected:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(f"For {kind} input, hx should also be {expected}-D but got {h.dim()}-D tensor")
        if not batched:
            given = tuple(h.unsqueeze(1) for h in given)
        if packed is not None and packed.sorted_indices is not None:
            given = tuple(h.index_select(1, packed.sorted_indices) for h in given)
        return given

    def _check(self, data: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        self.check_input(data, batch_sizes)
        self.check_hidden_size(state[0], cast(Any, self).get_expected_hidden_size(data, batch_sizes))
        if self.states > 1:
            expected = (state[0].shape[0], state[0].shape[1], self.hidden_size)
            self.check_hidden_size(state[1], expected, "Expected hidden[1] size {}, got {}")

    def _run(self, data: Tensor, batch_sizes: list[int] | None, state: State) -> tuple[Tensor, State]:
        directions = 2 if self.bidirectional else 1
        finals: list[State] = []
        for layer in range(self.num_layers):
            x = self._input(data) if layer == 0 else data
            results = []
            for direction in range(directions):
                index = layer * directions + direction
                start = tuple(self._state(s[index]) for s in state)
                y, final = self._one_direction(x, batch_sizes, start, layer, reverse=direction == 1)
                results.append(y)
                finals.append(final)
            data = results[0] if directions == 1 else torch.cat(results, -1)
            if self.dropout > 0 and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        return self._output(data), tuple(torch.stack([final[i] for final in finals]) for i in range(self.states))

    def _one_direction(
        self, x: Tensor, batch_sizes: list[int] | None, state: State, layer: int, *, reverse: bool
    ) -> tuple[Tensor, State]:
        weights = dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"))
        suffix = f"_l{layer}{'_reverse' if reverse else ''}"
        tensors: dict[str, Tensor | None] = {name: getattr(self, name + suffix, None) for name in weights}
        weight_ih, weight_hh = (self._weight(cast(Tensor, tensors[name])) for name in ("weight_ih", "weight_hh"))
        bias_ih, bias_hh = (self._bias(tensors[name]) for name in ("bias_ih", "bias_hh"))
        weight_hr = tensors["weight_hr"]
        projection = None if weight_hr is None else self._weight(weight_hr)
        gates = F.linear(x, weight_ih, bias_ih)  # of all steps at once
        steps: Sequence[Tensor] = gates.unbind(0) if batch_sizes is None else gates.split(batch_sizes)
        outputs: list[Tensor] = []
        for gates_x in reversed(steps) if reverse else steps:
            rows = gates_x.shape[0]
            new = self.step(gates_x, tuple(s[:rows] for s in state), weight_hh, bias_hh)
            if projection is not None:
                new = (F.linear(new[0], projection), *new[1:])
            new = tuple(self._state(s) for s in new)
            outputs.append(new[0])
            # Sequences that have ended (or, in reverse, not begun) keep their state.
            state = tuple(torch.cat((n, s[rows:])) if rows < s.shape[0] else n for n, s in zip(new, state, strict=True))
        if reverse:
            outputs.reverse()
        return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), state

    def _as_asked_for(self, output: Tensor, final: State, packed: PackedSequence | None, *, batched: bool) -> Any:
        result: Any
        if packed is not None:
            result = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            if packed.unsorted_indices is not None:
                final = tuple(s.index_select(1, packed.unsorted_indices) for s in final)
        elif not batched:
            result, final = output.squeeze(1), tuple(s.squeeze(1) for s in final)
        else:
            result = output.transpose(0, 1) if self.batch_first else output
        return result, (final if self.states > 1 else final[0])


class QuantizedRNN(_Recurrent):
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

    def step(self, gates_x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
        gates = gates_x + F.linear(state[0], weight_hh, bias_hh)
        return (torch.tanh(gates) if self.mode == "RNN_TANH" else torch.relu(gates),)


class QuantizedLSTM(_Recurrent):
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
    states = 2

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

    def step(self, gates_x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
        h, c = state
        in_gate, forget_gate, cell, out_gate = (gates_x + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
        c = torch.sigmoid(forget_gate) * c + torch.sigmoid(in_gate) * torch.tanh(cell)
        c = self._state(c)  # the hidden state is computed from the cell state that is kept
        return torch.sigmoid(out_gate) * torch.tanh(c), c


class QuantizedGRU(_Recurrent):
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

    def step(self, gates_x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
        (h,) = state
        reset_x, update_x, new_x = gates_x.chunk(3, -1)
        reset_h, update_h, new_h = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (new + update * (h - new),)
