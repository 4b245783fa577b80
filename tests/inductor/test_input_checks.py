"""Which sizes the generated code checks, and that what is not checked there never gets that far."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import run_and_get_code

from fuse_pass.backend import FuseBackend, fuse_backend
from fuse_pass.inductor import input_checks

ROWS, WIDTH, HIDDEN = 4, 8, 16
GUARDED = torch.__version__ >= "2.12"  # the sizes of parameters, by Dynamo


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).eval()


def checks(call: Callable[..., Any], *args: Any) -> list[int]:
    """How many inputs each graph checks that one call compiles."""
    _, codes = run_and_get_code(call, *args)
    return [sum(map(_checked, code.splitlines())) for code in codes]


def _checked(line: str) -> int:
    """How many inputs a line of generated code checks; torch 2.15 checks those of one kernel together."""
    group = re.search(r"assert_size_stride_grouped\(\(([^)]*)\).*'input'\)", line)
    one = re.search(r"assert_size_stride\((?:arg|primals_|tangents_)", line)
    return len(group[1].split(",")) if group else int(one is not None)


def infer(model: nn.Module, x: Tensor, **settings: Any) -> list[int]:
    with torch.no_grad():
        return checks(torch.compile(model, **settings), x)


def test_stock_inductor_checks_every_input() -> None:
    assert infer(block(), torch.randn(ROWS, WIDTH)) == [5]


def test_fused_graph_checks_none() -> None:
    assert infer(block(), torch.randn(ROWS, WIDTH), backend=fuse_backend) == [0 if GUARDED else 5]


def test_graph_with_nothing_of_ours_checks_every_input() -> None:
    assert infer(nn.Linear(WIDTH, HIDDEN), torch.randn(ROWS, WIDTH), backend=FuseBackend(["dropout_norm"])) == [3]


def test_asked_for_checks_are_made() -> None:
    options = {"size_asserts": True}
    assert infer(block(), torch.randn(ROWS, WIDTH), backend=fuse_backend, options=options) == [5]


def test_input_of_varying_size_is_checked() -> None:
    assert infer(block(), torch.randn(ROWS, WIDTH), backend=fuse_backend, dynamic=True) == [1 if GUARDED else 5]


def test_backward_checks_what_hooks_on_saved_tensors_may_change() -> None:
    compiled = torch.compile(block(), backend=fuse_backend)
    forward, backward = checks(lambda x: compiled(x).sum().backward(), torch.randn(ROWS, WIDTH, requires_grad=True))
    assert forward == (0 if GUARDED else 5)
    assert backward > 0


def test_caller_without_guards_is_checked() -> None:
    captured: list[torch.fx.GraphModule] = []
    torch.compile(block(), backend=lambda gm, inputs: captured.append(gm) or gm)(torch.randn(ROWS, WIDTH))
    inputs = [node.meta["example_value"].detach() for node in captured[0].graph.find_nodes(op="placeholder")]
    real = [torch.randn(value.shape) for value in inputs]
    with torch.no_grad():
        assert checks(lambda: fuse_backend(captured[0], real)(*real)) == [5]


@pytest.mark.parametrize("change", ["rows", "strides", "weight", "weight strides", "hidden"])
def test_another_size_is_compiled_anew(change: str) -> None:
    model, x = block(), torch.randn(ROWS, WIDTH)
    counter = CompileCounterWithBackend("fuse_pass_backend")
    compiled = torch.compile(model, backend=counter, dynamic=False)
    with torch.no_grad():
        compiled(x)
        if change == "rows":
            x = torch.randn(2 * ROWS, WIDTH)
        elif change == "strides":
            x = torch.randn(WIDTH, ROWS).t()
        elif change == "weight strides":
            model[0].weight.data = torch.randn(WIDTH, HIDDEN).t()  # type: ignore[union-attr,index]
        elif change == "weight":
            model[2].weight.data, model[2].bias.data = torch.randn(3, HIDDEN), torch.randn(3)  # type: ignore[index,union-attr]
        else:
            model[0], model[2] = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)  # type: ignore[operator]
        if "weight" in change and not GUARDED:  # nor does plain torch.compile compile it anew
            with pytest.raises(AssertionError, match="expected size"):
                compiled(x)
            return
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


def test_inductor_is_as_it_was_outside_of_our_compilations() -> None:
    stock = PythonWrapperCodegen.codegen_input_size_asserts
    seen: list[Any] = []

    def look(gm: torch.fx.GraphModule) -> None:
        seen.append(PythonWrapperCodegen.codegen_input_size_asserts)

    options = {"joint_custom_post_pass": look}
    with torch.no_grad():
        torch.compile(block(), backend=fuse_backend, options=options)(torch.randn(ROWS, WIDTH))
    assert seen
    assert seen[0] is not stock
    assert PythonWrapperCodegen.codegen_input_size_asserts is stock


def test_compilations_at_the_same_time() -> None:
    stock = PythonWrapperCodegen.codegen_input_size_asserts
    first, second = input_checks.left_to_guards(), input_checks.left_to_guards()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert PythonWrapperCodegen.codegen_input_size_asserts is not stock
    second.__exit__(None, None, None)
    assert PythonWrapperCodegen.codegen_input_size_asserts is stock
