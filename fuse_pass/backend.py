"""`torch.compile(model, backend=fuse_backend)`: copy the graph, apply the patterns, verify, hand over to Inductor."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import fuse_pass.ops  # noqa: F401 - registers the ops that the patterns insert
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.product import pays
from fuse_pass.graph import noted
from fuse_pass.graph.bodies import graphs_of, input_kept_for_backward
from fuse_pass.graph.canonical import Operations
from fuse_pass.graph.edit import collector_paused, copy_graph_module, hoist_scalars, require_same_outputs
from fuse_pass.graph.identities import forget_identities
from fuse_pass.graph.shapes import value_of
from fuse_pass.inductor import compat, compiler, input_checks, precompile, private
from fuse_pass.inductor.dynamo import is_piece_for_ddp
from fuse_pass.joint.cache_key import OnThisProcessor, cache_key, require_key
from fuse_pass.joint.dropout_masks import OwnMasks
from fuse_pass.joint.masked_softmax import MaskedSoftmax
from fuse_pass.joint.recompute import RecomputeTags
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec, spec_of
from fuse_pass.ops.fused_op import declaration_of
from fuse_pass.ops.seed import is_draw
from fuse_pass.options import Options, names
from fuse_pass.patterns import PATTERNS, Situation, apply, attention_projections, dense, prepack
from fuse_pass.patterns.fake_quantization import insert as fake_quant
from fuse_pass.quantization.quantized_calls import QuantizedCall, counted, warn_of_graph_break
from fuse_pass.report import Decline, Note, Reason, Report, publish

NAME = "fuse_pass"  # for Dynamo, which `fuse_pass/__init__.py` tells of it before this file is loaded

_PATTERNS_BY_NAME = {pattern.name: pattern for pattern in PATTERNS}


class FuseBackend:
    """A configured backend for `torch.compile`.

    Two backends with the same configuration are equal, so that models share compiled code.

    With `quantize`, a call that would compute in floating point raises RuntimeError: where none of its graphs ran (a
    stance such as "force_eager", `torch.compiler.disable` around all of it) and where a function has reached Dynamo's
    recompile limit. A graph break, and a function that Dynamo cannot compile, is a RuntimeWarning when it is compiled:
    what runs eagerly there is not quantised. `fuse_pass.compile(model, quantize=…)` also finds every *layer* that runs
    eagerly, and lets no other compiler look inside; `torch.compile` alone cannot, nor under
    `torch.compiler.disable(compiled)`, which calls the model itself.

    Args:
        patterns: names of the patterns to apply, in any order; None for all.
        quantize: a format, its name or a `QuantSpec`: inserts the fake quantisation that `fuse_pass.convert` would.
            For the layers that both quantise, outputs and gradients have the same bits. Beside them it reaches
            products, attention, embeddings and norms that are called as functions or by subclasses; activations,
            softmax and pooling only as modules; dropout never; recurrent layers and what has no quantised layer are
            declined. `fuse_pass/patterns/fake_quantization/insert.py` has the table.
        memory: what a feed-forward block (`dense_act_dense`) keeps for backward beside its input and its weights.
            "fastest": the hidden value before and after the activation, as eager does. "balanced": the one before it.
            "smallest": neither; backward repeats the first product. Dropout masks are never kept. Measured on
            768 → 3072 → 768 with dropout, 512 rows, float32: eager keeps 19.5 MiB, `torch.compile` 15.0, these 13.5,
            7.5 and 1.5; "smallest" takes 15 % longer a step, the other two are equal but for 1-2 % in bfloat16.
        prepack: keep a second copy of large weights, in the order in which oneDNN reads them, for Linear layers in
            inference on a CPU. It takes as much memory as these weights. Measured on 6 layers of BERT-base, one thread:
            8 tokens take 1 / 1.3 of the time in float32 and 1 / 1.2 in bfloat16, 64 tokens 1 / 1.1 in both. A
            weight that is changed in place, loaded or replaced is packed again. Do not use it if a few elements of
            a weight are written through `.data`, NumPy or another process, which PyTorch does not count as a change.
            On other devices it does nothing, and a warning says so.
        strict: raise where a pass fails, instead of warning and compiling the untouched graph.

    Raises:
        ValueError: an unknown pattern name or setting of `memory`.
        TypeError: `patterns` is not a collection of names, or `prepack` or `strict` is not a bool.
    """

    def __init__(
        self,
        patterns: Iterable[str] | None = None,
        *,
        quantize: QuantSpec | Format | str | None = None,
        memory: str = "balanced",
        prepack: bool = False,
        strict: bool = False,
    ) -> None:
        self.options = Options.of(patterns, quantize, memory=memory, prepack=prepack, strict=strict)
        self.__name__ = NAME

    @classmethod
    def of(cls, options: Options) -> FuseBackend:
        """The backend with these options."""
        return cls(**options.as_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FuseBackend) and self.options == other.options

    def __hash__(self) -> int:
        return hash((FuseBackend, self.options))

    def __repr__(self) -> str:
        given = self.options.as_dict() | {"patterns": list(self.options.patterns)}
        return f"FuseBackend({', '.join(f'{name}={_shown(value)}' for name, value in given.items())})"

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compiles a Dynamo graph. `options` may mix Inductor's options with ours (`patterns`, `strict`)."""
        compiler.register_backend(fuse_backend, NAME)
        own, inductor_options = split_options(options or {})
        configured = FuseBackend.of(self.options.updated(own))
        chosen = configured.options
        own_random_numbers = not compiler.draws_stock_random_numbers(inductor_options)
        fused, report = configured.rewrite(gm, own_random_numbers=own_random_numbers)
        breaks: list[Decline] = []
        if chosen.quantize is not None:
            breaks = _graph_break(gm, chosen.quantize)
            report.declines += breaks
            fused = copy_graph_module(gm) if fused is gm else fused
            precompile.leave_out(fused)  # another process would run the graph without `counted`
        compiled: Callable[..., Any]
        with input_checks.left_to_guards():
            try:
                compiled = configured._inductor(fused, gm, mode, inductor_options)(fused, example_inputs)
            except compiler.InductorError as error:
                if fused is gm or chosen.strict or chosen.quantize is not None:
                    raise
                report = _not_compiled(error)
                compiled = configured._inductor(gm, gm, mode, inductor_options)(gm, example_inputs)
        publish(report)  # only now: Dynamo may start again from within, and calls the backend once more
        return compiled if chosen.quantize is None else counted(compiled, has_break=bool(breaks))

    def _inductor(self, graph: GraphModule, original: GraphModule, mode: str | None, options: Mapping[str, Any]) -> Any:
        """Inductor, set up for a graph that may call our ops."""
        on_cpu = _computes_on_cpu(original)
        precompile.note(require_key, cache_key({}, on_cpu=on_cpu), on_cpu)
        inductor = compiler.inductor_compiler(mode, options)
        passes = compiler.joint_passes(options)
        inductor.config["joint_custom_post_pass"] = OnThisProcessor(passes)
        if _calls_our_ops(graph):
            compat.give_room_for_seeds(graph)
            has_checks_wanted = compiler.is_given("size_asserts", options)
            has_own_masks = not compiler.draws_stock_random_numbers(options)
            masks = (MaskedSoftmax(), OwnMasks()) if has_own_masks else (MaskedSoftmax(),)
            inductor.config["joint_custom_post_pass"] = RecomputeTags(
                cache_key(self.options.as_dict(), on_cpu=on_cpu),
                (*passes, *masks),
                memory=self.options.memory,
                guarded_inputs=not has_checks_wanted and input_checks.are_in_guards(original),
            )
        inductor.config.update(_settings_for_gpu(graph, options))
        return inductor

    def call_context(self, options: Mapping[str, Any] | None) -> Callable[[], QuantizedCall] | None:
        """What watches every call of what is compiled with this backend and `options`; None without `quantize`."""
        quantize = (options or {}).get("quantize", self.options.quantize)
        return None if quantize is None else functools.partial(QuantizedCall, spec_of(quantize))

    @collector_paused()
    def rewrite(
        self, gm: GraphModule, *, own_random_numbers: bool = True, pays: Callable[[GemmProblem], bool] = pays
    ) -> tuple[GraphModule, Report]:
        """Applies the patterns to a copy of a Dynamo graph, sub-graphs included; `pays` is the cost model of products.

        So are graphs whose values are noted in `val`, as those of `program.module()` of an `ExportedProgram` before
        `run_decompositions`; under `torch.no_grad()` they get ops without a gradient. Where no shape is noted, as in
        graphs of `torch.fx.symbolic_trace`, or modules are called unopened, a note in the report says so.

        Returns the copy and the report, or `gm` itself where nothing matched or a pass failed.

        Raises:
            ValueError: `quantize` for a graph that cannot be read.
        """
        if noted.is_of_dynamo(gm.graph):
            return self._rewrite(gm, own_random_numbers, pays)
        notes = list(_not_captured(gm))
        if notes and self.options.quantize is not None:
            raise ValueError(f"quantize={self.options.quantize}: expected a graph that can be read. {notes[0]}")
        if not noted.is_of_export(gm.graph):
            return gm, Report(graphs=1, notes=notes)
        fused, report = self._rewrite(_copied(gm, noted.read_as_of_dynamo), own_random_numbers, pays)
        report.notes += notes
        return (_copied(fused, noted.write_as_of_export) if report.matches else gm), report

    def _rewrite(
        self, gm: GraphModule, own_random_numbers: bool, pays: Callable[[GemmProblem], bool]
    ) -> tuple[GraphModule, Report]:
        report = Report(graphs=1)
        fallback, known = gm, Report(graphs=1)
        step = "copying the graph"
        try:
            fused = copy_graph_module(gm)
            graphs = list(graphs_of(fused))
            for graph, _, _ in graphs:
                hoist_scalars(graph)
                forget_identities(graph)
            kept_input = input_kept_for_backward(fused)
            for name, run in self._passes():
                step = f"pattern {name}"
                for graph, body_of, autocast in graphs:
                    report.extend(run(graph, Situation(own_random_numbers, body_of, autocast, kept_input, pays)))
                require_same_outputs(gm, fused)
                if name == fake_quant.NAME and report.matches:
                    fallback, known = _recompiled(copy_graph_module(fused)), copy.deepcopy(report)
            if is_piece_for_ddp(gm):
                _name_cuts(report, gm.graph)
            if self.options.prepack and not _computes_on_cpu(gm):
                report.notes.append(_prepack_does_nothing())
            step = "generating code"
            return (_recompiled(fused), report) if report.matches else (gm, report)
        except Exception as error:  # whatever goes wrong in a pass, the user's model must still compile
            unquantized = self.options.quantize is not None and fallback is gm  # that would be another model
            if self.options.strict or unquantized:
                raise
            warnings.warn(
                f"fuse_pass: {step} failed ({type(error).__name__}: {error}); "
                "this graph is compiled without fusions. FuseBackend(strict=True) raises instead",
                RuntimeWarning,
                stacklevel=2,
            )
            return fallback, known

    def _passes(self) -> Iterator[tuple[str, Callable[[Graph, Situation], Report]]]:
        """What runs over every graph, in order; fusion comes last, so that it sees the quantised operands."""
        if self.options.quantize is not None:
            yield fake_quant.NAME, functools.partial(fake_quant.insert, spec=self.options.quantize)
        operations = Operations()
        for name in self.options.patterns:
            if name == dense.PATTERN.name:
                yield "opening attention", attention_projections.open_where_it_pays
            yield name, functools.partial(apply, _PATTERNS_BY_NAME[name], operations=operations)
        if self.options.prepack:
            yield prepack.PATTERN.name, functools.partial(apply, prepack.PATTERN, operations=operations)


def _not_compiled(error: Exception) -> Report:
    """What to report of a graph whose rewritten form Inductor cannot compile, after a warning."""
    detail = f"Inductor cannot compile the rewritten graph ({error}), which is compiled without fusions."
    warnings.warn(f"fuse_pass: {detail} FuseBackend(strict=True) raises instead", RuntimeWarning, stacklevel=3)
    return Report(graphs=1, notes=[Note(Reason.NOT_COMPILED, detail)])


def _prepack_does_nothing() -> Note:
    """Says so of a graph that computes nothing on a CPU, in a warning too: who asked for it waits for a gain."""
    detail = "prepack=True does nothing here: weights are packed for oneDNN, which computes on a CPU."
    warnings.warn(f"fuse_pass: {detail}", RuntimeWarning, stacklevel=2)
    return Note(Reason.COST, detail)


def _not_captured(gm: GraphModule) -> Iterator[Note]:
    """What cannot be read in a graph that Dynamo has not made."""
    if not noted.is_of_export(gm.graph):
        yield Note(Reason.NOT_CAPTURED, "A graph notes no shape, neither in `example_value` nor in `val`.")
    calls = gm.graph.find_nodes(op="call_module")
    closed = [str(node.target) for node in calls if [*gm.get_submodule(str(node.target)).parameters()]]
    if closed:
        yield Note(Reason.NOT_CAPTURED, f"A graph calls modules without opening them: {', '.join(closed[:3])}.")


def _copied(gm: GraphModule, mend: Callable[[Graph], None]) -> GraphModule:
    """A copy, in whose graphs something was mended."""
    copied = copy_graph_module(gm)
    for module in copied.modules():
        if isinstance(module, GraphModule):
            mend(module.graph)
    return _recompiled(copied)


def _name_cuts(report: Report, graph: Graph) -> None:
    """Tells what a piece of a graph hands on to the next from what nothing reads."""
    handed_on = {node.name for node in graph.nodes if node.users and all(user.op == "output" for user in node.users)}
    for i, decline in enumerate(report.declines):
        if decline.reason is Reason.NO_SECOND_LINEAR and decline.node in handed_on:
            detail = f"{decline.node} is handed to the next piece of the graph, which is compiled alone"
            report.declines[i] = dataclasses.replace(decline, reason=Reason.SPLIT, detail=detail)
    detail = "DistributedDataParallel has cut the graph into pieces by their gradients; nothing is fused across a cut."
    report.notes.append(Note(Reason.SPLIT, detail))


def _recompiled(module: GraphModule) -> GraphModule:
    """The module, whose code and whose sub-graphs' code is that of the graphs again."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            child.recompile()
    return module


def _graph_break(gm: GraphModule, spec: QuantSpec) -> list[Decline]:
    """What to report of a quantised graph that ends before its function does."""
    found = warn_of_graph_break(gm, spec)
    if found is None:
        return []
    reason, file, line = found
    return [Decline(fake_quant.NAME, Reason.GRAPH_BREAK, reason, "", f"{Path(file).name}:{line}" if file else "", "")]


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates our options from Inductor's.

    Raises:
        ValueError: an option that neither knows.
        TypeError: `options` is no mapping, or one of its names is no string.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"options: expected a mapping from names to values, got {options!r}")
    for name in options:
        if not isinstance(name, str):
            raise TypeError(f"options: expected names such as 'max_autotune', got {name!r}")
    ours = names()
    own = {name: value for name, value in options.items() if name in ours}
    rest = {name: value for name, value in options.items() if name not in ours}
    for name in rest:
        if not compiler.is_inductor_option(name):
            raise ValueError(
                f"unknown option {name!r}: fuse_pass knows {', '.join(ours)}; "
                "Inductor's options are listed by torch._inductor.list_options()"
            )
    return own, rest


def _nodes(module: GraphModule) -> Iterator[Node]:
    """Of every graph in a module."""
    return (node for child in module.modules() if isinstance(child, GraphModule) for node in child.graph.nodes)


def _calls_our_ops(module: GraphModule) -> bool:
    """Whether any graph calls an op of ours, put there by a pattern or by a module of `fuse_pass.nn`."""
    return any(
        isinstance(node.target, private.OpOverload) and node.target.namespace == "fuse_pass" for node in _nodes(module)
    )


def _computes_on_cpu(module: GraphModule) -> bool:
    """Whether any value of a graph is on a CPU, or none is known to be elsewhere."""
    values = (value_of(node) for node in _nodes(module))
    devices = {value.device.type for value in values if value is not None}
    return not devices or "cpu" in devices


def _settings_for_gpu(module: GraphModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """What our ops ask of Inductor where it generates Triton code; empty where all of them are on a CPU."""
    found: dict[str, Any] = {}
    for node in _nodes(module):
        op, results = declaration_of(node.target), node.meta.get("example_value")
        on_gpu = any(isinstance(y, Tensor) and y.device.type != "cpu" for y in private.tree_leaves(results))
        if on_gpu and (is_draw(node.target) or "dropout" in str(node.target)):
            found |= compiler.room_for_masks(options)
        if on_gpu and op is not None and op.exact_quotients:
            found |= compiler.EXACT_QUOTIENTS
    return found


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, QuantSpec) else repr(value)


compiler.call_context_of_backends()
fuse_backend = FuseBackend()
