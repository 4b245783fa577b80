"""Learned scales: the gradients of 1902.08153, where they exist, and that training uses them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import convert
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.calibrate import calibrate
from tests.calibration import Wired, data, network, scales_of


def paper(v: Tensor, s: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """1902.08153, equations 3 and 5: dv̂/ds and dv̂/dv, element by element."""
    ratio = v / s
    inside = (low < ratio) & (ratio < high)
    of_scale = torch.where(inside, torch.round(ratio) - ratio, torch.where(ratio <= low, float(low), float(high)))
    return of_scale, inside.double()


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_gradients_of_the_paper(per_channel: bool) -> None:
    torch.manual_seed(0)
    granularity = fuse_pass.Granularity("channel" if per_channel else "tensor")
    spec = QuantSpec("int4", Site("int4", granularity=granularity))
    layer = convert(nn.Linear(6, 5, bias=False).double(), spec, learn_scales=True)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    w = layer.weight
    mean = w.abs().mean(1, keepdim=True) if per_channel else w.abs().mean()
    torch.testing.assert_close(layer.weight_scale.data, 2 * mean.data / 7**0.5)
    calibrate(layer, [x])
    torch.testing.assert_close(layer.input_scale.data, 2 * x.abs().mean().data / 7**0.5)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}

    with torch.no_grad():  # small steps, so that much is clipped
        layer.weight_scale *= 0.5
        layer.input_scale *= 0.4
    s_x, s_w = layer.input_scale.detach(), layer.weight_scale.detach()
    grad = torch.randn(8, 5, dtype=torch.float64)
    layer(x).backward(grad)
    x_hat, w_hat = (torch.round(v / s).clamp(-7, 7) * s for v, s in ((x.detach(), s_x), (w.detach(), s_w)))
    grad_x, grad_w = grad @ w_hat, grad.T @ x_hat
    (ds_x, dx), (ds_w, dw) = paper(x.detach(), s_x, -7, 7), paper(w.detach(), s_w, -7, 7)
    assert 0 < dx.mean() < 1
    torch.testing.assert_close(x.grad, grad_x * dx)
    torch.testing.assert_close(w.grad, grad_w * dw)
    torch.testing.assert_close(layer.input_scale.grad, (grad_x * ds_x).sum() / (6 * 7) ** 0.5)
    shared = (1,) if per_channel else (0, 1)
    elements = 6 if per_channel else 30
    expected = (grad_w * ds_w).sum(shared, keepdim=per_channel) / (elements * 7) ** 0.5
    torch.testing.assert_close(layer.weight_scale.grad, expected)


def test_learned_scales_of_unsigned_integers() -> None:
    """After ReLU: zero point at the lowest integer, so that all of them are positive, as in the paper."""
    layer = convert(nn.Hardtanh(-9, 9), QuantSpec(input="int4_asymmetric"), learn_scales=True)
    x = torch.rand(50, 6, dtype=torch.float64)
    calibrate(layer, [x])
    assert layer.input_zero_point == -8
    assert isinstance(layer.input_scale, nn.Parameter)
    with torch.no_grad():
        layer.input_scale *= 0.7
    grad = torch.randn_like(x)
    layer(x).backward(grad)
    of_scale, _ = paper(x, layer.input_scale.detach(), 0, 15)
    torch.testing.assert_close(layer.input_scale.grad, (grad * of_scale).sum() / (6 * 15) ** 0.5)


def learned(fmt: str = "int3") -> nn.Module:
    model = convert(network(), fmt, learn_scales=True)
    assert not any(name.endswith("input_scale") for name in model.state_dict())
    return calibrate(model, [data()])


def test_learned_scales_are_parameters_and_travel() -> None:
    model = learned()
    assert {name for name, _ in model.named_parameters() if "scale" in name} == {
        *(f"{i}.{site}_scale" for i in (0, 2, 4) for site in ("input", "weight")), "1.input_scale", "3.input_scale",
    }  # fmt: skip
    assert tuple(model[0].weight_scale.shape) == (16, 1)
    fresh = convert(network(), "int3", learn_scales=True)
    with pytest.raises(RuntimeError, match=r"scale of 'input' is learned and has no value yet"):
        fresh(data())
    fresh.load_state_dict(model.state_dict())
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [name for name, _ in twin.named_parameters()] != []
        assert isinstance(twin[0].input_scale, nn.Parameter)
        assert torch.equal(twin(data()), model(data()))
    with torch.no_grad():
        model[0].input_scale.fill_(0.123)
    calibrate(model, [data()])
    assert model[0].input_scale == torch.tensor(0.123), "what was learned is kept"
    assert list(convert(model, None).state_dict()) == list(network().state_dict())


def test_learned_scales_only_where_they_have_a_meaning() -> None:
    model = convert(Wired(), "int8", learn_scales=True)
    assert not scales_of(model).keys() - {"unused.weight_scale"}
    calibrate(model, [torch.arange(5)])
    assert {name for name, _ in model.named_parameters() if "scale" in name} == {
        "attention.input_scale", "lstm.input_scale", "unused.weight_scale",
    }  # fmt: skip
    norm = convert(nn.LayerNorm(6), "int8", learn_scales=True)
    assert norm.spec.weight.scale is None, "a scale per element has nothing to learn"
    explicit = convert(nn.GRU(6, 6), QuantSpec(weight=Site("int8", scale="learned")))
    with pytest.raises(ValueError, match=r"weight of the model \(QuantizedGRU\) has scale='learned', but one site"):
        calibrate(explicit, [torch.randn(2, 3, 6)])


def test_training_with_learned_scales_improves_the_loss() -> None:
    """3 bits: better than before, and better than with scales that stay where they start."""
    x = data(256)
    target = network()(x).detach().argmax(1)
    losses = {}
    for learns in (True, False):
        model = learned()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns or "scale" not in name)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        history = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[learns] = history[-1]
        assert history[-1] < history[0] / 2
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert ("0.input_scale" in moved) is learns
        assert ("4.weight_scale" in moved) is learns
    assert losses[True] < losses[False]


@pytest.mark.parametrize("dynamic", [None, True])
def test_learned_scales_compile_whole_with_equal_gradients(dynamic: bool | None) -> None:
    model = learned()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (8, 13):
        found = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(data(rows))
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_a_step_below_zero_does_no_harm() -> None:
    model = learned()
    with torch.no_grad():
        model[0].input_scale.neg_()
        model[2].weight_scale.zero_()
    y = model(data())
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_embedding_learns_one_scale_or_none() -> None:
    table = nn.Embedding(5, 6)
    whole = convert(table, QuantSpec(weight=Site("int4", scale="learned")))
    whole(torch.arange(3)).sum().backward()
    assert whole.weight_scale.grad is not None
    rows = Site("int4", granularity=fuse_pass.Granularity("channel"), scale="learned")
    layer = convert(table, QuantSpec(weight=rows, output="int8"))
    with pytest.raises(ValueError, match="scale='learned', but rows are looked up before they are quantised"):
        calibrate(layer, [torch.arange(3)])
