"""For every `torch.nn` type that has a quantised layer: ways to construct it, and inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.quantization.layers import LAYER_FOR


@dataclass(frozen=True)
class Sample:
    """A layer and its inputs.

    Attributes:
        type: the `torch.nn` type.
        arguments: of its constructor.
        shapes: of its floating-point inputs.
        options: keyword arguments of its constructor.
        call: keyword arguments of its call.
        indices: size of a table that the input points into, instead of floating-point inputs.
    """

    type: type[nn.Module]
    arguments: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    indices: int | None = None

    @property
    def id(self) -> str:
        words = [self.type.__name__, *(f"{name}={value}" for name, value in {**self.options, **self.call}.items())]
        return " ".join(words)[:80]

    def layer(self) -> nn.Module:
        layer = self.type(*self.arguments, **self.options)
        for parameter in layer.parameters():  # norms begin with 1 and 0, which every format holds
            nn.init.uniform_(parameter, -1, 1)
        return layer

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        if self.indices is not None:
            return tuple(torch.randint(0, self.indices, shape) for shape in self.shapes)
        return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in self.shapes)


def _s(
    kind: type[nn.Module], *arguments: Any, x: Any, call: Any = None, indices: int | None = None, **options: Any
) -> Sample:
    shapes = x if isinstance(x[0], tuple) else (x,)
    return Sample(kind, arguments, shapes, options, call or {}, indices)


_MASK = torch.tensor([[False, True, False, False, True], [False] * 5])
_CAUSAL = torch.ones(4, 5, dtype=torch.bool).triu(1)

SAMPLES: tuple[Sample, ...] = (
    _s(nn.Linear, 6, 10, x=(3, 4, 6)),
    _s(nn.Linear, 6, 10, x=(6,), bias=False),
    _s(nn.Linear, 6, 10, x=(0, 6)),
    _s(nn.Conv1d, 4, 6, 3, x=(2, 4, 9), stride=2, padding=1),
    _s(nn.Conv1d, 4, 6, 3, x=(4, 9), padding_mode="circular", padding=1),
    _s(nn.Conv2d, 4, 6, 3, x=(2, 4, 9, 8), groups=2, dilation=2, bias=False),
    _s(nn.Conv2d, 4, 6, (3, 2), x=(2, 4, 9, 8), padding="same", padding_mode="reflect"),
    _s(nn.Conv3d, 2, 3, 2, x=(2, 2, 4, 5, 6), padding=1),
    _s(nn.ConvTranspose1d, 4, 6, 3, x=(2, 4, 9), stride=2, output_padding=1),
    _s(nn.ConvTranspose2d, 4, 6, 3, x=(2, 4, 5, 6), stride=2, groups=2, call={"output_size": [12, 14]}),
    _s(nn.ConvTranspose3d, 2, 3, 2, x=(2, 2, 4, 3, 3), bias=False),
    _s(nn.LayerNorm, 6, x=(3, 4, 6)),
    _s(nn.LayerNorm, (4, 6), x=(3, 4, 6), bias=False, eps=1e-3),
    _s(nn.LayerNorm, 6, x=(3, 6), elementwise_affine=False),
    _s(nn.RMSNorm, 6, x=(3, 4, 6), eps=1e-6),
    _s(nn.RMSNorm, (4, 6), x=(3, 4, 6), elementwise_affine=False),
    _s(nn.GroupNorm, 3, 6, x=(2, 6, 5)),
    _s(nn.GroupNorm, 3, 6, x=(2, 6, 5), affine=False),
    _s(nn.InstanceNorm1d, 6, x=(2, 6, 5), affine=True, track_running_stats=True),
    _s(nn.InstanceNorm1d, 6, x=(6, 5)),
    _s(nn.InstanceNorm2d, 6, x=(2, 6, 5, 4), momentum=None, track_running_stats=True),
    _s(nn.InstanceNorm3d, 6, x=(2, 6, 3, 2, 4), affine=True),
    _s(nn.BatchNorm1d, 6, x=(5, 6)),
    _s(nn.BatchNorm1d, 6, x=(5, 6, 3), momentum=None),
    _s(nn.BatchNorm2d, 6, x=(2, 6, 5, 4), affine=False),
    _s(nn.BatchNorm2d, 6, x=(2, 6, 5, 4), momentum=0.3, eps=1e-3),
    _s(nn.BatchNorm3d, 6, x=(2, 6, 3, 2, 4), track_running_stats=False),
    _s(nn.RNN, 5, 7, x=(3, 4, 5), batch_first=True),
    _s(nn.RNN, 5, 7, 2, x=(4, 3, 5), nonlinearity="relu", bidirectional=True, bias=False),
    _s(nn.LSTM, 5, 7, x=(3, 4, 5), batch_first=True),
    _s(nn.LSTM, 5, 7, 2, x=(4, 3, 5), bidirectional=True, proj_size=3),
    _s(nn.LSTM, 5, 7, x=(4, 5), bias=False),
    _s(nn.GRU, 5, 7, x=(3, 4, 5), batch_first=True),
    _s(nn.GRU, 5, 7, 2, x=(4, 3, 5), bidirectional=True),
    _s(nn.MultiheadAttention, 8, 2, x=((2, 4, 8), (2, 5, 8), (2, 5, 8)), batch_first=True),
    _s(nn.MultiheadAttention, 8, 2, x=((4, 2, 8), (5, 2, 6), (5, 2, 10)), kdim=6, vdim=10, bias=False),
    _s(nn.MultiheadAttention, 8, 4, x=((4, 8), (5, 8), (5, 8)), add_bias_kv=True, call={"average_attn_weights": False}),
    _s(nn.MultiheadAttention, 8, 2, x=((2, 4, 8), (2, 5, 8), (2, 5, 8)), batch_first=True, add_zero_attn=True,
       add_bias_kv=True, call={"key_padding_mask": _MASK, "attn_mask": _CAUSAL}),
    _s(nn.Embedding, 11, 6, x=(3, 4), indices=11, padding_idx=2),
    _s(nn.Embedding, 11, 6, x=(3, 4), indices=11, max_norm=0.7, scale_grad_by_freq=True),
    *(_s(kind, x=(3, 4, 6)) for kind in (
        nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
        nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, nn.GLU, nn.PReLU,
    )),
    _s(nn.ReLU, x=(3, 4), inplace=True),
    _s(nn.GELU, x=(3, 4), approximate="tanh"),
    _s(nn.LeakyReLU, 0.3, x=(3, 4)),
    _s(nn.PReLU, 4, x=(3, 4)),
    _s(nn.Softmax, -1, x=(3, 4)),
    _s(nn.LogSoftmax, 1, x=(3, 4)),
    _s(nn.MaxPool1d, 2, x=(2, 3, 8)),
    _s(nn.MaxPool2d, 2, x=(2, 3, 8, 6), return_indices=True),
    _s(nn.MaxPool3d, 2, x=(2, 3, 4, 4, 4)),
    _s(nn.AvgPool1d, 3, x=(2, 3, 8), padding=1),
    _s(nn.AvgPool2d, 3, x=(2, 3, 8, 6), ceil_mode=True),
    _s(nn.AvgPool3d, 2, x=(2, 3, 4, 4, 4)),
    *(_s(kind, 2, x=(2, 3, 5)) for kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)),
    *(_s(kind, 2, x=(2, 3, 5, 5)) for kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)),
    *(_s(kind, 2, x=(2, 3, 5, 5, 5)) for kind in (nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)),
    *(_s(kind, 0.0, x=(2, 3, 4)) for kind in (nn.Dropout, nn.AlphaDropout)),
    *(_s(kind, 0.0, x=(2, 3, *(4,) * d)) for d, kind in enumerate((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), 1)),
)  # fmt: skip

assert {sample.type for sample in SAMPLES} == set(LAYER_FOR), "a layer without a sample"
