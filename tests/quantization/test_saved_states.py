"""State dicts that were saved by releases before this one load.

`tests/data/state_dicts.json` holds, for every layer, the name, dtype and shape of all that version 0.1.0 saved of it;
the quantised ones were calibrated with a static input scale and int8 weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import BitLinear, FusedDenseGELUDense, FusedDropoutLayerNorm, QuantSpec, Site, calibrate, convert
from fuse_pass.nn import Int8Linear
from tests.quantization.samples import SAMPLES

SAVED = json.loads((Path(__file__).parents[1] / "data" / "state_dicts.json").read_text())
STATIC = QuantSpec(input=Site("int8", scale="static"), weight="int8")
CALIBRATED = {sample.type.__name__: sample for sample in reversed(SAMPLES) if not sample.call}
OTHERS = {
    "BitLinear": lambda: BitLinear(8, 16),
    "BitLinear, packed": lambda: BitLinear(8, 16).pack(),
    "Int8Linear": lambda: Int8Linear(8, 16),
    "FusedDenseGELUDense": lambda: FusedDenseGELUDense(8, 16, 4),
    "FusedDropoutLayerNorm": lambda: FusedDropoutLayerNorm(8),
}


def saved(name: str) -> dict[str, Tensor]:
    return {key: torch.ones(shape, dtype=getattr(torch, dtype)) for key, (dtype, shape) in SAVED[name].items()}


def assert_loads(layer: nn.Module, name: str) -> None:
    state = saved(name)
    layer.load_state_dict(state, strict=True)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.dtype is state[key].dtype


@pytest.mark.parametrize("name", sorted(SAVED.keys() - OTHERS.keys()))
def test_calibrated_layers(name: str) -> None:
    sample = CALIBRATED[name]
    layer = convert(nn.Sequential(sample.layer()), STATIC)[0]
    assert_loads(layer, name)  # into one that has no scales yet
    calibrated = convert(nn.Sequential(sample.layer()), STATIC)
    if len(sample.shapes) == 1:
        calibrate(calibrated, [sample.inputs()])
        assert_loads(calibrated[0], name)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name: str) -> None:
    assert_loads(OTHERS[name](), name)
