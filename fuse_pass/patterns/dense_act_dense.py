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

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch.fx import Node

from fuse_pass.graph.convolution import CHANNELS, pointwise_layers
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import expert_layers
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView, Linear
from fuse_pass.ops.dense_act_dense import ActDense, Between, DenseActDense
from fuse_pass.patterns.activation_forms import FoundActivation, activation_at
from fuse_pass.patterns.channels import (
    channels_back,
    channels_to_the_end,
    cost_of_few_rows,
    cost_of_layout,
    cost_of_mixing,
    rows_to_channels,
)
from fuse_pass.patterns.linear_chain import problem_of_bias, problem_of_groups, weight_of
from fuse_pass.patterns.pattern import (
    Candidate,
    NearMiss,
    Pattern,
    Situation,
    drops,
    hidden_in_encoder_layers,
    insert,
    node_of,
    tensor,
)
from fuse_pass.patterns.spellings.dense_act_dense import CORPUS
from fuse_pass.patterns.trail import Trail
from fuse_pass.report import Reason


@dataclass(frozen=True, kw_only=True)
class Block(Candidate[DenseActDense | ActDense]):
    """Two Linear layers with an activation between.

    Attributes:
        first: the Linear that the activation reads.
        second: the Linear that reads it.
        turned: the node between them that makes rows the channels of an image, if there is one.
    """

    first: Linear
    second: Linear
    turned: Node | None

    @property
    def is_along_channels(self) -> bool:
        return self.second.features == CHANNELS and self.turned is None

    @property
    def is_flattened(self) -> bool:
        """Whether the second is a Linear behind images of one pixel, which the first has convolved."""
        return self.turned is None and self.first.features != self.second.features


def find(view: GraphView, taken: Set[Node], situation: Situation) -> Iterator[Block | NearMiss]:
    explained: set[Node] = set()
    layers = {**expert_layers(view), **pointwise_layers(view), **view.linears}
    for second in sorted(layers.values(), key=lambda layer: view.position[layer.node]):
        found, activation = _ending_in(view, layers, second, taken)
        if activation is not None:
            explained.update(activation.nodes)
        if found is not None:
            yield found
    for node in view.nodes:
        if node not in explained:
            yield from _without_second_linear(view, node)
    yield from hidden_in_encoder_layers(view)


def _ending_in(
    view: GraphView, layers: Mapping[Node, Linear], second: Linear, taken: Set[Node]
) -> tuple[Block | NearMiss | None, FoundActivation | None]:
    trail = Trail(view, second.input, second.nodes)
    trail.through_turn(second)
    act_format = trail.through_quantization()
    p = trail.through_dropout()
    result_format = trail.through_quantization()  # of the activation itself, where dropout follows it
    trail.through_turn(second)
    act = activation_at(view, trail.end)
    if act is None:
        return None, None
    trail.past(act.nodes, act.input)
    trail.through_turn(second)
    formats = (trail.through_quantization(), act_format, result_format)
    first = layers.get(trail.end)
    if first is None or not _belong_together(first, second, trail, formats):
        return None, act
    in_chain = first.node in taken  # the first Linear ends an accepted match: its output is our input
    nodes = frozenset((*trail.nodes, *(() if in_chain else first.nodes)))
    problem = _problem(view, first, second, trail, act)
    if problem is not None:
        return NearMiss(second.node, nodes, problem), act
    weight = act.learned[0] if act.is_called and act.learned else None
    between = Between(tensor(weight), None, p if drops(p) else 0.0, act.name, list(act.arguments), *formats)
    last = (tensor(second.weight), tensor(second.bias), between)
    call: DenseActDense | ActDense
    if in_chain:
        call = ActDense(tensor(first.node), *last)
    else:
        call = DenseActDense(tensor(first.input), tensor(first.weight), tensor(first.bias), *last)
    words = [act.name.replace("_", " ")]
    words += [f"dropout {p}"] if drops(p) else []
    words += ["chained"] if in_chain else []
    words += ["1×1 convolutions"] if first.features == CHANNELS else []
    words += ["1×1 convolution behind a Linear"] if trail.turned is not None else []
    words += ["fake-quantised"] if any(formats) else []
    return Block(
        anchor=second.node, nodes=nodes, outputs=(second.node,), call=call, variant=", ".join(words), draws=drops(p),
        parts=() if act.is_called else act.learned, first=first, second=second, turned=trail.turned,
    ), act  # fmt: skip


def _belong_together(first: Linear, second: Linear, trail: Trail, formats: tuple[list[int], ...]) -> bool:
    if trail.turned is not None:  # a quantisation may go by blocks of the last dimension
        return first.features != CHANNELS and not any(formats)
    return first.features == second.features or _is_flattened(first, second)


def _is_flattened(first: Linear, second: Linear) -> bool:
    """A Linear behind a 1×1 convolution of images of one pixel, as in the head of a MobileNet."""
    value = value_of(first.node)
    is_one_pixel = value is not None and all(same_size(size, 1) for size in value.shape[2:])
    return is_one_pixel and first.features == CHANNELS and second.features != CHANNELS


def _problem(view: GraphView, first: Linear, second: Linear, trail: Trail, act: FoundActivation) -> Problem | None:
    return (
        problem_of_groups(view, first, second)
        or _problem_on_the_way(first, second, trail)
        or act.problem
        or problem_of_bias(first)
        or problem_of_bias(second)
        or _problem_of_width(first, second)
    )


def _problem_on_the_way(first: Linear, second: Linear, trail: Trail) -> Problem | None:
    if trail.turned is not None or first.features == second.features:
        return trail.problem_of_rows(first.features)
    before, after = value_of(first.node), value_of(second.input)
    if before is None or after is None or not same_shape(before.shape[:2], after.shape):
        return Problem(Reason.LAYOUT, f"{second.input.name} is not {first.node.name}, flattened", second.input)
    return trail.problem_of_casts()


def _problem_of_width(first: Linear, second: Linear) -> Problem | None:
    """A written-out activation may have multiplied a value with its own reshaped self."""
    before, after = value_of(first.node), value_of(second.input)
    if before is None or after is None or not same_size(before.shape[first.features], after.shape[second.features]):
        return Problem(Reason.LAYOUT, f"{second.input.name} is not as wide as {first.node.name}", second.input)
    return None


# Where no Linear follows, these are gates and probabilities, not an unfinished feed-forward block.
_GATES = ("sigmoid", "hardsigmoid", "tanh", "softplus")


def _without_second_linear(view: GraphView, node: Node) -> Iterator[NearMiss]:
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
    yield NearMiss(node, frozenset((*first.nodes, *activation.nodes)), problem)


def check(view: GraphView, block: Block) -> Problem | None:
    anchor, call = block.anchor, block.call
    read = node_of(call.x if isinstance(call, DenseActDense) else call.h)
    x, y, costs = value_of(read), value_of(anchor), None
    if block.turned is not None:
        costs = cost_of_mixing(anchor, x, y)
    elif block.is_along_channels:
        costs = cost_of_layout(anchor, x, y)
    elif block.is_flattened:
        costs = cost_of_few_rows(anchor, x)
    elif x is None or y is None or not same_shape(x.shape[:-1], y.shape[:-1]):
        return Problem(Reason.LAYOUT, "the rows of the result are arranged otherwise than those of x", anchor)
    if costs is not None:
        return costs
    weight1 = value_of(call.weight1) if isinstance(call, DenseActDense) else None
    if weight1 is not None and weight1.requires_grad:
        return None  # eager keeps x too
    return written_later(view, anchor, read)


def replace(editor: Editor, block: Block) -> None:
    y_value, call, along_channels = value_of(block.anchor), block.call, block.is_along_channels
    assert y_value is not None
    with editor.at(block.outputs, block.nodes):
        new = {"weight2": weight_of(editor, block.second, flatten=block.second.features == CHANNELS)}
        name, x = ("x", node_of(call.x)) if isinstance(call, DenseActDense) else ("h", node_of(call.h))
        if isinstance(call, DenseActDense):
            new["weight1"] = weight_of(editor, block.first, flatten=along_channels or block.is_flattened)
        new[name] = channels_to_the_end(editor, x) if along_channels else x
        new[name] = editor.call("flatten", x, 1) if block.is_flattened else new[name]
        if block.parts:
            new["act_weight"] = editor.call(torch.cat, [editor.call("flatten", part) for part in block.parts])
        (y,) = insert(editor, call.replaced(new), draws=block.draws, like=y_value)
        y = channels_back(editor, y, y_value) if along_channels else y
        y = y if block.turned is None else rows_to_channels(editor, y, block.turned, block.anchor)
    editor.replace(block.anchor, y)
    editor.erase(block.nodes)


PATTERN = Pattern("dense_act_dense", find, check, replace, CORPUS)
