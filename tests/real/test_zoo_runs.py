"""The models of the zoo compute what they computed before, and are compiled no more often.

Each is called three times, the last time with another batch, in train mode with gradients and in eval mode without. Its
rewritten graphs run through AOTAutograd, without kernels of Inductor, and are compared with eager PyTorch against
float64, dropout masks alike. Dynamo's graphs, frames and graph breaks must be those of a backend that changes nothing.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import GraphModule

import fuse_pass
from fuse_pass.backend import FuseBackend
from fuse_pass.gemm import measured
from fuse_pass.testing import levels, masks
from fuse_pass.testing.compare import Status, judge
from fuse_pass.testing.differences import noise_of
from fuse_pass.testing.model_runs import ModelRuns
from tests.real.zoo_models import build, zoo

# Whose products stay with PyTorch's library: in oneDNN's order of summation one gradient of a window attention errs up
# to 1.12 times what is allowed.
WITHOUT_ONEDNN = ("clap",)
# Whose batch norms see so few values of a channel that eager's gradients are a thousandth noise and more.
WITHOUT_BATCH_STATISTICS = ("convmixer_768_32", "halonet26t", "mobileone_s0", "vgg11_bn")
_SETS_REQUIRES_GRAD = "it sets requires_grad of its inputs, which here are leaves of the test no more"
NOT_COMPARED = {
    (
        "deformable_detr",
        True,
    ): "compiled, stock or by us, it draws masks of PyTorch's, which nothing can be compared with",
    ("hubert", True): _SETS_REQUIRES_GRAD,
    ("speecht5", True): _SETS_REQUIRES_GRAD,
    ("unispeech", True): _SETS_REQUIRES_GRAD,
    ("unispeech-sat", True): _SETS_REQUIRES_GRAD,
    ("wav2vec2", True): _SETS_REQUIRES_GRAD,
    ("wav2vec2-conformer", True): _SETS_REQUIRES_GRAD,
    ("wav2vec2-conformer", False): "its table of positions, kept from call to call, is one for another length",
}
SAMPLE = ("gpt2", "nn.TransformerEncoder-gelu-pre")
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def unchanged(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return masks.use_in(gm).forward


def through_the_front(model: torch.nn.Module, *, backend: levels.Backend) -> Callable[..., Any]:
    """`fuse_pass.compile`, with `backend` in place of its own."""
    compiled = fuse_pass.compile(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(FuseBackend, "__call__", lambda self, gm, inputs, **options: backend(gm, inputs)):
            return compiled(*args, **kwargs)

    return call


def assert_right(name: str, training: bool, compiler: Callable[..., Any] = torch.compile) -> None:
    if (name, training) in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[name, training])
    model, args, kwargs = build(name)
    without = mock.patch.object(measured, "table", return_value={})
    products = without if name in WITHOUT_ONEDNN else contextlib.nullcontext()
    with levels.ready_to_compare(), products:
        reads_batch = name not in WITHOUT_BATCH_STATISTICS
        runs = ModelRuns(model, args, kwargs, training=training, compiler=compiler, batch_statistics=reads_batch)
        noise = noise_of([(runs.eager(runs.seed), runs.exact(runs.seed))])
        assert statistics.median(noise.values()) < 1e-4, "the reference is another function, and allows every error"
        verdict = judge(runs)
        # Layers that are dropped at random (layerdrop) differ from eager as in stock torch.compile.
        assert verdict.status in (Status.RIGHT, Status.NOISE, Status.AS_STOCK), str(verdict)
        runs.compiled(unchanged)(runs.seed)
    ours, stock = runs.compilations[0], runs.compilations[-1]
    assert stock.graphs > 0
    assert ours == stock


@train_and_eval
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name: str, training: bool) -> None:
    assert_right(name, training)


@pytest.mark.slow
@train_and_eval
@pytest.mark.parametrize("name", sorted(set(zoo.names()) - set(SAMPLE)))
def test_the_rest_of_the_zoo(name: str, training: bool) -> None:
    assert_right(name, training)


@pytest.mark.slow
@train_and_eval
@pytest.mark.parametrize("name", zoo.names("nn"))
def test_without_the_fast_path_of_attention(name: str, training: bool) -> None:
    """As `fuse_pass.compile` sets them up; in `torch.compile` that path hides their layers in eval mode."""
    assert_right(name, training, through_the_front)
