"""Private parts of PyTorch under names of ours: each still does what its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fuse_pass.graph.shapes import is_plain
from fuse_pass.inductor import compiler, debugging, private
from tests.graph.dynamo import graph_of


@pytest.mark.parametrize("module", [private, compiler, debugging], ids=["private", "compiler", "debugging"])
def test_every_name_exists(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)


def test_fake_tensors_are_told_from_real_ones() -> None:
    mode = FakeTensorMode()
    with mode:
        fake = torch.ones(3)
    assert private.is_fake(fake)
    assert private.fake_mode_of(fake) is mode
    for other in (torch.ones(3), nn.Parameter(torch.ones(3)), 3, None):
        assert not private.is_fake(other)
        assert private.fake_mode_of(other) is None


def test_a_fake_tensor_need_not_be_of_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.14 prepares them: what `is_fake_tensor` says counts."""
    monkeypatch.setattr(private, "_is_fake_tensor", lambda value: isinstance(value, Tensor))
    assert is_plain(torch.ones(3))
    assert is_plain(nn.Parameter(torch.ones(3)))
    assert not is_plain(torch.ones(3).to_sparse())
    monkeypatch.setattr(private, "_is_fake_tensor", lambda value: False)
    assert not is_plain(torch.ones(3))


def test_subclasses_are_not_plain() -> None:
    class Subclass(Tensor):
        """Of a user."""

    assert not private.is_plain_class(torch.ones(3).as_subclass(Subclass))


def test_tensors_that_share_memory() -> None:
    x = torch.ones(3, 4)
    assert private.address_of(x) == private.address_of(x[1:].t())
    assert private.address_of(x) != private.address_of(x.clone())
    before = private.version_of(x)
    x.add_(1)
    assert private.version_of(x) == before + 1


def test_wrappers_of_transforms() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(private.is_transformed(x))
        assert not private.is_transformed(private.unwrapped(x))
        return x.sin()

    torch.func.vmap(look)(torch.ones(3))
    assert seen == [True]
    assert not private.is_transformed(torch.ones(3))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(register: str) -> None:
    module = nn.Linear(2, 2)
    assert not private.has_hooks(module)
    handle = getattr(module, register)(lambda *args: None)
    assert private.has_hooks(module)
    handle.remove()
    assert not private.has_hooks(module)


def _double(x: Tensor) -> Tensor:
    return 2 * x


def test_wrapped_models() -> None:
    model = nn.Linear(2, 2)
    assert private.uncompiled(torch.compile(model)) is model
    assert private.uncompiled(torch.compile(_double)) is _double
    assert private.uncompiled(model) is model


def test_writing_ops() -> None:
    aten = torch.ops.aten
    assert private.may_write(aten.add_.Tensor)
    assert private.may_write(aten.add)  # its `out` overload
    assert not private.may_write(aten.add.Tensor)
    assert not private.may_write(aten.mT)


def test_autocast_is_off_for_the_ops_inside() -> None:
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(a, b).dtype is torch.bfloat16
        with private.without_autocast("cpu"):
            assert torch.mm(a, b).dtype is torch.float32


def test_copied_graphs_keep_their_sources() -> None:
    gm = graph_of(nn.Linear(2, 2), torch.ones(2, 2))
    first, second, *_ = gm.graph.nodes
    plain = gm.graph.placeholder("plain")
    private.share_source(plain, second)
    assert second._dynamo_source is not None
    private.share_source(first, plain)
    assert plain._dynamo_source is first._dynamo_source
