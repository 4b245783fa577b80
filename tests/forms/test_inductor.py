"""Graph forms: what AOTAutograd and Inductor make of a training step with ops of ours; a failure names the form."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import decomposition
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, Node

from fuse_pass.inductor import compiler
from fuse_pass.joint.recompute import RecomputeTags
from fuse_pass.nn import FusedDropoutLayerNorm

aten, prims = torch.ops.aten, torch.ops.prims


class Recorder(CustomGraphPass):
    """Keeps copies of the graphs that it sees."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph: Graph) -> None:
        copy = Graph()
        copy.output(copy.graph_copy(graph, {}))
        self.graphs.append(copy)

    def uuid(self) -> Any:
        return None


class Training(nn.Module):
    """Two dropouts of ours and one of Inductor."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(FusedDropoutLayerNorm(8, 0.5) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norms(x), 0.25).sin()


@functools.cache
def training() -> tuple[list[Node], list[Graph], list[str]]:
    """The joint graph before our tags, its two halves, and the code of both."""
    joint, halves = Recorder(), Recorder()
    compiled = torch.compile(
        Training(),
        options={
            "joint_custom_post_pass": RecomputeTags(b"forms", (joint,)),
            "post_grad_custom_pre_pass": halves,
        },
    )
    x = torch.randn(4, 8, requires_grad=True)
    _, codes = run_and_get_code(lambda: compiled(x).sum().backward())
    assert len(joint.graphs) == 1, "joint_custom_post_pass no longer runs once for a training step"
    return list(joint.graphs[0].nodes), halves.graphs, codes


def nodes_of(target: Any) -> list[Node]:
    return [node for node in training()[0] if node.target is target]


def test_nodes_of_the_joint_graph_know_the_op_they_came_from() -> None:
    origins = {node.meta.get("original_aten") for node in training()[0]}
    names = {str(origin) for origin in origins if getattr(origin, "namespace", None) == "fuse_pass"}
    expected = {"fuse_pass.seed.default", "fuse_pass.dropout_norm.default", "fuse_pass.dropout_norm_backward.default"}
    assert expected <= names, f"original_aten no longer names our ops, but {names}"


def test_values_of_the_joint_graph_are_noted() -> None:
    products = nodes_of(aten.mul.Tensor)
    assert products, "no product in the joint graph"
    assert all(isinstance(node.meta.get("val"), Tensor) for node in products), "no meta['val'] in the joint graph"


def test_every_seed_is_a_draw_of_its_own() -> None:
    lookups = nodes_of(prims.inductor_lookup_seed.default)
    assert len({node.args[1] for node in lookups}) == 3, (
        f"expected 3 draws by prims.inductor_lookup_seed, got {[node.args for node in lookups]}; "
        f"the joint graph has {sorted({str(node.target) for node in training()[0] if 'seed' in str(node.target)})}"
    )


def test_stock_dropout_compares_its_random_numbers_with_p() -> None:
    (random,) = nodes_of(prims.inductor_random.default)
    (compared,) = random.users
    assert random.args[2] == "rand", f"prims.inductor_random's arguments are {random.args}"
    assert (compared.target, compared.args) == (aten.gt.Scalar, (random, 0.25)), (
        f"dropout compares by {compared.target}"
    )
    assert str(compared.meta.get("original_aten")) == "aten.native_dropout.default", "a stock dropout is not to be told"


def test_recompute_tags_are_obeyed() -> None:
    forward, backward = training()[1]
    saved = [node.meta["val"] for node in forward.output_node().all_input_nodes if "val" in node.meta]
    masks = [value for value in saved if value.dtype in (torch.bool, torch.int32)]
    assert len(masks) <= 1, f"min-cut keeps {len(masks) - 1} masks that are tagged MUST_RECOMPUTE"  # one is not ours
    hashes = [node for node in backward.nodes if node.target is aten.bitwise_xor.Tensor]
    assert hashes, "backward no longer computes our masks again"


def test_what_is_stored_once_stays() -> None:
    assert nodes_of(compiler.STORED_ONCE), "the joint graph has lost prims.inductor_force_stride_order"


def test_generated_code_checks_its_inputs() -> None:
    for code in training()[2]:
        assert "assert_size_stride" in code, "the sizes of inputs are no longer checked by assert_size_stride"


@pytest.mark.parametrize("name", ["codegen_input_size_asserts", "get_graph_inputs"])
def test_writer_of_generated_code(name: str) -> None:
    assert callable(getattr(PythonWrapperCodegen, name, None)), f"PythonWrapperCodegen has no {name}() any more"


@pytest.mark.parametrize(
    "name",
    [
        *("joint_custom_post_pass", "fallback_random", "size_asserts", "freezing", "max_autotune"),
        *("triton.cudagraphs", "cpp.threads"),
    ],
)
def test_setting_of_inductor(name: str) -> None:
    assert compiler.is_inductor_option(name), f"torch._inductor.config.{name} is gone"


def test_ops_are_opened_for_inductor() -> None:
    assert torch.ops.fuse_pass.dropout_norm.default in decomposition.fast_random_decomps(), (
        "register_decomposition no longer reaches the table that Inductor reads"
    )


def test_seed_is_a_number_of_63_bits() -> None:
    seed = torch.ops.prims.inductor_seed(torch.device("cpu"))
    assert (seed.dtype, seed.shape) == (torch.int64, ()), f"prims.inductor_seed gives {seed!r}"
