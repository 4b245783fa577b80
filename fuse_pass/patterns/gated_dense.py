"""A gated feed-forward block: `y = dropout(act(x Wgᵀ + bg) ⊙ (x Wuᵀ + bu)) W2ᵀ + b2` (GLU, ReGLU, GEGLU, SwiGLU).

Shapes: x `[..., d_in]`, Wg and Wu `[d_hidden, d_in]`, W2 `[d_out, d_hidden]`, y `[..., d_out]`; biases are optional.
Gate and up may also be the halves of one merged projection `[2 d_hidden, d_in]`, in either order. 1×1 convolutions
count as Linear layers along dimension 1 (see `channels`).

It comes before Linear → activation → Linear, which would explain each gate as a near miss.

Declines when: an interior value has a second reader; anything that writes, or switches autocast or grad mode, lies
inside; a cast changes the dtype inside; a bias is added in another dtype; a written-out activation has other constants;
gate and up differ in width, or their rows are rearranged; a tensor is a subclass or on another device; the user wants
eager's random numbers; a convolution is grouped, or its layout costs more to change than the fusion gives; every expert
of a mixture has weights of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.convolution import CHANNELS, pointwise_layers
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import expert_layers, has_experts
from fuse_pass.graph.halves import Half, half_of
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView, Linear, Walk
from fuse_pass.ops.activations import ACTIVATIONS
from fuse_pass.patterns.activation_forms import activation_at
from fuse_pass.patterns.channels import channels_back, channels_to_the_end, cost_of_layout
from fuse_pass.patterns.linear_chain import (
    as_arguments,
    as_linear_weight,
    problem_of_bias,
    problem_of_groups,
    problem_of_walks,
    through_dropout,
    through_quantisation,
)
from fuse_pass.patterns.pattern import Candidate, Pattern
from fuse_pass.report import Reason


def reference(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "silu",
    arguments: tuple[float, ...] = (),
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch; `keep` is the dropout mask, shaped like the hidden value."""
    gate = ACTIVATIONS[activation].forward(F.linear(x, gate_weight, gate_bias), arguments, None)
    a = gate * F.linear(x, up_weight, up_bias)
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
        "gate_weight": parameter(24, 8),
        "gate_bias": parameter(24) if bias else None,
        "up_weight": parameter(24, 8),
        "up_bias": parameter(24) if bias else None,
        "weight2": parameter(16, 24),
        "bias2": parameter(16) if bias else None,
    }


def _merged(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor) -> Tensor:
    return F.linear(x, torch.cat([wg, wu]), torch.cat([bg, bu]))


def _chunked(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    gate, up = _merged(x, wg, bg, wu, bu).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2, b2)


def _gate_second(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    up, gate = torch.split(_merged(x, wu, bu, wg, bg), wg.shape[0], -1)
    return F.linear(up * F.gelu(gate), w2, b2)


def _dropped(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    gate, up = torch.chunk(_merged(x, wg, bg, wu, bu), 2, -1)
    return F.linear(F.dropout(F.gelu(gate, approximate="tanh") * up, 0.25), w2, b2)


def _separate(activation: Any) -> Any:
    return lambda x, wg, bg, wu, bu, w2, b2: F.linear(activation(F.linear(x, wg, bg)) * F.linear(x, wu, bu), w2, b2)


# Called as f(x, gate_weight, gate_bias, up_weight, up_bias, weight2, bias2); each must be found once.
SPELLINGS: dict[str, Any] = {
    "silu": _separate(F.silu),
    "gelu": _separate(F.gelu),
    "gelu tanh": _separate(lambda h: F.gelu(h, approximate="tanh")),
    "relu": _separate(F.relu),
    "sigmoid": _separate(torch.sigmoid),
    "silu written out": _separate(lambda h: h * torch.sigmoid(h)),
    "gelu tanh written out": _separate(
        lambda h: 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0))))
    ),
    "up first": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.linear(x, wu, bu) * F.silu(F.linear(x, wg, bg)), w2, b2),
    "dropout": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.dropout(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), 0.25), w2, b2
    ),
    "inactive dropout": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.dropout(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), 0.25, False), w2, b2
    ),
    "no biases": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.silu(F.linear(x, wg)) * F.linear(x, wu), w2),
    "matmul": lambda x, wg, bg, wu, bu, w2, b2: (F.silu(x @ wg.T + bg) * (x @ wu.mT)) @ w2.t() + b2,
    "in place": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.silu(F.linear(x, wg, bg), inplace=True).mul(F.linear(x, wu, bu)), w2, b2
    ),
    "merged, chunk": _chunked,
    "merged, split, gate second": _gate_second,
    "merged, dropout": _dropped,
    "merged, glu": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.glu(_merged(x, wu, bu, wg, bg)), w2, b2),
    "views between": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        (F.silu(F.linear(x, wg, bg)).unsqueeze(0) * F.linear(x, wu, bu).unsqueeze(0)).squeeze(0), w2, b2
    ),
}


@dataclass(frozen=True)
class _Projection:
    """A gate or an up: a Linear of its own, or one half of a merged one (`half` is then 0 or 1)."""

    layer: Linear
    format: list[int]
    half: int | None
    value: Node
    walks: tuple[Walk, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class _Product:
    """`activation(gate) * up`."""

    gate: _Projection
    up: _Projection
    activation: str
    arguments: tuple[Any, ...]
    problem: Problem | None
    nodes: tuple[Node, ...]
    result_format: list[int] = field(default_factory=list)


def find(view: GraphView, taken: Set[Node]) -> Iterator[Candidate]:
    layers = {**expert_layers(view), **pointwise_layers(view), **view.linears}
    for second in sorted(layers.values(), key=lambda layer: view.position[layer.node]):
        upper = view.walk_up(second.input)
        walks, nodes = [upper], [*second.nodes, *upper.passed]
        act_format = through_quantisation(view, walks, nodes)
        p = through_dropout(view, walks, nodes)
        rounded = walks[-1].node if through_quantisation(view, walks, nodes) else None
        found = _product_at(view, layers, walks[-1].node)
        if found is None and has_experts(second):
            found = _weighted_product_at(view, layers, walks[-1].node)
        if found is not None and found.gate.layer.features == found.up.layer.features == second.features:
            nodes += [*found.nodes, *found.gate.nodes, *found.up.nodes]
            if rounded is not None:
                problem = Problem(Reason.QUANTIZATION, f"{rounded.name} is rounded before dropout, too", rounded)
                found = replace_fields(found, problem=found.problem or problem)
            yield _candidate(view, found, second, p, walks, nodes, act_format)


def _product_at(view: GraphView, layers: Mapping[Node, Linear], node: Node) -> _Product | None:
    op = view.op(node)
    if op is None or (op.in_place and not view.owns_its_input(op)):
        return None
    if op.kind == "glu":
        return _glu(view, layers, op)
    if op.kind != "mul":
        return None
    for activated, other in ((op["input"], op["other"]), (op["other"], op["input"])):
        if isinstance(activated, Node) and isinstance(other, Node):
            product = _gated_by(view, layers, node, activated, other)
            if product is not None:
                return product
    return None


def _weighted_product_at(view: GraphView, layers: Mapping[Node, Linear], node: Node) -> _Product | None:
    """What a router's weights multiply before the last product of shared experts."""
    op = view.op(node)
    if op is None or op.kind != "mul":
        return None
    operands = (view.walk_up(operand).node for operand in (op["input"], op["other"]) if isinstance(operand, Node))
    found = (_product_at(view, layers, operand) for operand in operands)
    return next((product for product in found if product is not None), None)


def _gated_by(
    view: GraphView, layers: Mapping[Node, Linear], node: Node, activated: Node, other: Node
) -> _Product | None:
    walks, passed = [view.walk_up(activated)], [*view.walk_up(activated).passed]
    result_format = through_quantisation(view, walks, passed)
    activation = activation_at(view, walks[-1].node)
    if activation is None or activation.weight is not None:
        return None
    gate, up = _projection(view, layers, activation.input), _projection(view, layers, other)
    if gate is None or up is None or not _belong_together(gate, up):
        return None
    nodes = (node, *passed, *activation.nodes)
    gate = _Projection(gate.layer, gate.format, gate.half, gate.value, (*walks, *gate.walks), gate.nodes)
    problem = activation.problem
    if gate.format != up.format:
        problem = problem or Problem(Reason.QUANTIZATION, f"{activated.name} and {other.name} are rounded apart", node)
    return _Product(gate, up, activation.name, activation.arguments, problem, nodes, result_format)


def _glu(view: GraphView, layers: Mapping[Node, Linear], op: Op) -> _Product | None:
    """`F.glu(h)` is the first half of h times the sigmoid of the second."""
    value, whole = value_of(op["input"]), _projection(view, layers, op["input"])
    if value is None or whole is None or whole.half is not None:
        return None
    if not isinstance(op["dim"], int) or (op["dim"] - whole.layer.features) % value.dim():
        return None
    up, gate = (_Projection(whole.layer, whole.format, half, op.node, whole.walks, whole.nodes) for half in (0, 1))
    return _Product(gate, up, "sigmoid", (), None, (op.node,))


def _projection(view: GraphView, layers: Mapping[Node, Linear], node: Node) -> _Projection | None:
    walks, nodes = [view.walk_up(node)], [*view.walk_up(node).passed]
    format_of_half = through_quantisation(view, walks, nodes)
    value = walks[-1].node
    half = half_of(view, value)
    if half is not None:
        walks.append(view.walk_up(half.source))
        nodes += [*half.nodes, *walks[-1].passed]
    hidden_format = through_quantisation(view, walks, nodes)
    if format_of_half != hidden_format:
        hidden_format += format_of_half
    layer = layers.get(walks[-1].node)
    if layer is None or (half is not None and not _is_along(half, layer.features)):
        return None
    index = None if half is None else half.index
    return _Projection(layer, hidden_format, index, value, tuple(walks), (*nodes, *layer.nodes))


def _is_along(half: Half, features: int) -> bool:
    value = value_of(half.source)
    return value is not None and half.dim == features % value.dim()


def _belong_together(gate: _Projection, up: _Projection) -> bool:
    if gate.half is None or up.half is None:
        return gate.half is up.half and gate.layer is not up.layer and gate.layer.input is up.layer.input
    return gate.layer is up.layer and gate.half != up.half


def _candidate(
    view: GraphView,
    found: _Product,
    second: Linear,
    p: Any,
    walks: list[Walk],
    nodes: list[Node],
    act_format: list[int],
) -> Candidate:
    gate, up = found.gate.layer, found.up.layer
    is_merged = found.gate.half is not None
    drops = bool(p) if isinstance(p, (int, float)) else True
    inputs = {
        "x": gate.input,
        "weight1": gate.weight,
        "bias1": gate.bias,
        "weight_up": None if is_merged else up.weight,
        "bias_up": None if is_merged else up.bias,
        "weight2": second.weight,
        "bias2": second.bias,
    }
    constants = {
        "transposed": (gate.transposed, up.transposed, second.transposed),
        "p": p,
        "drops": drops,
        "activation": found.activation,
        "arguments": found.arguments,
        "gate_second": found.gate.half == 1,
        "formats": (found.gate.format, act_format, found.result_format),
        "features": second.features,
    }
    words = [found.activation.replace("_", " ")]
    words += ["merged"] if is_merged else []
    words += [f"dropout {p}"] if drops else []
    words += ["1×1 convolutions"] if second.features == CHANNELS else []
    words += ["fake-quantised"] if act_format or found.gate.format or found.result_format else []
    return Candidate(
        anchor=second.node,
        nodes=frozenset(nodes),
        outputs=(second.node,),
        inputs=inputs,
        constants=constants,
        variant=", ".join(words),
        needs_random_numbers=drops,
        problem=problem_of_groups(view, gate, up, second)
        or problem_of_walks([*walks, *found.gate.walks, *found.up.walks], second.features)
        or found.problem
        or problem_of_bias(gate)
        or problem_of_bias(up)
        or problem_of_bias(second)
        or _problem_of_shapes(found),
    )


def _problem_of_shapes(found: _Product) -> Problem | None:
    """A product of different shapes would broadcast."""
    gate, up = value_of(found.gate.value), value_of(found.up.value)
    if gate is None or up is None or not same_shape(gate.shape, up.shape):
        return Problem(Reason.LAYOUT, f"{found.up.value.name} has not the shape of the gate", found.up.value)
    return None


def check(view: GraphView, candidate: Candidate) -> Problem | None:
    x, y = value_of(candidate.inputs["x"]), value_of(candidate.anchor)
    if candidate.constants["features"] == CHANNELS:
        costs = cost_of_layout(candidate.anchor, x, y)
        if costs is not None:
            return costs
    elif x is None or y is None or not same_shape(x.shape[:-1], y.shape[:-1]):
        return Problem(Reason.LAYOUT, "the rows of the result are arranged otherwise than those of x", candidate.anchor)
    weights = [value_of(candidate.inputs[name]) for name in ("weight1", "weight_up")]
    if any(weight is not None and weight.requires_grad for weight in weights):
        return None  # eager keeps x too
    return written_later(view, candidate.anchor, candidate.inputs["x"])


def replace(editor: Editor, candidate: Candidate) -> None:
    inputs, constants = candidate.inputs, candidate.constants
    y_value = value_of(candidate.anchor)
    assert y_value is not None
    along_channels = constants["features"] == CHANNELS
    with editor.at(candidate.outputs, candidate.nodes):
        names = ("weight1", "weight_up", "weight2")
        weight1, weight_up, weight2 = (
            None if inputs[name] is None else as_linear_weight(editor, inputs[name], transposed, along_channels)
            for name, transposed in zip(names, constants["transposed"], strict=True)
        )
        seed = editor.call_ours(torch.ops.fuse_pass.seed.default, device=y_value.device) if constants["drops"] else None
        arguments = (
            channels_to_the_end(editor, inputs["x"]) if along_channels else inputs["x"],
            weight1,
            inputs["bias1"],
            weight_up,
            inputs["bias_up"],
            weight2,
            inputs["bias2"],
            seed,
            constants["p"] if constants["drops"] else 0.0,
            constants["activation"],
            list(constants["arguments"]),
            constants["gate_second"],
            *as_arguments(constants["formats"]),
        )
        if y_value.requires_grad:
            y = editor.item(editor.call_ours(torch.ops.fuse_pass.gated_dense.default, *arguments), 0)
        else:
            y = editor.call_ours(torch.ops.fuse_pass.gated_dense_inference.default, *arguments)
        y = channels_back(editor, y, y_value) if along_channels else y
    editor.replace(candidate.anchor, y)
    editor.erase(candidate.nodes)


PATTERN = Pattern("gated_dense", find, check, replace, reference, SPELLINGS, example_inputs)
