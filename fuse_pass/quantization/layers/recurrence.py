"""RNN, LSTM and GRU step by step, whatever their products are made of.

    gates  = W_ih x_t + b_ih + W_hh h + b_hh          in torch's order
    h, c   = cell(gates, h, c)                        what the next step and the next layer see

All else is as in `torch.nn`: several layers, both directions, dropout, projections, packed sequences, batch-less input.
They do not derive from `nn.LSTM` and its like: Dynamo refuses every instance of those three, and these must compile
without a graph break.

The batch sizes of a packed sequence are data, on which the number of steps depends: such input compiles with graph
breaks, to the same bits, and not with `fullgraph=True`, where padded input does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
Product = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """Of one direction of one layer, biases included.

    Attributes:
        of_input: `[..., F] → [..., gates·H]`.
        of_hidden: `[B, H] → [B, gates·H]`.
        projection: `[B, H] → [B, P]`, or None.
    """

    of_input: Product
    of_hidden: Product
    projection: Product | None


class Recurrence(nn.Module):
    """Everything but the products and the arithmetic of one step."""

    states: ClassVar[int] = 1

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool
    dropout: float

    def products(self, suffix: str) -> Products:
        """Those of the direction whose parameters end in `suffix`, e.g. `_l0_reverse`."""
        raise NotImplementedError

    def step(self, gates_x: Tensor, state: State, of_hidden: Product) -> State:
        """One step: the input's part of the gates `[B, gates·H]` and the state, to the new state."""
        raise NotImplementedError

    def check_sizes(self, data: Tensor, state: State, batch_sizes: Tensor | None) -> None:
        """Raises what `torch.nn` raises for a wrong input or state."""
        raise NotImplementedError

    def _input(self, x: Tensor) -> Tensor:
        return x

    def _state(self, state: Tensor) -> Tensor:
        return state

    def _output(self, y: Tensor) -> Tensor:
        return y

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As `torch.nn`: input `[B, T, F]` (or `[T, F]`, or a PackedSequence) → output and final state.

        A PackedSequence cannot be compiled with `fullgraph=True`; without it, it can.
        """
        packed = input if isinstance(input, PackedSequence) else None
        data, batch_sizes, batched = self._steps_first(input)
        state = self._initial_state(data, batch_sizes, hx, packed, batched=batched)
        # torch.nn's own questions about sizes, with its own messages
        shown = data if packed is not None else (data.transpose(0, 1) if self.batch_first else data)
        self.check_sizes(shown, state, None if packed is None else packed.batch_sizes)

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
        products = self.products(f"_l{layer}{'_reverse' if reverse else ''}")
        gates = products.of_input(x)  # of all steps at once
        steps: Sequence[Tensor] = gates.unbind(0) if batch_sizes is None else gates.split(batch_sizes)
        outputs: list[Tensor] = []
        for gates_x in reversed(steps) if reverse else steps:
            rows = gates_x.shape[0]
            new = self.step(gates_x, tuple(s[:rows] for s in state), products.of_hidden)
            if products.projection is not None:
                new = (products.projection(new[0]), *new[1:])
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


class RNNSteps(Recurrence):
    """`h = tanh(W_ih x + b_ih + W_hh h + b_hh)`, or ReLU."""

    nonlinearity: str

    def step(self, gates_x: Tensor, state: State, of_hidden: Product) -> State:
        gates = gates_x + of_hidden(state[0])
        return (torch.tanh(gates) if self.nonlinearity == "tanh" else torch.relu(gates),)


class LSTMSteps(Recurrence):
    """1997 Hochreiter and Schmidhuber, with forget gate."""

    states = 2

    def step(self, gates_x: Tensor, state: State, of_hidden: Product) -> State:
        h, c = state
        in_gate, forget_gate, cell, out_gate = (gates_x + of_hidden(h)).chunk(4, -1)
        c = torch.sigmoid(forget_gate) * c + torch.sigmoid(in_gate) * torch.tanh(cell)
        c = self._state(c)  # the hidden state is computed from the cell state that is kept
        return torch.sigmoid(out_gate) * torch.tanh(c), c


class GRUSteps(Recurrence):
    """1406.1078, reset gate after the product as in cuDNN and `torch.nn`."""

    def step(self, gates_x: Tensor, state: State, of_hidden: Product) -> State:
        (h,) = state
        reset_x, update_x, new_x = gates_x.chunk(3, -1)
        reset_h, update_h, new_h = of_hidden(h).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (new + update * (h - new),)
