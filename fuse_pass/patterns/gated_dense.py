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

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.convolution import CHANNELS, pointwise_layers
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import expert_layers, has_experts
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView, Linear
from fuse_pass.ops.gated_dense import Gate, GatedDense
from fuse_pass.patterns.activation_forms import activation_at
from fuse_pass.patterns.channels import channels_back, channels_to_the_end, cost_of_layout
from fuse_pass.patterns.linear_chain import problem_of_bias, problem_of_groups, weight_of
from fuse_pass.patterns.pattern import Candidate, NearMiss, Pattern, Situation, drops, insert, node_of, tensor
from fuse_pass.patterns.projection import Projection, projection_at
from fuse_pass.patterns.spellings.gated_dense import CORPUS
from fuse_pass.patterns.trail import Trail
from fuse_pass.report import Reason


@dataclass(frozen=True, kw_only=True)
class GatedBlock(Candidate[GatedDense]):
    """The layers behind the weights of the call; gate and up are one where the projection is merged."""

    gate: Linear
    up: Linear
    second: Linear

    @property
    def is_along_channels(self) -> bool:
        return self.second.features == CHANNELS


@dataclass(frozen=True)
class _Product:
    """`activation(gate) * up`."""

    gate: Projection
    up: Projection
    activation: str
    arguments: tuple[Any, ...]
    nodes: tuple[Node, ...]
    result_format: list[int] = field(default_factory=list)
    problem: Problem | None = None


def find(view: GraphView, taken: Set[Node], situation: Situation) -> Iterator[GatedBlock | NearMiss]:
    layers = {**expert_layers(view), **pointwise_layers(view), **view.linears}
    for second in sorted(layers.values(), key=lambda layer: view.position[layer.node]):
        trail = Trail(view, second.input, second.nodes)
        act_format = trail.through_quantization()
        p = trail.through_dropout()
        rounded = trail.end if trail.through_quantization() else None
        found = _product_at(view, layers, trail.end)
        if found is None and has_experts(second):
            found = _weighted_product_at(view, layers, trail.end)
        if found is not None and found.gate.layer.features == found.up.layer.features == second.features:
            if rounded is not None:
                problem = Problem(Reason.QUANTIZATION, f"{rounded.name} is rounded before dropout, too", rounded)
                found = replace_fields(found, problem=found.problem or problem)
            yield _found(view, found, second, p, trail, act_format)


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
    trail = Trail(view, activated, (node,))
    result_format = trail.through_quantization()
    act = activation_at(view, trail.end)
    if act is None or act.learned:
        return None
    gate, up = projection_at(view, layers, act.input), projection_at(view, layers, other)
    if gate is None or up is None or not _belong_together(gate, up):
        return None
    problem = act.problem or trail.problem_of_rows(gate.layer.features)
    if gate.format != up.format:
        problem = problem or Problem(Reason.QUANTIZATION, f"{activated.name} and {other.name} are rounded apart", node)
    return _Product(gate, up, act.name, act.arguments, (*trail.nodes, *act.nodes), result_format, problem)


def _glu(view: GraphView, layers: Mapping[Node, Linear], op: Op) -> _Product | None:
    """`F.glu(h)` is the first half of h times the sigmoid of the second."""
    value, whole = value_of(op["input"]), projection_at(view, layers, op["input"])
    if value is None or whole is None or whole.half is not None:
        return None
    if not isinstance(op["dim"], int) or (op["dim"] - whole.layer.features) % value.dim():
        return None
    up, gate = (replace_fields(whole, half=half, value=op.node) for half in (0, 1))
    return _Product(gate, up, "sigmoid", (), (op.node,))


def _belong_together(gate: Projection, up: Projection) -> bool:
    if gate.half is None or up.half is None:
        return gate.half is up.half and gate.layer is not up.layer and gate.layer.input is up.layer.input
    return gate.layer is up.layer and gate.half != up.half


def _found(
    view: GraphView, product: _Product, second: Linear, p: Any, trail: Trail, act_format: list[int]
) -> GatedBlock | NearMiss:
    gate, up, is_merged = product.gate.layer, product.up.layer, product.gate.half is not None
    nodes = (*trail.nodes, *product.nodes, *product.gate.trail.nodes, *product.up.trail.nodes, *gate.nodes, *up.nodes)
    problem = _problem(view, product, second, trail)
    if problem is not None:
        return NearMiss(second.node, frozenset(nodes), problem)
    formats = (product.gate.format, act_format, product.result_format)
    call = GatedDense(
        tensor(gate.input),
        tensor(gate.weight),
        tensor(gate.bias),
        tensor(None if is_merged else up.weight),
        tensor(None if is_merged else up.bias),
        tensor(second.weight),
        tensor(second.bias),
        Gate(
            None, p if drops(p) else 0.0, product.activation, list(product.arguments), product.gate.half == 1, *formats
        ),
    )
    words = [product.activation.replace("_", " ")]
    words += ["merged"] if is_merged else []
    words += [f"dropout {p}"] if drops(p) else []
    words += ["1×1 convolutions"] if second.features == CHANNELS else []
    words += ["fake-quantised"] if any(formats) else []
    return GatedBlock(
        anchor=second.node, nodes=frozenset(nodes), outputs=(second.node,), call=call, variant=", ".join(words),
        draws=drops(p), gate=gate, up=up, second=second,
    )  # fmt: skip


def _problem(view: GraphView, product: _Product, second: Linear, trail: Trail) -> Problem | None:
    gate, up = product.gate, product.up
    return (
        problem_of_groups(view, gate.layer, up.layer, second)
        or trail.problem_of_rows(second.features)
        or gate.trail.problem_of_rows(second.features)
        or up.trail.problem_of_rows(second.features)
        or product.problem
        or problem_of_bias(gate.layer)
        or problem_of_bias(up.layer)
        or problem_of_bias(second)
        or _problem_of_shapes(product)
    )


def _problem_of_shapes(found: _Product) -> Problem | None:
    """A product of different shapes would broadcast."""
    gate, up = value_of(found.gate.value), value_of(found.up.value)
    if gate is None or up is None or not same_shape(gate.shape, up.shape):
        return Problem(Reason.LAYOUT, f"{found.up.value.name} has not the shape of the gate", found.up.value)
    return None


def check(view: GraphView, block: GatedBlock) -> Problem | None:
    call, anchor = block.call, block.anchor
    x, y = value_of(call.x), value_of(anchor)
    if block.is_along_channels:
        costs = cost_of_layout(anchor, x, y)
        if costs is not None:
            return costs
    elif x is None or y is None or not same_shape(x.shape[:-1], y.shape[:-1]):
        return Problem(Reason.LAYOUT, "the rows of the result are arranged otherwise than those of x", anchor)
    weights = [value_of(weight) for weight in (call.weight1, call.weight_up)]
    if any(weight is not None and weight.requires_grad for weight in weights):
        return None  # eager keeps x too
    return written_later(view, anchor, node_of(call.x))


def replace(editor: Editor, block: GatedBlock) -> None:
    y_value, call, along_channels = value_of(block.anchor), block.call, block.is_along_channels
    assert y_value is not None
    with editor.at(block.outputs, block.nodes):
        new = {"weight1": weight_of(editor, block.gate, flatten=along_channels)}
        if call.weight_up is not None:
            new["weight_up"] = weight_of(editor, block.up, flatten=along_channels)
        new["weight2"] = weight_of(editor, block.second, flatten=along_channels)
        new["x"] = channels_to_the_end(editor, node_of(call.x)) if along_channels else call.x
        (y,) = insert(editor, call.replaced(new), draws=block.draws, like=y_value)
        y = channels_back(editor, y, y_value) if along_channels else y
    editor.replace(block.anchor, y)
    editor.erase(block.nodes)


PATTERN = Pattern("gated_dense", find, check, replace, CORPUS)
