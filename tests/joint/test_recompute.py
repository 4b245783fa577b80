"""What the compiled forward keeps for backward, read off the graph that Inductor compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

from fuse_pass.backend import FuseBackend, fuse_backend
from fuse_pass.joint import recompute
from fuse_pass.joint.recompute import RecomputeTags

ROWS, WIDTH, HIDDEN = 6, 8, 24


class Block(nn.Module):
    """A feed-forward block; each tensor of a size of its own."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.LayerNorm(WIDTH)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        a = F.dropout(F.gelu(self.first(x)), self.p)
        y: Tensor = self.norm(x + F.dropout(self.second(a), self.p))
        return y


class Outputs(CustomGraphPass):
    """Notes what every compiled graph returns: of a training step the forward, saved values included, comes first."""

    def __init__(self) -> None:
        self.graphs: list[list[Tensor]] = []

    def __call__(self, graph: Graph) -> None:
        nodes = [node for node in graph.output_node().args[0] if isinstance(node, torch.fx.Node)]
        self.graphs.append([node.meta["val"] for node in nodes if isinstance(node.meta["val"], Tensor)])

    def uuid(self) -> Any:
        return None  # compile anew each time, or there is nothing to see


class Noting(CustomGraphPass):
    """A pass that a user has put on the joint graph."""

    def __init__(self, identity: Any, log: list[Any]) -> None:
        self.identity, self.log = identity, log

    def __call__(self, graph: Graph) -> None:
        tags = [node.meta.get("recompute") for node in graph.nodes]
        self.log.append((self.identity, CheckpointPolicy.MUST_RECOMPUTE in tags))

    def uuid(self) -> Any:
        return self.identity


def train(
    module: nn.Module, *, backend: Any = fuse_backend, options: dict[str, Any] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns what the forward graph returns, the loss' input, and the gradient of x."""
    outputs, x = Outputs(), torch.randn(ROWS, WIDTH, requires_grad=True)
    options = {"post_grad_custom_post_pass": outputs, **(options or {})}
    y = torch.compile(module, backend=backend, options=options)(x)
    y.square().sum().backward()
    assert x.grad is not None
    return outputs.graphs[0], y, x.grad


def masks(values: list[Tensor]) -> list[Tensor]:
    return [value for value in values if value.dim() > 0 and not value.is_floating_point()]


def of_hidden_size(values: list[Tensor]) -> list[Tensor]:
    return [value for value in values if value.shape == (ROWS, HIDDEN)]


@pytest.fixture
def untagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_is_recomputable", lambda node, memory: False)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_mask_and_one_hidden_value_are_kept(p: float) -> None:
    kept, _, _ = train(Block(p))
    assert masks(kept) == []
    assert [value.dtype for value in of_hidden_size(kept)] == [torch.float32]
    # y, the input of the block, the normalised sum: nothing else of the width of the model.
    assert len([value for value in kept if value.shape == (ROWS, WIDTH)]) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("memory", "kept_values"), [("fastest", 2), ("balanced", 1), ("smallest", 0)])
def test_memory_settles_how_many_hidden_values_are_kept(memory: str, kept_values: int, bias: bool) -> None:
    module = Block()
    if not bias:
        module.first.bias = module.second.bias = None
    torch.manual_seed(5)
    kept, y, grad = train(module, backend=FuseBackend(memory=memory, strict=True))
    assert len(of_hidden_size(kept)) == kept_values
    assert masks(kept) == []
    torch.manual_seed(5)
    _, other_y, other_grad = train(module, backend=FuseBackend(strict=True))
    torch.testing.assert_close(y, other_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, other_grad, rtol=1e-5, atol=1e-6)


def test_of_two_blocks_in_a_row_only_the_hidden_products_are_repeated() -> None:
    """The first block's result is read by the second's first product, and by no activation."""

    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x
            for _ in range(2):
                y = self.second(F.gelu(self.first(y)))
            return y

    kept, _, _ = train(Twice(), backend=FuseBackend(memory="smallest", strict=True))
    assert of_hidden_size(kept) == []
    assert len([value for value in kept if value.shape == (ROWS, WIDTH)]) == 3, "y, x, and what lies between the blocks"


@pytest.mark.usefixtures("untagged")
def test_without_tags_both_would_be_kept() -> None:
    kept, _, _ = train(Block())
    assert len(of_hidden_size(kept)) == 2
    assert masks(kept) != []


@pytest.mark.parametrize("act", [F.relu, F.silu, F.mish, F.elu, lambda h: F.gelu(h, approximate="tanh")])
def test_no_activation_is_kept(act: Callable[[Tensor], Tensor]) -> None:
    class Feedforward(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(act(self.first(x)))
            return y

    kept, _, _ = train(Feedforward())
    assert masks(kept) == []
    assert len(of_hidden_size(kept)) == 1


def test_recomputed_gradients_are_those_of_eager() -> None:
    module = Block(0.0)
    torch.manual_seed(5)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    torch.manual_seed(5)
    _, y, grad = train(module)
    eager = module(x)
    torch.testing.assert_close(y, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager.square().sum(), x)[0])


def test_recomputed_masks_are_those_of_the_forward() -> None:
    """With the Linears as identities, y = dropout(relu(x)) and dy/dx = y where x is 1."""

    class Identity(nn.Module):
        def forward(self, x: Tensor, eye: Tensor) -> Tensor:
            return F.linear(F.dropout(F.relu(F.linear(x, eye)), 0.3), eye)

    x = torch.ones(32, 64, requires_grad=True)
    y = torch.compile(Identity(), backend=fuse_backend)(x, torch.eye(64))
    y.sum().backward()
    assert 0 < (y == 0).sum() < y.numel()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach())


def test_stock_dropout_is_not_recomputed() -> None:
    """These tags are for our ops alone; `joint.dropout_masks` sees to the dropouts that we did not fuse.

    Of theirs only the seeds are tagged, and those are kept.
    """
    origins: dict[Any, set[str]] = {policy: set() for policy in CheckpointPolicy}

    class Tagging(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            RecomputeTags(b"key")(graph)
            for node in graph.nodes:
                if "recompute" in node.meta:
                    origins[node.meta["recompute"]].add(node.meta["original_aten"].namespace)

        def uuid(self) -> Any:
            return None

    class Mixed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * F.dropout(x, 0.4).sin()

    train(Mixed(), options={"joint_custom_post_pass": Tagging()})
    assert origins.pop(CheckpointPolicy.MUST_RECOMPUTE) == {"fuse_pass"}
    assert origins.pop(CheckpointPolicy.MUST_SAVE) == {"fuse_pass", "aten"}
    assert not any(origins.values())


# --- the user's own passes --------------------------------------------------------------------------------------------


def test_a_pass_of_the_user_runs_before_ours() -> None:
    log: list[Any] = []
    kept, _, _ = train(Block(), options={"joint_custom_post_pass": Noting("theirs", log)})
    assert log == [("theirs", False)]
    assert len(of_hidden_size(kept)) == 1
    assert masks(kept) == []


def test_a_pass_of_the_user_under_a_dashed_name_runs() -> None:
    log: list[Any] = []
    train(Block(), options={"joint-custom-post-pass": Noting("theirs", log)})
    assert log == [("theirs", False)]


def test_a_pass_in_the_global_configuration_runs() -> None:
    log: list[Any] = []
    with torch._inductor.config.patch(joint_custom_post_pass=Noting("global", log)):
        train(Block())
    assert log == [("global", False)]


def test_a_graph_without_matches_keeps_the_users_pass() -> None:
    log: list[Any] = []
    train(Block(), backend=FuseBackend(patterns=()), options={"joint_custom_post_pass": Noting("theirs", log)})
    assert log == [("theirs", False)]


def test_identity_joins_ours_and_theirs() -> None:
    first, second = Noting("first", []), Noting("second", [])
    identities = [
        RecomputeTags(b"key").uuid(),
        RecomputeTags(b"other").uuid(),
        RecomputeTags(b"key", memory="smallest").uuid(),
        RecomputeTags(b"key", [first]).uuid(),
        RecomputeTags(b"key", [second]).uuid(),
        RecomputeTags(b"key", [first, second]).uuid(),
        RecomputeTags(b"key", [second, first]).uuid(),
    ]
    assert None not in identities
    assert len(set(identities)) == len(identities)
    assert RecomputeTags(b"key", [first]).uuid() == RecomputeTags(b"key", [Noting("first", [])]).uuid()


def test_a_pass_without_identity_has_none() -> None:
    known, unknown = Noting("known", []), Noting(None, [])
    assert RecomputeTags(b"key", [known, unknown]).uuid() is None
    assert RecomputeTags(b"key", [known, lambda graph: None]).uuid() is None


def test_a_tag_of_someone_else_stays() -> None:
    """A node that activation checkpointing has already decided on is left alone."""
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    node.meta = {"original_aten": torch.ops.fuse_pass.dense_act_dense.default, "val": torch.ones(2), "recompute": "x"}
    free = graph.call_function(torch.ops.aten.mul.Tensor, (node, 2))
    free.meta = {"original_aten": torch.ops.fuse_pass.dense_act_dense.default, "val": torch.ones(2)}
    graph.output(free)
    RecomputeTags(b"key")(graph)
    assert node.meta["recompute"] == "x"
    assert free.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE


def test_products_and_seeds_are_never_recomputed() -> None:
    graph = Graph()
    origin = {"original_aten": torch.ops.fuse_pass.dense_act_dense.default}
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    product.meta = origin | {"val": torch.ones(2, 2)}
    seed = graph.call_function(torch.ops.aten.bitwise_and.Scalar, (x, 1))
    seed.meta = origin | {"val": torch.zeros((), dtype=torch.int32)}
    graph.output((product, seed))
    RecomputeTags(b"key")(graph)
    assert "recompute" not in product.meta
    assert "recompute" not in seed.meta
