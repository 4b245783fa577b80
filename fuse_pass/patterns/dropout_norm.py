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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem, written_later
from fuse_pass.graph.shapes import is_contiguous, is_permuted_contiguous, same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView, is_active_dropout
from fuse_pass.patterns.norm_forms import Norm, norms_of
from fuse_pass.patterns.norm_spellings import WRITTEN_OUT
from fuse_pass.patterns.pattern import Candidate, Pattern, hidden_in_encoder_layers
from fuse_pass.patterns.sum_path import MOVING, Path, path_from
from fuse_pass.report import Reason


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str = "layer_norm",
    eps: float = 1e-5,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch, over the last dimension; `keep` is the dropout mask, shaped like x."""
    z = x if keep is None else (torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x))
    z = z if residual is None else z + residual
    shape = (z.shape[-1],)
    return F.layer_norm(z, shape, weight, bias, eps) if norm == "layer_norm" else F.rms_norm(z, shape, weight, eps)


def example_inputs(dtype: torch.dtype = torch.float32, *, rows: tuple[int, ...] = (3, 5)) -> dict[str, Any]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    return {"x": tensor(*rows, 24), "residual": tensor(*rows, 24), "weight": tensor(24), "bias": tensor(24)}


def _iadd(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x * 2, 0.25)
    z += r
    return F.layer_norm(z, (24,), w, b)


def _pre_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = r + F.dropout(x, 0.25)
    return z + F.layer_norm(z, (24,), w, b)


def _read_before_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x, 0.25) + r
    early = torch.tanh(z)
    return F.layer_norm(z, (24,), w, b) * early


def _dropout_read_again(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x, 0.25)
    return F.layer_norm(z, (24,), w, b) * r + z


def _reshaped_and_read_again(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Swin: the window attention's rows are put back into a sequence, which is the residual stream."""
    stream = (r + F.dropout(x, 0.25)).reshape(1, -1, x.shape[-1])
    return stream, F.layer_norm(stream, (24,), w, b)


def _weight_computed_late(keep: Any) -> Any:
    """Zero-centred weights, `1 + w`, behind a node that keeps the value of the sum and reads it before."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z: Tensor = keep(F.dropout(x, 0.25) + r)
        return F.layer_norm(z, (24,), 1.0 + w.to(z.dtype), b) + z

    return function


def _written_out(norm: Any) -> Any:
    return lambda x, r, w, b: norm(F.dropout(x, 0.25) + r, w, b)


# Called as f(x, residual, weight, bias); each must be found once.
SPELLINGS: dict[str, Any] = {
    "dropout, norm": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25), (24,), w, b),
    "dropout, add, norm": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,), w, b),
    "residual first": lambda x, r, w, b: F.layer_norm(r + F.dropout(x, 0.25), (24,), w, b),
    "torch.add": lambda x, r, w, b: F.layer_norm(torch.add(F.dropout(x, 0.25), r), (24,), w, b),
    "method add": lambda x, r, w, b: F.layer_norm(r.add(F.dropout(x, 0.25)), (24,), w, b),
    "iadd": _iadd,
    "the sum is read again": _pre_norm,
    "the sum is read before the norm": _read_before_norm,
    "the dropout is read again": _dropout_read_again,
    "add, norm": lambda x, r, w, b: F.layer_norm(x + r, (24,), w, b),
    "inactive dropout": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25, False) + r, (24,), w, b),
    "inactive dropout after the sum": lambda x, r, w, b: F.layer_norm(F.dropout(x + r, 0.25, False), (24,), w, b),
    "p = 1": lambda x, r, w, b: F.layer_norm(F.dropout(x, 1.0) + r, (24,), w, b),
    "torch.layer_norm": lambda x, r, w, b: torch.layer_norm(F.dropout(x, 0.25) + r, (24,), w, b),
    "no affine": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,)),
    "no bias": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,), w),
    "two dimensions": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (5, 24)),
    "rms_norm": lambda x, r, w, b: F.rms_norm(F.dropout(x, 0.25) + r, (24,), w, 1e-6),
    "rms_norm, default eps": lambda x, r, w, b: F.rms_norm(x + r, (24,)),
    "broadcast residual": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r[:1], (24,), w, b),
    "broadcast operand": lambda x, r, w, b: F.layer_norm(x[0] + r, (24,), w, b),
    "reshaped": lambda x, r, w, b: F.layer_norm((F.dropout(x, 0.25) + r).view(-1, 24), (24,), w, b),
    "reshaped and read again": _reshaped_and_read_again,
    "cast": lambda x, r, w, b: F.layer_norm((F.dropout(x, 0.25) + r).double(), (24,)),
    "weight computed behind a cast": _weight_computed_late(lambda z: z.to(z.dtype)),
    "weight computed behind an inactive dropout": _weight_computed_late(lambda z: F.dropout(z, 0.0)),
    "weight computed behind a view": _weight_computed_late(lambda z: z.contiguous().reshape(-1, 24)),
    **{name: _written_out(norm) for name, norm in WRITTEN_OUT.items()},
}


@dataclass(frozen=True)
class _Sum:
    """`z = dropout(x) + residual` as it stands in the graph."""

    node: Node
    x: Node
    residual: Node | None
    p: Any
    nodes: tuple[Node, ...]
    residual_first: bool = False
    problem: Problem | None = None


def find(view: GraphView, taken: Set[Node]) -> Iterator[Candidate]:
    for norm in norms_of(view):
        # A norm that nobody reads will vanish; fused, it would keep the sum for a backward pass that never comes.
        candidate = _ending_in(view, norm, taken) if norm.node.users else None
        if candidate is not None:
            yield candidate
    yield from hidden_in_encoder_layers(view)


def _ending_in(view: GraphView, norm: Norm, taken: Set[Node]) -> Candidate | None:
    path = path_from(view, norm.input)
    found = _sum_at(view, path.top)
    if found is None:  # an inactive dropout without a sum is itself what the norm is fused with
        path = path.up_to_dropout(view)
        found = _sum_at(view, path.top)
    if found is None:
        return None
    is_another = found.node in taken  # one norm of the sum yields it to the others
    found = _Sum(found.node, found.node, None, 0, ()) if is_another else found
    vanishing = {*norm.nodes, *path.read_only_by(norm.nodes)}
    # Whatever else reads the sum gets it as a second output, unless it is a value that stays where it is.
    stays = found.residual is None and found.p == 0
    others = [user for user in found.node.users if user not in vanishing]
    keeps_sum = bool(others) and not stays
    nodes = frozenset((*vanishing, *(() if stays and others else found.nodes)))
    drops = isinstance(found.p, Node) or found.p != 0
    words = [norm.kind.replace("_", " ")]
    words += [f"dropout {found.p}"] if drops else []
    words += ["residual"] if found.residual is not None else []
    words += ["another of one sum"] if is_another else []
    words += ["written out"] if len(norm.nodes) > 1 else []
    words += ["sum read again"] if keeps_sum else []
    words += ["fake-quantised"] if path.quantised is not None else []
    return Candidate(
        anchor=norm.node,
        nodes=nodes,
        outputs=(norm.node, found.node) if keeps_sum else (norm.node,),
        inputs={
            "x": found.x, "residual": found.residual, "weight": norm.weight, "bias": norm.bias,
        },
        constants={
            "p": found.p, "drops": drops, "eps": norm.eps, "shape": norm.shape, "norm": norm.kind,
            "sum": found.node, "normalised": norm.input, "residual_first": found.residual_first,
            "casts": path.of_kind(view, "cast"), "reshapes": path.of_kind(view, "reshape", *MOVING),
            "quantised": path.quantised, "sum_format": path.sum_format,
            "written_out": len(norm.nodes) > 1,
            "round_normalised": norm.round_normalised,
        },
        variant=", ".join(words),
        needs_random_numbers=drops,
        problem=norm.problem or found.problem or path.problem or _problem_of_moves(path, norm, found, drops=drops),
    )  # fmt: skip


def _problem_of_moves(path: Path, norm: Norm, found: _Sum, *, drops: bool) -> Problem | None:
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


def _sum_at(view: GraphView, node: Any) -> _Sum | None:
    op = view.op(node)
    if op is None or node in view.linears:
        return None
    if op.kind == "dropout":
        return _dropout_alone(view, op)
    if op.kind != "add" or value_of(op["input"]) is None or value_of(op["other"]) is None:
        return None
    problem = None
    if op["alpha"] != 1:
        problem = Problem(Reason.CONSTANTS, f"{node.name} adds with alpha={op['alpha']}", node)
    elif op.in_place and not view.owns_its_input(op):
        problem = Problem(Reason.MUTATION, f"{node.name} writes into {op['input'].name}, which others may read", node)
    first, second = op["input"], op["other"]
    for branch, residual in ((first, second), (second, first)):
        dropout = view.op(branch)
        if dropout is None or dropout.kind != "dropout" or len(branch.users) != 1 or branch is residual:
            continue
        inner = _dropout_alone(view, dropout)
        nodes = (node, branch)
        return _Sum(node, inner.x, residual, inner.p, nodes, residual is first, problem or inner.problem)
    swapped = not _same_shape_as(first, node)
    x, residual = (second, first) if swapped else (first, second)
    return _Sum(node, x, residual, 0, (node,), swapped, problem)


def _dropout_alone(view: GraphView, op: Op) -> _Sum:
    problem = None
    if op.in_place and not view.owns_its_input(op):
        problem = Problem(Reason.MUTATION, f"{op.node.name} drops in place what others may read", op.node)
    if not isinstance(op["training"], bool):
        problem = Problem(Reason.CONSTANTS, f"{op.node.name}: training is {op['training']}, not a constant", op.node)
    return _Sum(op.node, op["input"], None, op["p"] if is_active_dropout(op) else 0, (op.node,), problem=problem)


def _same_shape_as(a: Node, b: Node) -> bool:
    x, y = value_of(a), value_of(b)
    return x is not None and y is not None and same_shape(x.shape, y.shape)


def check(view: GraphView, candidate: Candidate) -> Problem | None:
    constants, anchor = candidate.constants, candidate.anchor
    x: Node = candidate.inputs["x"]  # type: ignore[assignment]  # every spelling has one
    z: Node = constants["sum"]
    if not _same_shape_as(x, z):
        return Problem(Reason.BROADCAST, f"{x.name} is smaller than the sum {z.name}", x)
    shape, value = constants["shape"], value_of(z)
    assert value is not None
    if not isinstance(shape, (tuple, list, torch.Size)) or not 0 < len(shape) <= value.dim():
        return Problem(Reason.CONSTANTS, f"normalized_shape is {shape}, expected a tuple of sizes", anchor)
    for reshape in constants["reshapes"]:
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
    return _check_dtypes(candidate, value) or written_later(view, anchor, z)


def _check_dtypes(candidate: Candidate, z: Tensor) -> Problem | None:
    """The sum must be promoted as PyTorch does, and cast at most once on the way to the result."""
    operands = [value_of(candidate.inputs[name]) for name in ("x", "residual") if candidate.inputs[name] is not None]
    dtype = operands[0].dtype  # type: ignore[union-attr]
    for operand in operands[1:]:
        dtype = torch.promote_types(dtype, operand.dtype)  # type: ignore[union-attr]
    if dtype is not z.dtype:
        return Problem(Reason.DTYPES, f"the sum of {dtype} operands is {z.dtype}", candidate.constants["sum"])
    quantised = value_of(candidate.constants["quantised"])
    if quantised is not None and quantised.dtype is not z.dtype:
        detail = f"{z.dtype} is quantised as {quantised.dtype}"
        return Problem(Reason.DTYPES, detail, candidate.constants["quantised"])
    # One cast is taken over by the op; of several, those before the last may round.
    changes, dtype = [], z.dtype
    for cast in candidate.constants["casts"]:
        value = value_of(cast)
        if value is None or value.dtype is not dtype:
            changes.append(cast)
            dtype = dtype if value is None else value.dtype
    if len(changes) > 1:
        return Problem(Reason.DTYPES, f"{changes[0].name} and {changes[-1].name} cast one after the other", changes[0])
    normalised, result = value_of(candidate.constants["normalised"]), value_of(candidate.anchor)
    if normalised is not None and result is not None and normalised.dtype not in (z.dtype, result.dtype):
        return Problem(
            Reason.DTYPES, f"{z.dtype} → {normalised.dtype} → {result.dtype} before the norm", candidate.anchor
        )
    return None


def replace(editor: Editor, candidate: Candidate) -> None:
    inputs, constants = candidate.inputs, candidate.constants
    x, residual, z = inputs["x"], inputs["residual"], constants["sum"]
    z_value, y_value = value_of(z), value_of(candidate.anchor)
    assert z_value is not None
    assert y_value is not None
    # A norm that is written out does its own casts: autocast, which knows the name of a norm only, must not add one.
    is_plain = y_value.dtype is z_value.dtype and (not constants["written_out"] or z_value.dtype.itemsize > 2)
    norm_dtype = None if is_plain else y_value.dtype
    with editor.at(candidate.outputs, candidate.nodes, inputs.values()):
        if residual is not None and not _same_shape_as(residual, z):
            residual = editor.call("expand_as", residual, x)
        seed = editor.call_ours(torch.ops.fuse_pass.seed.default, device=z_value.device) if constants["drops"] else None
        p = constants["p"] if constants["drops"] else 0.0
        eps = _default_eps(y_value.dtype) if constants["eps"] is None else constants["eps"]
        parameters = [_parameter(editor, inputs[name], constants["shape"]) for name in ("weight", "bias")]
        special = (constants["sum_format"], constants["round_normalised"])
        call = editor.call_ours(
            torch.ops.fuse_pass.dropout_norm.default, x, residual, *parameters, seed, p, eps,
            len(constants["shape"]), constants["norm"], norm_dtype, constants["residual_first"],
            *(special if any(special) else ()),
        )  # fmt: skip
        outputs = [editor.item(call, i) for i in range(len(candidate.outputs))]
    with editor.at((candidate.anchor,), (candidate.anchor,)):  # the sizes of a reshape may be computed late
        for reshape in constants["reshapes"]:
            outputs[0] = editor.call(reshape.target, outputs[0], *reshape.args[1:], **reshape.kwargs)
        outputs[0] = editor.laid_out_as(candidate.anchor, outputs[0])
    for old, new in zip(candidate.outputs, outputs, strict=True):
        editor.replace(old, new)
    editor.erase(candidate.nodes)


def _parameter(editor: Editor, parameter: Node | None, shape: Sequence[int]) -> Node | None:
    """Written-out norms may have parameters with dimensions of size 1 in front."""
    value = value_of(parameter)
    extra = 0 if value is None else value.dim() - len(shape)
    return editor.call("squeeze", parameter, tuple(range(extra))) if extra else parameter


def _default_eps(dtype: torch.dtype) -> float:
    """RMSNorm without eps takes the machine epsilon of the dtype that it computes in."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


PATTERN = Pattern("dropout_norm", find, check, replace, reference, SPELLINGS, example_inputs)
