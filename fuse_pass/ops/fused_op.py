"""An operator is one declaration: a frozen dataclass of its arguments. All that PyTorch asks for follows from it.

    @dataclass(frozen=True)
    class Scale(FusedOp):
        x: Tensor
        factor: float = 2.0

        def forward(self) -> Tensor:                        # plain aten code; also what Inductor compiles
            return self.x * self.factor

        def shapes(self) -> Tensor:                         # the same on fake tensors, written by hand: running
            return torch.empty_like(self.x)                 # `forward` on them takes 3 to 20 times as long

    @dataclass(frozen=True)
    class ScaleGradients(Gradients):
        of = ("x",)
        x: Tensor                                           # arguments and results that are kept for backward
        factor: float = 2.0

        def backward(self, needed, grad_y) -> dict[str, Tensor]:
            return {"x": grad_y * self.factor}

        def differentiable(self, needed, grad_y) -> dict[str, Tensor]:   # for second derivatives
            return self.backward(needed, grad_y)

    scale = register("scale", Scale, ScaleGradients)

gives `scale(Tensor x, float factor=2.0) -> Tensor` and, for the gradient, `scale_backward(Tensor grad_y, Tensor x,
bool[1] output_mask, float factor=2.0) -> Tensor`. A field that is a dataclass itself stands for its own fields: several
ops share settings that way. What an argument is for is said in its type: a `Weight` may be packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fuse_pass.inductor import private
from fuse_pass.numerics.tensors import gradient_like
from fuse_pass.ops.arguments import Arguments, arguments_of
from fuse_pass.ops.library import cast_for_autocast, define, define_autocast, define_autograd


@dataclass(frozen=True)
class FusedOp(Arguments):
    """The arguments of an op, with what it computes.

    Attributes:
        results: their names; the first has a gradient, and others if `with_gradient` says so.
        recompute: what the op computes between its products is computed again in backward rather than stored.
        stores_what_it_keeps: what the op stores once (`compat.stored_once`) is computed for certain, and so may be kept
            for backward; what others store may be an input of the graph.
        exact_quotients: graphs with the op divide as IEEE 754 says, on a GPU too (`numerics.tensors.quotient`).
        autocast: the device types on which autocast changes the arguments or the result.
    """

    results: ClassVar[tuple[str, ...]] = ("y",)
    recompute: ClassVar[bool] = False
    stores_what_it_keeps: ClassVar[bool] = False
    exact_quotients: ClassVar[bool] = False
    autocast: ClassVar[tuple[str, ...]] = ()

    def forward(self) -> Any:
        """The results, all of them new memory."""
        raise NotImplementedError

    def shapes(self) -> Any:
        """Tensors like the results; adds no guards."""
        raise NotImplementedError

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> Gradients | None:
        """What is kept for backward; None for the arguments and results of the names that `Gradients` has.

        Args:
            results: of `forward`.
            needed: the arguments whose gradients may be asked for.
        """
        return None

    def with_gradient(self, needed: Set[str]) -> tuple[str, ...]:
        """Which results have one, if those arguments do."""
        return self.results[:1]

    def under_autocast(self, device_type: str) -> Self:
        """What autocast makes of the arguments."""
        return self

    def cast_result(self, y: Tensor, device_type: str) -> Tensor:
        """What autocast makes of the result."""
        return y


@dataclass(frozen=True)
class ProductOp(FusedOp):
    """An op whose every argument autocast casts as it casts those of `F.linear`."""

    autocast: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def under_autocast(self, device_type: str) -> Self:
        return self.of_call([cast_for_autocast(value, device_type) for value in self.arguments()])


@dataclass(frozen=True)
class WideInputOp(FusedOp):
    """An op whose arguments stay as they are under autocast, as it rounds them itself; its result is in that dtype."""

    autocast: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def cast_result(self, y: Tensor, device_type: str) -> Tensor:
        return cast_for_autocast(y, device_type)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Gradients(Arguments):
    """What was kept for backward, with the gradients that follow from it.

    All methods take the gradients of those results that have one; None stands for a result that nobody has read.

    Attributes:
        of: the results of the backward op; unless `sources` says otherwise, each is the gradient of the argument of
            that name.
        grads: names of the gradients that come in.
        is_under_autocast: whether the backward op may meet autocast, which must not touch what it is made of.
    """

    of: ClassVar[tuple[str, ...]] = ()
    grads: ClassVar[tuple[str, ...]] = ("grad_y",)
    is_under_autocast: ClassVar[bool] = False

    # Each takes as many gradients as `grads` names:
    #   backward(needed, *grads) -> dict[str, Tensor]          those of `of` that are needed, as one op
    #   differentiable(needed, *grads) -> dict[str, Tensor]    the same, to be differentiated again
    # An op that has a `formula() -> y` needs no `differentiable`, and gradients that are differentiable as they are
    # need no `backward`.

    def like(self, name: str, *grads: Any) -> Tensor:
        """Of the shape, dtype and layout of one result; a bias that was not kept is like the rows of its weight."""
        kept = self.named()
        if name.startswith("bias") and name not in kept:
            weight = kept[name.replace("bias", "weight")]
            return gradient_like(weight.new_empty(weight.shape[0]))
        return gradient_like(kept[name])

    def sources(self, needed: Set[str], *grads: Tensor | None) -> dict[str, str]:
        """For every argument that has a gradient, of `needed`, which of `of` it is."""
        return {name: name for name in self.of if name in needed}


_DECLARATIONS: dict[str, type[FusedOp]] = {}
_BACKWARD: set[str] = set()
_OPERATORS: dict[type[FusedOp], private.OpOverload] = {}
_INFERENCE: dict[type[FusedOp], type[FusedOp]] = {}
_AUTOGRAD: dict[private.OpOverload, _Autograd] = {}


def declaration_of(target: Any) -> type[FusedOp] | None:
    """What an op of ours is declared as; None for anything else that a graph may call."""
    # By name: a graph may carry a copy of an op, and what users call has not chosen an overload yet.
    is_op = isinstance(target, (private.OpOverload, private.OpOverloadPacket))
    return _DECLARATIONS.get(str(target).removesuffix(".default")) if is_op else None


def is_backward(target: Any) -> bool:
    """Whether an op computes the gradients of one of ours."""
    return str(target).removesuffix(".default") in _BACKWARD


def operator_of(op: type[FusedOp], *, inference: bool = False) -> private.OpOverload:
    """The op that was registered with a declaration, or its variant for inference where it has one."""
    return _OPERATORS[_INFERENCE.get(op, op) if inference else op]


def register(
    name: str,
    op: type[FusedOp],
    gradients: type[Gradients] | None = None,
    *,
    inference_of: type[FusedOp] | None = None,
) -> private.OpOverload:
    """Makes the op `fuse_pass::name` of its declaration.

    Args:
        name: in the namespace.
        op: its arguments, and what it computes.
        gradients: what is kept for backward; without, the op has no gradient.
        inference_of: the declaration whose place this one takes where nothing needs a gradient; its first result is
            that of the other.
    """
    arguments = ", ".join(map(str, arguments_of(op)))
    results = "Tensor" if len(op.results) == 1 else f"({', '.join(f'Tensor {result}' for result in op.results)})"

    def body(*args: Any, **kwargs: Any) -> Any:
        return op.of_call(args, kwargs).forward()

    def fake(*args: Any, **kwargs: Any) -> Any:
        return op.of_call(args, kwargs).shapes()

    made = define(name, f"({arguments}) -> {results}", body, fake)
    if gradients is not None:
        backward = _register_backward(f"{name}_backward", gradients) if hasattr(gradients, "backward") else None
        autograd = _AUTOGRAD[made] = _Autograd(op, gradients, backward)
        define_autograd(made, autograd.setup_context, autograd.backward)
    for device_type in op.autocast:
        define_autocast(made, device_type, functools.partial(_under_autocast, op, device_type))
    _DECLARATIONS[f"fuse_pass.{name}"], _OPERATORS[op] = op, made
    if inference_of is not None:
        _INFERENCE[inference_of] = op
    return made


def _under_autocast(op: type[FusedOp], device_type: str, made: private.OpOverload, *args: Any) -> Any:
    arguments = op.of_call(args).under_autocast(device_type)
    results = made(*arguments.arguments())
    return arguments.cast_result(results, device_type) if isinstance(results, Tensor) else results


def _register_backward(name: str, gradients: type[Gradients]) -> private.OpOverload:
    """`(gradients that come in, what was kept, which gradients are needed) -> gradients`, empty where not needed."""
    incoming, kept = len(gradients.grads), arguments_of(gradients)
    # The mask stands before the first argument that has a default, as schemas want it.
    place = incoming + sum(argument.default is MISSING for argument in kept)
    optional = "" if incoming == 1 else "?"
    parts = [f"Tensor{optional} {grad}" for grad in gradients.grads] + [str(argument) for argument in kept]
    parts.insert(place, f"bool[{len(gradients.of)}] output_mask")

    def read(args: Sequence[Any]) -> tuple[Any, set[str], Sequence[Any]]:
        needed = {name for name, is_needed in zip(gradients.of, args[place], strict=True) if is_needed}
        return gradients.of_call((*args[incoming:place], *args[place + 1 :])), needed, args[:incoming]

    def body(*args: Any) -> Any:
        arguments, needed, grads = read(args)
        found = arguments.backward(needed, *grads)
        return _as_results(found[name] if name in needed else _nothing(args) for name in gradients.of)

    def fake(*args: Any) -> Any:
        arguments, needed, grads = read(args)
        return _as_results(arguments.like(name, *grads) if name in needed else _nothing(args) for name in gradients.of)

    results = ", ".join(["Tensor"] * len(gradients.of))
    made = define(name, f"({', '.join(parts)}) -> ({results})", body, fake)
    _BACKWARD.add(f"fuse_pass.{name}")
    if gradients.is_under_autocast:
        for device_type in ("cpu", "cuda"):
            define_autocast(made, device_type, lambda op, *args: op(*args))
    return made


def _as_results(values: Iterable[Tensor]) -> Any:
    """As an op returns them: one by itself, several together."""
    results = tuple(values)
    return results if len(results) > 1 else results[0]


def _nothing(args: Sequence[Any]) -> Tensor:
    """For a result that nobody asked for; one each, for the results of an op may not alias."""
    like = next(value for value in args if isinstance(value, Tensor))
    return like.new_empty(0)


class _Autograd:
    """The two halves of a gradient, as `torch.library.register_autograd` and `torch.autograd.Function` take them."""

    def __init__(self, op: type[FusedOp], gradients: type[Gradients], backward_op: private.OpOverload | None) -> None:
        self._op = op
        self._gradients = gradients
        self._backward_op = backward_op
        # With a formula, second derivatives are those of PyTorch, taken from the arguments themselves.
        self._has_formula = hasattr(op, "formula")

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        arguments, results = self._op.of_call(inputs), output if isinstance(output, tuple) else (output,)
        needed = self._needed(ctx)
        with_gradient = arguments.with_gradient(needed)
        values = (arguments.saved(results, needed) or self._by_name(arguments, results)).arguments()
        ctx.kept = len(values)
        if self._has_formula:
            values += arguments.arguments()
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in inputs]
        _save(ctx, values)
        ctx.mark_non_differentiable(
            *(result for name, result in zip(self._op.results, results, strict=True) if name not in with_gradient)
        )
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grads[: len(self._gradients.grads)]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.dtypes)
        values = _restored(ctx)
        kept: Any = self._gradients.of_call(values[: ctx.kept])
        sources: dict[str, str] = kept.sources(self._needed(ctx), *grads)
        wanted = set(sources.values())
        if self._backward_op is not None and not torch.is_grad_enabled():
            found = self._by_op(self._backward_op, kept, wanted, grads)
        elif self._has_formula:
            found = _of_formula(self._op.of_call(values[ctx.kept :]), wanted, grads[0])
        else:  # the gradients will be differentiated again
            found = kept.differentiable(wanted, *grads)
        names = (argument.name for argument in arguments_of(self._op))
        return tuple(
            found[sources[name]].to(dtype) if name in sources else None
            for name, dtype in zip(names, ctx.dtypes, strict=False)
        )

    def _by_op(
        self, op: private.OpOverload, kept: Gradients, wanted: Set[str], grads: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        values, names = kept.arguments(), self._gradients.of
        required = sum(argument.default is MISSING for argument in arguments_of(self._gradients))
        values.insert(required, [name in wanted for name in names])
        results = op(*grads, *values)
        return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))

    def _by_name(self, arguments: FusedOp, results: tuple[Tensor, ...]) -> Gradients:
        return self._gradients.of_call((), arguments.named() | dict(zip(self._op.results, results, strict=True)))

    def _needed(self, ctx: Any) -> set[str]:
        pairs = zip(arguments_of(self._op), ctx.needs_input_grad, strict=False)
        return {argument.name for argument, is_needed in pairs if is_needed}


def under_transforms(op: private.OpOverload) -> Callable[..., Any]:
    """The op for `torch.func` transforms, which refuse what `torch.library.register_autograd` makes."""
    autograd = _AUTOGRAD[op]

    class UnderTransforms(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(autograd.setup_context)
        backward = staticmethod(autograd.backward)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op(*arguments)

    return UnderTransforms.apply


def _save(ctx: Any, values: list[Any]) -> None:
    """Tensors in PyTorch's care, each once, and settings beside them."""
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}
    places = {key: place for place, key in enumerate(tensors)}
    ctx.places = [places.get(id(value)) for value in values]
    ctx.settings = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*tensors.values())


def _restored(ctx: Any) -> list[Any]:
    tensors = ctx.saved_tensors
    pairs = zip(ctx.places, ctx.settings, strict=True)
    return [setting if place is None else tensors[place] for place, setting in pairs]


def _of_formula(arguments: Any, wanted: Set[str], grad_y: Any) -> dict[str, Tensor]:
    """Gradients of `arguments.formula()` that can be differentiated again (`create_graph=True`).

    By `torch.func.vjp`, which takes the arguments as independent even where one was computed from another.
    """
    given = {name: value for name, value in arguments.named().items() if name in wanted}

    def of_wanted(*values: Tensor) -> Tensor:
        y: Tensor = arguments.replaced(dict(zip(given, values, strict=True))).formula()
        return y

    _, vjp = torch.func.vjp(of_wanted, *given.values())  # type: ignore[misc]  # 2 results without aux
    return dict(zip(given, vjp(grad_y), strict=True))
