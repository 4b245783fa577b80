"""Linear → activation → [dropout] → Linear:  `y = dropout(act(x W1ᵀ + b1)) W2ᵀ + b2`.

Shapes: x `[..., d_in]`, W1 `[d_hidden, d_in]`, W2 `[d_out, d_hidden]`, y `[..., d_out]`; biases are optional.

1×1 convolutions count as Linear layers along dimension 1 (see `channels`); of images of one pixel, the first may be one
and the second a Linear behind a flattening; the second may be one whose channels are the features of a Linear.

In a chain Linear → act → Linear → act → Linear the middle Linear ends one match and begins the next.

Declines when: an interior value has a second reader; anything that writes, or switches autocast or grad mode, lies
inside; a cast changes the dtype inside; a bias is added in another dtype; a written-out activation has other constants;
the rows are rearranged between the two Linear layers; PReLU has a slope per channel that is not the last dimension; a
tensor is a subclass or on another device; the user wants eager's random numbers; no Linear reads the activation; a
convolution is grouped, or its layout costs more to change than the fusion gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.convolution import CHANNELS, pointwise_layers
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import expert_layers
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView, Linear, Walk
from fuse_pass.ops.activations import ACTIVATIONS
from fuse_pass.patterns.activation_forms import FoundActivation, activation_at
from fuse_pass.patterns.channels import (
    channels_back,
    channels_to_the_end,
    cost_of_few_rows,
    cost_of_layout,
    cost_of_mixing,
    features_become_channels,
    rows_to_channels,
)
from fuse_pass.patterns.linear_chain import (
    as_arguments,
    as_linear_weight,
    problem_of_bias,
    problem_of_casts,
    problem_of_groups,
    problem_of_walks,
    through_dropout,
    through_quantisation,
)
from fuse_pass.patterns.pattern import Candidate, Pattern, hidden_in_encoder_layers
from fuse_pass.report import Reason


def reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    arguments: tuple[float, ...] = (),
    act_weight: Tensor | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch; `keep` is the dropout mask, shaped like the hidden value."""
    a = ACTIVATIONS[activation].forward(F.linear(x, weight1, bias1), arguments, act_weight)
    if keep is not None:
        a = torch.where(keep, a / (1 - p), 0.0) if p < 1 else torch.zeros_like(a)
    return F.linear(a, weight2, bias2)


def example_inputs(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, rows: tuple[int, ...] = (3, 5)
) -> dict[str, Any]:
    def parameter(*shape: int) -> Tensor:
        value = torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])
        return value.to(dtype).requires_grad_()

    return {
        "x": torch.randn(*rows, 8, dtype=torch.float64).to(dtype).requires_grad_(),
        "weight1": parameter(24, 8),
        "bias1": parameter(24) if bias else None,
        "weight2": parameter(16, 24),
        "bias2": parameter(16) if bias else None,
    }


def _view_between(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    h = F.gelu(F.linear(x, w1, b1)).view(-1, w1.shape[0]).view(*x.shape[:-1], w1.shape[0])
    return F.linear(h, w2, b2)


def _conv1d(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GPT-2's Conv1D: addmm on a flattened input, weights stored `[in, out]`."""
    v1, v2 = w1.t().contiguous(), w2.t().contiguous()
    h = torch.addmm(b1, x.view(-1, x.size(-1)), v1).view((*x.shape[:-1], v1.shape[1]))
    a = 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0))))
    return torch.addmm(b2, a.view(-1, a.size(-1)), v2).view((*x.shape[:-1], v2.shape[1]))


def _in_place(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.dropout(F.relu(F.linear(x, w1, b1), inplace=True), 0.0, True, True), w2, b2)


# Called as f(x, weight1, bias1, weight2, bias2); each must be found once.
SPELLINGS: dict[str, Any] = {
    "linear, gelu, linear": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    "gelu tanh": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),
    "dropout": lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.25), w2, b2),
    "inactive dropout": lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.25, False), w2, b2),
    "no biases": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1)), w2),
    "matmul": lambda x, w1, b1, w2, b2: F.gelu(x @ w1.T + b1) @ w2.t() + b2,
    "matmul, bias first": lambda x, w1, b1, w2, b2: b2 + torch.matmul(F.gelu(b1 + x.matmul(w1.mT)), w2.transpose(0, 1)),
    "matmul, permute, no biases": lambda x, w1, b1, w2, b2: torch.matmul(F.gelu(x @ w1.permute(1, 0)), w2.T),
    "addmm (Conv1D)": _conv1d,
    "einsum": lambda x, w1, b1, w2, b2: (
        torch.einsum("oi,...i->...o", w2, F.gelu(torch.einsum("...i,oi->...o", x, w1) + b1)) + b2
    ),
    "einsum, weights stored [in, out]": lambda x, w1, b1, w2, b2: torch.einsum(
        "...f,fd->...d", F.gelu(torch.einsum("...d,df->...f", [x, w1.t()])), w2.mT
    ),
    "einsum of letters": lambda x, w1, b1, w2, b2: torch.einsum(
        "btf, df -> btd", F.gelu(torch.einsum("btd, fd -> btf", x, w1)), w2
    ),
    "views between": _view_between,
    "in place": _in_place,
    "relu": lambda x, w1, b1, w2, b2: F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2),
    "relu method": lambda x, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1).relu(), w2, b2),
    "leaky_relu": lambda x, w1, b1, w2, b2: F.linear(F.leaky_relu(F.linear(x, w1, b1), 0.2), w2, b2),
    "prelu": lambda x, w1, b1, w2, b2: F.linear(F.prelu(F.linear(x, w1, b1), b1[:1]), w2, b2),
    "elu": lambda x, w1, b1, w2, b2: F.linear(F.elu(F.linear(x, w1, b1), 0.7), w2, b2),
    "selu": lambda x, w1, b1, w2, b2: F.linear(F.selu(F.linear(x, w1, b1)), w2, b2),
    "silu": lambda x, w1, b1, w2, b2: F.linear(F.silu(F.linear(x, w1, b1)), w2, b2),
    "mish": lambda x, w1, b1, w2, b2: F.linear(F.mish(F.linear(x, w1, b1)), w2, b2),
    "relu6": lambda x, w1, b1, w2, b2: F.linear(F.relu6(F.linear(x, w1, b1)), w2, b2),
    "hardtanh": lambda x, w1, b1, w2, b2: F.linear(F.hardtanh(F.linear(x, w1, b1), -0.5, 0.7), w2, b2),
    "hardsigmoid": lambda x, w1, b1, w2, b2: F.linear(F.hardsigmoid(F.linear(x, w1, b1)), w2, b2),
    "hardswish": lambda x, w1, b1, w2, b2: F.linear(F.hardswish(F.linear(x, w1, b1)), w2, b2),
    "sigmoid": lambda x, w1, b1, w2, b2: F.linear(torch.sigmoid(F.linear(x, w1, b1)), w2, b2),
    "tanh": lambda x, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1).tanh(), w2, b2),
    "softplus": lambda x, w1, b1, w2, b2: F.linear(F.softplus(F.linear(x, w1, b1), 2.0, 3.0), w2, b2),
    "squared relu": lambda x, w1, b1, w2, b2: F.linear(torch.square(F.relu(F.linear(x, w1, b1))), w2, b2),
    "hardswish written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * F.relu6(h + 3) / 6)(F.linear(x, w1, b1)), w2, b2
    ),
    "gelu written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * 0.5 * (1.0 + torch.erf(h / 1.4142135623730951)))(F.linear(x, w1, b1)), w2, b2
    ),
    "gelu tanh written out with products": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: 0.5 * h * (1 + (h * 0.7978845608 * (1 + 0.044715 * h * h)).tanh()))(F.linear(x, w1, b1)), w2, b2
    ),
    "quick gelu written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * torch.sigmoid(1.702 * h))(F.linear(x, w1, b1)), w2, b2
    ),
    "silu written out": lambda x, w1, b1, w2, b2: F.linear((lambda h: h.sigmoid().mul(h))(F.linear(x, w1, b1)), w2, b2),
    "mish written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * torch.tanh(F.softplus(h)))(F.linear(x, w1, b1)), w2, b2
    ),
}


def find(view: GraphView, taken: Set[Node]) -> Iterator[Candidate]:
    explained: set[Node] = set()
    layers = {**expert_layers(view), **pointwise_layers(view), **view.linears}
    for second in sorted(layers.values(), key=lambda layer: view.position[layer.node]):
        candidate, activation = _ending_in(view, layers, second, taken)
        if activation is not None:
            explained.update(activation.nodes)
        if candidate is not None:
            yield candidate
    for node in view.nodes:
        if node not in explained:
            yield from _without_second_linear(view, node)
    yield from hidden_in_encoder_layers(view)


def _ending_in(
    view: GraphView, layers: Mapping[Node, Linear], second: Linear, taken: Set[Node]
) -> tuple[Candidate | None, FoundActivation | None]:
    upper = view.walk_up(second.input)
    walks = [upper]
    nodes: list[Node] = [*second.nodes, *upper.passed]
    moved = _through_move(view, second, walks, nodes)
    act_format = through_quantisation(view, walks, nodes)
    p = through_dropout(view, walks, nodes)
    result_format = through_quantisation(view, walks, nodes)  # of the activation itself, where dropout follows it
    moved = moved or _through_move(view, second, walks, nodes)
    activation = activation_at(view, walks[-1].node)
    if activation is None:
        return None, None
    walks.append(view.walk_up(activation.input))
    nodes += [*activation.nodes, *walks[-1].passed]
    moved = moved or _through_move(view, second, walks, nodes)
    hidden_format = through_quantisation(view, walks, nodes)
    first = layers.get(walks[-1].node)
    formats = (hidden_format, act_format, result_format)
    if first is None or not _belong_together(first, second, moved, formats):
        return None, activation
    in_chain = first.node in taken  # the first Linear ends an accepted match: its output is our input
    candidate = _candidate(view, first, activation, second, p, walks, nodes, formats, moved, in_chain=in_chain)
    return candidate, activation


@dataclass(frozen=True)
class _Move:
    """Where rows become channels: the node, and how many of the walks lie below it."""

    node: Node
    below: int


def _through_move(view: GraphView, second: Linear, walks: list[Walk], nodes: list[Node]) -> _Move | None:
    node = walks[-1].node
    if not features_become_channels(view, second, node):
        return None
    walks.append(view.walk_up(node.args[0]))  # type: ignore[arg-type]  # a tensor is permuted
    nodes += [node, *walks[-1].passed]
    return _Move(node, len(walks) - 1)


def _belong_together(first: Linear, second: Linear, moved: _Move | None, formats: tuple[list[int], ...]) -> bool:
    if moved is not None:  # a quantisation may go by blocks of the last dimension
        return first.features != CHANNELS and not any(formats)
    return first.features == second.features or _is_flattened(first, second)


def _is_flattened(first: Linear, second: Linear) -> bool:
    """A Linear behind a 1×1 convolution of images of one pixel, as in the head of a MobileNet."""
    value = value_of(first.node)
    is_one_pixel = value is not None and all(same_size(size, 1) for size in value.shape[2:])
    return is_one_pixel and first.features == CHANNELS and second.features != CHANNELS


def _candidate(
    view: GraphView,
    first: Linear,
    activation: FoundActivation,
    second: Linear,
    p: Any,
    walks: list[Walk],
    nodes: list[Node],
    formats: tuple[list[int], ...],
    moved: _Move | None,
    *,
    in_chain: bool,
) -> Candidate:
    if not in_chain:
        nodes = [*nodes, *first.nodes]
    drops = bool(p) if isinstance(p, (int, float)) else True
    inputs = {
        "x": first.node if in_chain else first.input,
        "weight1": None if in_chain else first.weight,
        "bias1": None if in_chain else first.bias,
        "weight2": second.weight,
        "bias2": second.bias,
        "act_weight": activation.weight,
    }
    constants = {
        "transposed1": first.transposed,
        "transposed2": second.transposed,
        "features": second.features,
        "flattened": moved is None and first.features != second.features,
        "moved": None if moved is None else moved.node,
        "p": p,
        "drops": drops,
        "activation": activation.name,
        "arguments": activation.arguments,
        "formats": formats,
    }
    words = [activation.name.replace("_", " ")]
    words += [f"dropout {p}"] if drops else []
    words += ["chained"] if in_chain else []
    words += ["1×1 convolutions"] if first.features == CHANNELS else []
    words += ["1×1 convolution behind a Linear"] if moved is not None else []
    words += ["fake-quantised"] if any(formats) else []
    return Candidate(
        anchor=second.node,
        nodes=frozenset(nodes),
        outputs=(second.node,),
        inputs=inputs,
        constants=constants,
        variant=", ".join(words),
        needs_random_numbers=drops,
        problem=problem_of_groups(view, first, second)
        or _problem_on_the_way(walks, first, second, moved)
        or activation.problem
        or problem_of_bias(first)
        or problem_of_bias(second)
        or _problem_of_width(first, second),
    )


def _problem_on_the_way(walks: list[Walk], first: Linear, second: Linear, moved: _Move | None) -> Problem | None:
    if moved is not None:
        return problem_of_casts(walks[: moved.below]) or problem_of_walks(walks[moved.below :], first.features)
    if first.features == second.features:
        return problem_of_walks(walks, second.features)
    before, after = value_of(first.node), value_of(second.input)
    if before is None or after is None or not same_shape(before.shape[:2], after.shape):
        return Problem(Reason.LAYOUT, f"{second.input.name} is not {first.node.name}, flattened", second.input)
    return problem_of_casts(walks)


def _problem_of_width(first: Linear, second: Linear) -> Problem | None:
    """A written-out activation may have multiplied a value with its own reshaped self."""
    before, after = value_of(first.node), value_of(second.input)
    if before is None or after is None or not same_size(before.shape[first.features], after.shape[second.features]):
        return Problem(Reason.LAYOUT, f"{second.input.name} is not as wide as {first.node.name}", second.input)
    return None


# Where no Linear follows, these are gates and probabilities, not an unfinished feed-forward block.
_GATES = ("sigmoid", "hardsigmoid", "tanh", "softplus")


def _without_second_linear(view: GraphView, node: Node) -> Iterator[Candidate]:
    """A Linear → activation that leads elsewhere is a near miss worth explaining."""
    activation = activation_at(view, node)
    if activation is None or activation.problem is not None or activation.name in _GATES:
        return
    walk = view.walk_up(activation.input)
    first = view.linears.get(walk.node)
    if first is None:
        return
    readers = list(node.users)
    names = ", ".join("the output" if user.op == "output" else user.name for user in readers) or "nothing"
    reason = Reason.SECOND_READER if len(readers) > 1 else Reason.NO_SECOND_LINEAR
    problem = Problem(reason, f"{activation.name} is read by {names}", node)
    yield Candidate(node, frozenset((*first.nodes, *activation.nodes)), (), {}, {}, activation.name, problem=problem)


def check(view: GraphView, candidate: Candidate) -> Problem | None:
    x, y = value_of(candidate.inputs["x"]), value_of(candidate.anchor)
    costs = None
    if candidate.constants["moved"] is not None:
        costs = cost_of_mixing(candidate.anchor, x, y)
    elif candidate.constants["features"] == CHANNELS:
        costs = cost_of_layout(candidate.anchor, x, y)
    elif candidate.constants["flattened"]:
        costs = cost_of_few_rows(candidate.anchor, x)
    elif x is None or y is None or not same_shape(x.shape[:-1], y.shape[:-1]):
        return Problem(Reason.LAYOUT, "the rows of the result are arranged otherwise than those of x", candidate.anchor)
    if costs is not None:
        return costs
    weight1 = value_of(candidate.inputs["weight1"])
    if weight1 is not None and weight1.requires_grad:
        return None  # eager keeps x too
    return written_later(view, candidate.anchor, candidate.inputs["x"])


def replace(editor: Editor, candidate: Candidate) -> None:
    inputs, constants = candidate.inputs, candidate.constants
    y_value = value_of(candidate.anchor)
    assert y_value is not None
    moved = constants["moved"]
    along_channels = constants["features"] == CHANNELS and moved is None
    with editor.at(candidate.outputs, candidate.nodes):
        convolves = constants["features"] == CHANNELS
        weight2 = as_linear_weight(editor, inputs["weight2"], constants["transposed2"], convolves)
        seed = editor.call_ours(torch.ops.fuse_pass.seed.default, device=y_value.device) if constants["drops"] else None
        tail = (weight2, inputs["bias2"], inputs["act_weight"], seed)
        settings = (
            constants["p"] if constants["drops"] else 0.0,
            constants["activation"],
            list(constants["arguments"]),
            *as_arguments(constants["formats"]),
        )
        x = channels_to_the_end(editor, inputs["x"]) if along_channels else inputs["x"]
        x = editor.call("flatten", x, 1) if constants["flattened"] else x
        if inputs["weight1"] is None:
            y = editor.call_ours(torch.ops.fuse_pass.act_dense.default, x, *tail, *settings)
        else:
            weight1 = as_linear_weight(
                editor, inputs["weight1"], constants["transposed1"], along_channels or constants["flattened"]
            )
            arguments = (x, weight1, inputs["bias1"], *tail, *settings)
            if y_value.requires_grad:
                y = editor.item(editor.call_ours(torch.ops.fuse_pass.dense_act_dense.default, *arguments), 0)
            else:
                y = editor.call_ours(torch.ops.fuse_pass.dense_act_dense_inference.default, *arguments)
        y = channels_back(editor, y, y_value) if along_channels else y
        y = y if moved is None else rows_to_channels(editor, y, moved, candidate.anchor)
    editor.replace(candidate.anchor, y)
    editor.erase(candidate.nodes)


PATTERN = Pattern("dense_act_dense", find, check, replace, reference, SPELLINGS, example_inputs)
