"""What ops ask of PyTorch: each name still means what we take it for."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor import decomposition
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fuse_pass.ops  # noqa: F401 - registers the ops
from fuse_pass.inductor import compat
from fuse_pass.numerics import random_bits


def test_every_name_exists() -> None:
    assert all(hasattr(compat, name) for name in compat.__all__)


def test_size_hint() -> None:
    environment = ShapeEnv()
    fake = torch._subclasses.FakeTensorMode(shape_env=environment).from_tensor(torch.ones(5, 7))
    assert compat.size_hint(12) == 12
    assert isinstance(fake.shape[0], torch.SymInt)
    assert compat.size_hint(fake.shape[0]) == 5
    assert compat.size_hint(fake.shape[0] * fake.shape[1]) == 35
    assert compat.size_hint(environment.create_unbacked_symint()) is None
    assert environment.guards == []


@pytest.fixture
def sine_plus_one() -> Iterator[torch._ops.OpOverload]:
    """An op that Inductor does not know yet."""
    with torch.library._scoped_library("fuse_pass_test", "DEF") as library:
        library.define("sine_plus_one(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("sine_plus_one", _sine_plus_one, "CompositeExplicitAutograd")
        torch.library.register_fake("fuse_pass_test::sine_plus_one", torch.empty_like, lib=library)
        op = torch.ops.fuse_pass_test.sine_plus_one.default
        yield op
        decomposition.decompositions.pop(op, None)
        decomposition.fast_random_decomps.cache_clear()


def _sine_plus_one(x: Tensor) -> Tensor:
    return x.sin() + 1


def code_of(op: torch._ops.OpOverload) -> tuple[str, Tensor]:
    torch._dynamo.reset()
    result, code = run_and_get_code(torch.compile(lambda x: op(x * 2).cos(), backend="inductor"), torch.ones(16))
    return "\n".join(code), result


def test_an_op_is_transparent_even_after_something_was_compiled(sine_plus_one: torch._ops.OpOverload) -> None:
    """The merged table of decompositions is cached by the first compilation."""
    expected = (torch.full((16,), 2.0).sin() + 1).cos()
    code, result = code_of(sine_plus_one)
    assert "fuse_pass_test.sine_plus_one" in code, "an op without decomposition stays one call"
    torch.testing.assert_close(result, expected)
    compat.register_decomposition(sine_plus_one, _sine_plus_one)
    with inductor_config.patch(force_disable_caches=True):  # implementations of ops are in no cache key
        code, result = code_of(sine_plus_one)
    assert "fuse_pass_test.sine_plus_one" not in code
    torch.testing.assert_close(result, expected)


def test_our_ops_are_transparent_to_inductor() -> None:
    table = decomposition.fast_random_decomps()
    for name in ("dense_act_dense", "dense_act_dense_inference", "act_dense", "dropout_norm", "seed"):
        assert getattr(torch.ops.fuse_pass, name).default in table
    for name in ("dense_act_dense_backward", "act_dense_backward", "dropout_norm_backward"):
        assert getattr(torch.ops.fuse_pass, name).default in table
    assert torch.ops.fuse_pass.gemm.default not in table


def test_onednn_linear_is_a_product() -> None:
    linear = compat.onednn_linear()
    if linear is None:
        pytest.skip("this build of PyTorch lacks oneDNN")
    a, b, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(linear(a, b, bias, "none", [], ""), a @ b.T + bias)


def test_onednn_linear_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert compat.onednn_linear() is None


def test_half_types_are_asked_about_one_by_one() -> None:
    assert {compat.has_fast_cpu_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)} <= {True, False}
    with pytest.raises(KeyError):
        compat.has_fast_cpu_dtype(torch.float32)


def test_inductor_seed_is_63_bits() -> None:
    seeds = [compat.inductor_seed(torch.device("cpu")) for _ in range(8)]
    assert all(seed.dtype is torch.int64 and seed.shape == () for seed in seeds)
    assert len({int(seed) for seed in seeds}) == 8


@pytest.mark.parametrize("x", [torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(0, 4)])
def test_stored_once_is_the_tensor_itself(x: Tensor) -> None:
    stored = compat.stored_once(x)
    assert torch.equal(stored, x)
    assert stored.stride() == x.stride()


def test_modes_are_off_inside() -> None:
    with torch._subclasses.FakeTensorMode():
        assert type(torch.ones(2)) is not Tensor
        with compat.disable_current_modes():
            assert type(torch.ones(2)) is Tensor


@pytest.mark.parametrize("folder", [None, "/somewhere/else", "relative"])
@pytest.mark.parametrize("user", ["name", r"domain\name", None])
def test_cache_dir_is_that_of_inductor(
    folder: str | None, user: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime import cache_dir_utils

    def no_user() -> str:
        raise OSError("no username set in the environment")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", no_user if user is None else lambda: user)
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: None)
    if folder is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    if user is None and folder is None and torch.__version__ < "2.12":
        pytest.skip("this Inductor needs a name")
    ours = compat.cache_dir()
    assert Path(ours).is_relative_to(tmp_path) or folder == ours
    assert ours == os.path.abspath(cache_dir_utils.cache_dir())


def recorded(function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    """The ops in a graph of a function."""
    graph = make_fx(function)(*inputs).graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_graphs_hold_the_ops_of_inductor_and_eager_code_does_not() -> None:
    prims = torch.ops.prims
    assert recorded(compat.stored_once, torch.ones(3)) == [prims.inductor_force_stride_order.default]
    assert recorded(lambda x: x + compat.inductor_seed(x.device), torch.ones(3))[0] is prims.inductor_seed.default
    x = torch.ones(3)
    assert compat.stored_once(x) is x


def test_eager_seeds_are_those_of_the_op_of_inductor() -> None:
    torch.manual_seed(5)
    ours = [compat.inductor_seed(torch.device("cpu")) for _ in range(4)]
    torch.manual_seed(5)
    assert ours == [torch.ops.prims.inductor_seed(torch.device("cpu")) for _ in range(4)]


def test_dynamo_looks_into_functions_that_store_once() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    seed = torch.tensor(3)
    compiled = torch.compile(lambda: random_bits.random_bits(seed, 4, 8), backend=keep, fullgraph=True)
    assert torch.equal(compiled(), random_bits.random_bits(seed, 4, 8))
    assert torch.ops.prims.inductor_force_stride_order in [node.target for node in graphs[0].graph.nodes]
