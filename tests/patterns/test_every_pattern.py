"""The same questions to every pattern, for every spelling that it promises to recognise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.checkpoint import checkpoint

from fuse_pass.backend import FuseBackend
from fuse_pass.graph.shapes import value_of
from fuse_pass.patterns import PATTERNS, Pattern
from fuse_pass.report import collect
from tests.capture import Captured, everything_pays
from tests.patterns.truth import Result, assert_agrees, assert_fused_like_eager, eager, fused, leaves

BY_NAME = {pattern.name: pattern for pattern in PATTERNS}
CASES = [
    pytest.param(p.name, spelling, id=f"{p.name}: {spelling}") for p in PATTERNS for spelling in p.corpus.spellings
]
every_spelling = pytest.mark.parametrize(("pattern", "spelling"), CASES)
static_and_dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def function_of(pattern: str, spelling: str) -> Callable[..., Tensor]:
    return BY_NAME[pattern].corpus.spellings[spelling]


def inputs_of(pattern: str, **options: Any) -> dict[str, Any]:
    return BY_NAME[pattern].corpus.example_inputs(**options)


@functools.cache
def taken(pattern: str, spelling: str, dynamic: bool) -> tuple[Captured, Result, Result, Result]:
    """One capture of a spelling for several questions: the graphs, our result, eager's and the exact one."""
    torch.manual_seed(0)
    function, inputs = function_of(pattern, spelling), inputs_of(pattern)
    found, ours = fused(function, leaves(inputs), dynamic=dynamic)
    return found, ours, eager(function, leaves(inputs)), eager(function, leaves(inputs, torch.float64))


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(PATTERNS) > 0


@pytest.mark.parametrize("pattern", BY_NAME)
def test_reference_is_the_first_spelling_s_truth(pattern: str) -> None:
    """`reference` without a mask is what an inactive dropout leaves."""
    inputs = inputs_of(pattern, dtype=torch.float64)
    plain = function_of(pattern, "inactive dropout")(*inputs.values())
    torch.testing.assert_close(BY_NAME[pattern].corpus.reference(**inputs), plain, rtol=1e-12, atol=1e-12)


@every_spelling
@static_and_dynamic
def test_fires_exactly_once(pattern: str, spelling: str, dynamic: bool) -> None:
    found, *_ = taken(pattern, spelling, dynamic)
    assert found.report.counts() == {pattern: 1}, str(found.report)
    assert found.report.declines == []
    assert len(found.rewritten) == 1


@every_spelling
@static_and_dynamic
def test_values_and_gradients_equal_eager(pattern: str, spelling: str, dynamic: bool) -> None:
    _, ours, of_eager, exact = taken(pattern, spelling, dynamic)
    assert_agrees(ours, of_eager, exact)


@every_spelling
@static_and_dynamic
def test_applying_it_twice_changes_nothing(pattern: str, spelling: str, dynamic: bool) -> None:
    rewritten = taken(pattern, spelling, dynamic)[0].rewritten[0]
    again, report = FuseBackend(strict=True).rewrite(rewritten)
    assert again is rewritten
    assert report.matches == []


@every_spelling
def test_the_original_graph_is_left_alone(pattern: str, spelling: str) -> None:
    original = taken(pattern, spelling, False)[0].originals[0]
    before, metadata = original.code, [dict(node.meta) for node in original.graph.nodes]
    rewritten, report = FuseBackend(strict=True).rewrite(original, pays=everything_pays)
    assert report.matches
    assert rewritten is not original
    assert rewritten.code != before
    original.recompile()
    assert original.code == before
    assert [dict(node.meta) for node in original.graph.nodes] == metadata


@every_spelling
@static_and_dynamic
def test_the_rewritten_graph_is_well_formed(pattern: str, spelling: str, dynamic: bool) -> None:
    found = taken(pattern, spelling, dynamic)[0]
    rewritten = found.rewritten[0]
    rewritten.graph.lint()
    for before, after in zip(placeholders(found.originals[0]), placeholders(rewritten), strict=True):
        assert after.name == before.name
        assert after._dynamo_source is before._dynamo_source  # type: ignore[attr-defined]
    for node in rewritten.graph.nodes:
        if node.op in ("call_function", "call_method"):
            assert "example_value" in node.meta, node.format_node()


def placeholders(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


class MetadataCheck(Interpreter):
    """Runs a graph and compares every real tensor with the fake one that the node carries."""

    checked = 0

    def run_node(self, n: Node) -> Any:
        result, expected = super().run_node(n), value_of(n)
        if expected is not None and n.op != "placeholder":
            assert isinstance(result, Tensor), n.format_node()
            assert properties(result) == properties(expected), n.format_node()
            self.checked += 1
        return result


def properties(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device


def real_inputs(module: GraphModule) -> Iterator[Tensor]:
    """Random tensors as the placeholders of a static graph describe them."""
    for node in placeholders(module):
        fake = value_of(node)
        assert fake is not None
        real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        yield real.copy_(torch.randn(fake.shape)).requires_grad_(fake.requires_grad)


@every_spelling
def test_fake_values_tell_the_truth(pattern: str, spelling: str) -> None:
    rewritten = taken(pattern, spelling, False)[0].rewritten[0]
    check = MetadataCheck(rewritten)
    results = check.run(*real_inputs(rewritten))
    assert check.checked > 0
    fakes = [value_of(node) for node in rewritten.graph.output_node().all_input_nodes]
    assert [real.requires_grad for real in results] == [fake is not None and fake.requires_grad for fake in fakes]


@every_spelling
@pytest.mark.parametrize("rows", [(), (3,), (2, 3, 5)], ids=["rank 1", "rank 2", "rank 4"])
def test_other_ranks(pattern: str, spelling: str, rows: tuple[int, ...]) -> None:
    """The middle rank, 3, is that of every other test."""
    function, inputs = function_of(pattern, spelling), inputs_of(pattern, rows=rows)
    skip_unless_eager_takes_it(function, inputs)
    assert_fused_like_eager(function, inputs, counts={pattern: 1})


@every_spelling
def test_empty_batch(pattern: str, spelling: str) -> None:
    function, inputs = function_of(pattern, spelling), inputs_of(pattern, rows=(0, 5))
    skip_unless_eager_takes_it(function, inputs)
    found = assert_fused_like_eager(function, inputs, counts={pattern: 1})
    assert all(value.numel() == 0 for value in outputs(found))


def outputs(found: Captured) -> tuple[Tensor, ...]:
    return found.output if isinstance(found.output, tuple) else (found.output,)


def skip_unless_eager_takes_it(function: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    try:
        function(*leaves(inputs))
    except (RuntimeError, IndexError) as error:
        pytest.skip(f"PyTorch refuses this spelling at this shape: {error}")


@every_spelling
def test_half_precision(pattern: str, spelling: str) -> None:
    inputs = inputs_of(pattern, dtype=torch.bfloat16)
    assert_fused_like_eager(function_of(pattern, spelling), inputs, counts={pattern: 1})


@every_spelling
def test_under_autocast(pattern: str, spelling: str) -> None:
    """In or around the compiled function, autocast yields eager's dtype and exactness, fused or not."""
    function, inputs = function_of(pattern, spelling), inputs_of(pattern)

    def inside(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    exact = eager(function, leaves(inputs, torch.float64))
    of_eager = eager(inside, leaves(inputs))
    _, ours = fused(inside, leaves(inputs))
    assert_agrees(ours, of_eager, exact)
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = fused(function, leaves(inputs))
    assert_agrees(ours, of_eager, exact)


@every_spelling
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pattern: str, spelling: str, mode: Callable[[], Any]) -> None:
    function, inputs = function_of(pattern, spelling), inputs_of(pattern)
    with mode():
        found = assert_fused_like_eager(function, inputs, counts={pattern: 1})
    assert not any(value.requires_grad for value in outputs(found))


@every_spelling
def test_under_activation_checkpointing(pattern: str, spelling: str) -> None:
    function = function_of(pattern, spelling)

    def checkpointed(*arguments: Any) -> Tensor:
        return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

    inputs = inputs_of(pattern)
    found, ours = fused(checkpointed, leaves(inputs))
    assert found.report.counts() == {pattern: 1}, str(found.report)
    of_eager, exact = eager(function, leaves(inputs)), eager(function, leaves(inputs, torch.float64))
    if found.calls("seed"):
        # PyTorch's op for checkpointing, run without a compiler, draws again in backward (it leaves keeping random
        # numbers to Inductor): the next test asks about gradients.
        ours.grads = of_eager.grads = exact.grads = []
    assert_agrees(ours, of_eager, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "spelling", "parameter"), [
    ("dense_act_dense", "dropout", "weight2"), ("dropout_norm", "dropout, add, norm", "weight"),
])  # fmt: skip
def test_checkpointing_through_inductor_recomputes_the_same_mask(pattern: str, spelling: str, parameter: str) -> None:
    """The result is linear in its last weight: `sum(y) = weight · ∂sum(y)/∂weight` unless the two masks differ."""
    inputs = inputs_of(pattern, dtype=torch.float64, rows=(30, 20))
    for name in ("bias", "bias2"):
        if name in inputs:
            inputs[name] = torch.zeros_like(inputs[name]).requires_grad_()
    function = function_of(pattern, spelling)

    @torch.compile(backend=FuseBackend(strict=True))
    def checkpointed(*arguments: Any) -> Tensor:
        return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

    with collect() as report:
        total = checkpointed(*inputs.values()).sum()
    assert report.counts() == {pattern: 1}
    total.backward()
    assert (inputs[parameter] * inputs[parameter].grad).sum().item() == pytest.approx(total.item(), rel=1e-9)


@every_spelling
def test_the_rewritten_graph_can_be_exported(pattern: str, spelling: str) -> None:
    rewritten = taken(pattern, spelling, False)[0].rewritten[0]
    inputs = tuple(tensor.detach() for tensor in real_inputs(rewritten))
    exported = torch.export.export(rewritten, inputs, strict=False)
    exported.module(check_guards=False)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any(target.startswith("fuse_pass.") for target in targets), targets
    torch.manual_seed(7)
    expected = rewritten(*inputs)
    torch.manual_seed(7)
    assert torch.equal(exported.module(check_guards=False)(*inputs)[0], expected[0])


@pytest.mark.parametrize("pattern", BY_NAME)
def test_a_graph_without_a_match_is_handed_on_as_it_is(pattern: str) -> None:
    found, _ = fused(lambda x, *rest: torch.sin(x) + 1, leaves(inputs_of(pattern)))
    assert found.rewritten[0] is found.originals[0]
    assert found.report.matches == []
    assert found.report.graphs == 1


@pytest.mark.parametrize("pattern", BY_NAME)
def test_a_pattern_that_is_switched_off_does_not_fire(pattern: str) -> None:
    others = [name for name in BY_NAME if name != pattern]
    function = next(iter(BY_NAME[pattern].corpus.spellings.values()))
    found, _ = fused(function, leaves(inputs_of(pattern)), backend=FuseBackend(others, strict=True))
    assert found.report.counts()[pattern] == 0


def test_the_masks_of_eager_and_fused_are_the_same_and_drop_at_the_right_rate() -> None:
    """The truth that the tests above rely on: `SameDropout` drops a quarter, and without it the results differ."""
    inputs = inputs_of("dropout_norm", rows=(40, 50))
    function = function_of("dropout_norm", "dropout, norm")
    _, ours = fused(function, leaves(inputs))
    torch.manual_seed(1)
    assert not torch.allclose(ours.values[0], function(*leaves(inputs)))
    ones = {"x": torch.ones(200, 240), "residual": None, "weight": None, "bias": None}
    kept = eager(lambda x, *rest: torch.nn.functional.dropout(x, 0.25), leaves(ones)).values[0] != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.01)


def test_patterns_are_pattern_rows() -> None:
    assert all(isinstance(pattern, Pattern) and pattern.corpus.spellings for pattern in PATTERNS)
