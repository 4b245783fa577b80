"""Dropout → [+ residual] → LayerNorm or RMSNorm:  `y = norm(dropout(x) + residual)`.

Shapes: x, residual and y `[..., *normalized_shape]`. Without an active dropout, add → norm counts as p = 0, and so does
an inactive dropout → norm. Where the sum (or the dropout without a sum) is read by others too, as in the residual
stream of a pre-norm block, it becomes a second output. A cast before the norm is taken over, and whatever keeps the
rows whole moves behind it: views and, where a dropout is active, windows that are put back into an image. A fake
quantisation of what the norm reads happens inside. The norm may be written out.

Of several norms of one sum, the first is fused with it and the others read what it yields.

Declines when: an interior value has another reader; anything that writes into what is read, or another autocast or
grad mode, lies inside; the dropout is broadcast by the sum; the norm has constants that are not numbers; the norm's
parameters are computed after the sum is already read, by more than arithmetic with one parameter; a view changes the
normalised dimensions; the quantisation rounds at random or by a scale; a norm that is written out has no eps, an
unbiased variance or half-precision statistics; a tensor is a subclass or on another device; the user wants eager's
random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import is_contiguous, is_permuted_contiguous, same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.ops.dropout_norm import DropoutNorm, Settings
from fuse_pass.patterns.norm_forms import Norm, norms_of
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
from fuse_pass.patterns.spellings.dropout_norm import CORPUS
from fuse_pass.patterns.sum_path import MOVING, Sum, SumPath, have_same_shape, sum_at
from fuse_pass.report import Reason


@dataclass(frozen=True, kw_only=True)
class FusedNorm(Candidate[DropoutNorm]):
    """A norm, the sum that it normalises, and what lies between."""

    norm: Norm
    sum: Node
    path: SumPath

    @property
    def reshapes(self) -> tuple[Node, ...]:
        return self.path.of_kind("reshape", *MOVING)


def find(view: GraphView, taken: Set[Node], situation: Situation) -> Iterator[FusedNorm | NearMiss]:
    for norm in norms_of(view):
        # A norm that nobody reads will vanish; fused, it would keep the sum for a backward pass that never comes.
        found = _ending_in(view, norm, taken) if norm.node.users else None
        if found is not None:
            yield found
    yield from hidden_in_encoder_layers(view)


def _ending_in(view: GraphView, norm: Norm, taken: Set[Node]) -> FusedNorm | NearMiss | None:
    path = SumPath(view, norm.input)
    found = sum_at(view, path.top)
    if found is None:  # an inactive dropout without a sum is itself what the norm is fused with
        path = path.up_to_dropout()
        found = sum_at(view, path.top)
    if found is None or any(node in taken for node in path.nodes):  # then it reads the result of another norm
        return None
    is_another = found.node in taken  # one norm of the sum yields it to the others
    found = Sum(found.node, found.node, None, 0, ()) if is_another else found
    vanishing = {*norm.nodes, *path.read_only_by(norm.nodes)}
    # Whatever else reads the sum gets it as a second output, unless it is a value that stays where it is.
    stays = found.residual is None and found.p == 0
    others = [user for user in found.node.users if user not in vanishing]
    keeps_sum = bool(others) and not stays
    nodes = frozenset((*vanishing, *(() if stays and others else found.nodes)))
    draws = drops(found.p)
    problem = norm.problem or found.problem or path.problem or _problem_of_moves(path, norm, found, drops=draws)
    if problem is not None:
        return NearMiss(norm.node, nodes, problem)
    words = [norm.kind.replace("_", " ")]
    words += [f"dropout {found.p}"] if draws else []
    words += ["residual"] if found.residual is not None else []
    words += ["another of one sum"] if is_another else []
    words += ["written out"] if len(norm.nodes) > 1 else []
    words += ["sum read again"] if keeps_sum else []
    words += ["fake-quantised"] if path.quantized is not None else []
    return FusedNorm(
        anchor=norm.node,
        nodes=nodes,
        outputs=(norm.node, found.node) if keeps_sum else (norm.node,),
        call=_call(norm, found, path),
        variant=", ".join(words),
        draws=draws,
        norm=norm,
        sum=found.node,
        path=path,
    )


def _call(norm: Norm, found: Sum, path: SumPath) -> DropoutNorm:
    z, y = value_of(found.node), value_of(norm.node)
    dtype = None if y is None else y.dtype
    # A norm that is written out does its own casts: autocast, which knows the name of a norm only, must not add one.
    is_plain = z is not None and dtype is z.dtype and (len(norm.nodes) == 1 or dtype.itemsize > 2)
    settings = Settings(
        seed=None,
        p=found.p if drops(found.p) else 0.0,
        eps=_default_eps(dtype) if norm.eps is None else norm.eps,
        normalized_dims=len(norm.shape) if isinstance(norm.shape, (tuple, list)) else 0,
        norm=norm.kind,
        norm_dtype=None if is_plain else dtype,
        residual_first=found.residual_first,
        sum_format=path.sum_format,
        round_normalised=norm.round_normalised,
    )
    return DropoutNorm(tensor(found.x), tensor(found.residual), tensor(norm.weight), tensor(norm.bias), settings)


def _default_eps(dtype: torch.dtype | None) -> float:
    """RMSNorm without eps takes the machine epsilon of the dtype that it computes in."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


def _problem_of_moves(path: SumPath, norm: Norm, found: Sum, *, drops: bool) -> Problem | None:
    """Windows are put back into an image between a dropout and its norm (Swin V2): the norm goes before."""
    if not path.moves:
        return None
    value, last = value_of(found.node), path.moves[-1]
    if not drops:
        detail = f"{last.name} rearranges the rows: without a dropout there is nothing to gain"
        return Problem(Reason.COST, detail, last)
    if value is None or not is_contiguous(value):
        return Problem(Reason.LAYOUT, f"{last.name} rearranges the rows of a transposed sum", last)
    values = [value_of(node) for node in (*path.nodes, norm.node)]
    if not all(isinstance(stride, int) for value in values if value is not None for stride in value.stride()):
        return Problem(Reason.LAYOUT, f"{last.name} rearranges rows by sizes that are known at run time only", last)
    if not isinstance(norm.shape, (tuple, list)) or len(norm.shape) != 1:
        return Problem(
            Reason.LAYOUT, f"{last.name} may rearrange the dimensions {norm.shape} that are normalised", last
        )
    return None


def check(view: GraphView, found: FusedNorm) -> Problem | None:
    anchor, x, z = found.anchor, node_of(found.call.x), found.sum
    if not have_same_shape(x, z):
        return Problem(Reason.BROADCAST, f"{x.name} is smaller than the sum {z.name}", x)
    shape, value = found.norm.shape, value_of(z)
    assert value is not None
    if not isinstance(shape, (tuple, list, torch.Size)) or not 0 < len(shape) <= value.dim():
        return Problem(Reason.CONSTANTS, f"normalized_shape is {shape}, expected a tuple of sizes", anchor)
    for reshape in found.reshapes:
        reshaped = value_of(reshape)
        if reshaped is None or not same_shape(reshaped.shape[-len(shape) :], value.shape[-len(shape) :]):
            return Problem(Reason.LAYOUT, f"{reshape.name} changes the normalised dimensions", reshape)
    for wanted, size in zip(shape, value.shape[-len(shape) :], strict=True):
        if isinstance(wanted, Node) or not same_size(wanted, size):
            return Problem(Reason.CONSTANTS, f"normalized_shape {shape} is not the end of {tuple(value.shape)}", anchor)
    result = value_of(anchor)
    assert result is not None
    if not is_permuted_contiguous(result):
        return Problem(Reason.LAYOUT, f"{anchor.name} has strides {result.stride()}, which leave gaps", anchor)
    return _check_dtypes(found, value) or written_later(view, anchor, z)


def _check_dtypes(found: FusedNorm, z: Tensor) -> Problem | None:
    """The sum must be promoted as PyTorch does, and cast at most once on the way to the result."""
    x, residual = value_of(found.call.x), value_of(found.call.residual)
    assert x is not None
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype is not z.dtype:
        return Problem(Reason.DTYPES, f"the sum of {dtype} operands is {z.dtype}", found.sum)
    quantized = value_of(found.path.quantized)
    if found.path.quantized is not None and quantized is not None and quantized.dtype is not z.dtype:
        return Problem(Reason.DTYPES, f"{z.dtype} is quantised as {quantized.dtype}", found.path.quantized)
    # One cast is taken over by the op; of several, those before the last may round.
    changes, dtype = [], z.dtype
    for cast in found.path.of_kind("cast"):
        value = value_of(cast)
        if value is None or value.dtype is not dtype:
            changes.append(cast)
            dtype = dtype if value is None else value.dtype
    if len(changes) > 1:
        return Problem(Reason.DTYPES, f"{changes[0].name} and {changes[-1].name} cast one after the other", changes[0])
    normalised, result = value_of(found.norm.input), value_of(found.anchor)
    if normalised is not None and result is not None and normalised.dtype not in (z.dtype, result.dtype):
        detail = f"{z.dtype} → {normalised.dtype} → {result.dtype} before the norm"
        return Problem(Reason.DTYPES, detail, found.anchor)
    return None


def replace(editor: Editor, found: FusedNorm) -> None:
    call, z_value = found.call, value_of(found.sum)
    assert z_value is not None
    x, residual, weight, bias = (node_of(value) for value in (call.x, call.residual, call.weight, call.bias))
    with editor.at(found.outputs, found.nodes, (x, residual, weight, bias)):
        new = {name: _parameter(editor, node, found.norm.shape) for name, node in (("weight", weight), ("bias", bias))}
        if residual is not None and not have_same_shape(residual, found.sum):
            new["residual"] = editor.call("expand_as", residual, x)
        call = call.replaced(new)
        results = insert(editor, call, draws=found.draws, like=z_value, results=len(found.outputs))
    with editor.at((found.anchor,), (found.anchor,)):  # the sizes of a reshape may be computed late
        for reshape in found.reshapes:
            results[0] = editor.call(reshape.target, results[0], *reshape.args[1:], **reshape.kwargs)
        results[0] = editor.laid_out_as(found.anchor, results[0])
    for old, result in zip(found.outputs, results, strict=True):
        editor.replace(old, result)
    editor.erase(found.nodes)


def _parameter(editor: Editor, parameter: Node | None, shape: Sequence[int]) -> Node | None:
    """Written-out norms may have parameters with dimensions of size 1 in front."""
    value = value_of(parameter)
    extra = 0 if value is None else value.dim() - len(shape)
    return editor.call("squeeze", parameter, tuple(range(extra))) if extra else parameter


PATTERN = Pattern("dropout_norm", find, check, replace, CORPUS)
