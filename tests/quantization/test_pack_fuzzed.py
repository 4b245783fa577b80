"""Random models, converted at random, calibrated and packed: each layer does what it did in the simulation."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import Granularity, IntFormat, QuantSpec, Site
from fuse_pass.nn import PackedQuantizedConv2d, PackedQuantizedLinear, QuantizedConv2d, QuantizedLinear
from tests.quantization import test_pack_conv2d, test_pack_converted

pytestmark = pytest.mark.processor
ROW, TOKEN = Granularity("channel", axis=0), Granularity("token")


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if x.shape == y.shape else y


def rows_model(random: Random, width: int) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for _ in range(random.randint(1, 4)):
        wider = random.choice((1, 7, 16, 33, 64, 100))
        linear = nn.Linear(width, wider, bias=random.random() < 0.7)
        layers.append(Residual(linear) if random.random() < 0.3 else linear)
        layers.append(
            random.choice((nn.GELU, nn.ReLU, nn.Tanh, nn.Identity, lambda wider=wider: nn.LayerNorm(wider)))()
        )
        width = wider
    return layers, width


def images_model(random: Random, channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(random.randint(1, 3)):
        wider, groups = random.choice((4, 8, 20)), random.choice((1, 1, 1, 4))
        conv = nn.Conv2d(
            channels, wider, random.choice((1, 3, (2, 3))), stride=random.choice((1, 2)), padding=random.choice((0, 1)),
            dilation=random.choice((1, 1, 2)), groups=groups if channels % groups == 0 else 1,
            bias=random.random() < 0.7, padding_mode=random.choice(("zeros", "zeros", "replicate")),
        )  # fmt: skip
        layers += [Residual(conv) if random.random() < 0.3 else conv, random.choice((nn.ReLU, nn.GELU, nn.Identity))()]
        channels = wider
    return layers


def random_model(random: Random) -> tuple[nn.Module, Tensor]:
    """And its input."""
    torch.manual_seed(random.randrange(2**31))
    if random.random() < 0.4:
        channels = random.choice((1, 4, 8))
        return nn.Sequential(*images_model(random, channels)), torch.randn(random.choice((1, 3)), channels, 17, 19)
    width = random.choice((1, 5, 32, 96, 130))
    shape = random.choice(((width,), (3, width), (2, 5, width), (300, width)))
    return nn.Sequential(*rows_model(random, width)[0]), torch.randn(shape) * random.choice((0.01, 1.0, 50.0))


def random_spec(random: Random, *, of_images: bool) -> QuantSpec:
    def integers() -> IntFormat:
        return IntFormat(random.choice((8, 8, 4, 6, 3)), symmetric=random.random() < 0.6)

    per_row: list[Granularity] = [Granularity("tensor"), ROW if of_images else TOKEN]
    granularity = random.choice(per_row)
    # One scale that is set holds for all; those of rows come from each input.
    scale = random.choice((None, "static", "dynamic")) if granularity.kind == "tensor" else "dynamic"
    rounding = random.choice(("nearest", "nearest", "towards_zero", "plus_inf"))
    site = Site(integers(), granularity=granularity, scale=scale, rounding=rounding, clip_grad=random.random() < 0.5)
    weight = Site(integers(), granularity=random.choice((Granularity("tensor"), ROW)))
    bias = random.choice((None, None, "int8", "fp16"))
    return QuantSpec(input=None if random.random() < 0.2 else site, weight=weight, bias=bias)


def pairs(simulated: nn.Module, packed: nn.Module, x: Tensor) -> list[tuple[Any, Any, Tensor]]:
    """Layers of the simulation, what was made of them, and what they read in the simulated model."""
    twins, found, hooks = dict(packed.named_modules()), [], []
    for name, layer in simulated.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedConv2d)):
            twin = twins[name]
            hooks.append(layer.register_forward_hook(lambda m, args, y, t=twin: found.append((m, t, args[0].clone()))))
    simulated(x)
    for hook in hooks:
        hook.remove()
    return found


def check(seed: int) -> None:
    random = Random(seed)
    model, x = random_model(random)
    of_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    kinds: dict[Any, Any] = {nn.Linear: random_spec(random, of_images=False)}
    kinds[nn.Conv2d] = random_spec(random, of_images=True)
    simulated = fuse_pass.convert(model.eval(), kinds)
    if any(site is not None and site.takes_scale for site in (kinds[nn.Conv2d if of_images else nn.Linear].input,)):
        fuse_pass.calibrate(simulated, [(0.8 * x,)], progress=False)
    with torch.no_grad(), fuse_pass.collect() as report:
        packed = fuse_pass.pack(simulated)
        assert not report.declines, report
        for layer, twin, seen in pairs(simulated, packed, x):
            assert isinstance(twin, (PackedQuantizedLinear, PackedQuantizedConv2d))
            if isinstance(layer, QuantizedLinear):
                test_pack_converted.assert_same_up_to_sums(twin(seen), layer, seen)
            else:
                difference = (twin(seen).double() - layer(seen).double()).abs()
                assert (difference <= test_pack_conv2d.bound(copy.deepcopy(layer), seen)).all()
        assert torch.isfinite(packed(x)).all()
        assert torch.equal(fuse_pass.unpack(packed)(x).isfinite(), packed(x).isfinite())


@pytest.mark.parametrize("seed", range(30))
def test_packed_models_do_what_they_did(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400, 10))
def test_300_packed_models(seed: int) -> None:
    for one in range(seed, seed + 10):
        check(one)
