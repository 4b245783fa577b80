"""The models and operations that the checks of the pretended device compile, large and small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass.nn import BitLinear
from models import bert, gpt2, llama
from models.layers import Attention, PreNormBlock, feed_forward

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    """Rows and widths: as models have them, or as Triton's interpreter can bear."""

    rows: int
    dim: int
    hidden: int
    gated_hidden: int
    batch: int
    time: int
    encoder_dim: int
    heads: int
    attention_dropout: float  # by PyTorch's generator, whose masks we cannot compute: none where results are compared


LARGE = Sizes(8192, 4096, 16384, 11008, 16, 512, 1024, 16, 0.1)
SMALL = Sizes(32, 128, 192, 96, 2, 16, 64, 4, 0.0)


@dataclass(frozen=True)
class Case:
    """Something to compile.

    Attributes:
        make: builds it, and its arguments, for these sizes and on this device.
        train: whether gradients are asked for; also whether modules are in training mode.
        autocast: the dtype of an autocast region around the call.
        options: of `FuseBackend`.
        has_rival: whether stock Inductor computes the same without us; ops of ours are compared with their arguments
            and results, each read or written once.
    """

    make: Callable[[Sizes, str], tuple[Callable[..., Any], tuple[Any, ...]]]
    train: bool = True
    autocast: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    has_rival: bool = True

    def build(self, sizes: Sizes, device: str = "cuda") -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function, args = self.make(sizes, device)
        return (function.train(self.train) if isinstance(function, nn.Module) else function), args


class DropoutNorm(nn.Module):
    """`norm(dropout(x) + residual)`, with the sum as a second result if `returns_sum`."""

    def __init__(self, norm: nn.Module, p: float, returns_sum: bool) -> None:
        super().__init__()
        self.norm, self.dropout, self.returns_sum = norm, nn.Dropout(p), returns_sum

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        total = self.dropout(x) + residual
        return (self.norm(total), total) if self.returns_sum else self.norm(total)


def _tensor(*shape: int, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad)


def _on(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """With new parameters: those that it has may be real, and these may be fake."""
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        fresh = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.05
        setattr(owner, name.rpartition(".")[2], nn.Parameter(fresh))
    return module


def _dropout_norm(
    dtype: torch.dtype = BF16,
    norm: type[nn.Module] = nn.LayerNorm,
    p: float = 0.1,
    returns_sum: bool = False,
    narrow: int = 1,
    train: bool = True,
) -> Case:
    def make(sizes: Sizes, device: str) -> Any:
        dim = sizes.dim // narrow
        module = DropoutNorm(norm(dim, device="meta"), p, returns_sum)
        args = (_tensor(sizes.rows, dim, dtype=dtype, device=device, grad=train) for _ in range(2))
        return _on(module, dtype, device), tuple(args)

    return Case(make, train=train)


def _mlp(dtype: torch.dtype = BF16, p: float = 0.1, train: bool = True, **options: Any) -> Case:
    def make(sizes: Sizes, device: str) -> Any:
        with torch.device("meta"):
            module = feed_forward(sizes.dim, sizes.hidden, nn.GELU(), dropout=p)
        return _on(module, dtype, device), (_tensor(sizes.rows, sizes.dim, dtype=dtype, device=device, grad=train),)

    return Case(make, train=train, options=options)


def _swiglu(dtype: torch.dtype = BF16, train: bool = True) -> Case:
    def make(sizes: Sizes, device: str) -> Any:
        with torch.device("meta"):
            module = llama.SwiGLU(sizes.dim, sizes.gated_hidden)
        return _on(module, dtype, device), (_tensor(sizes.rows, sizes.dim, dtype=dtype, device=device, grad=train),)

    return Case(make, train=train)


def _layer(
    build: Callable[[Sizes], nn.Module], dim: str, dtype: torch.dtype, train: bool = True, mask: bool = False
) -> Case:
    """A layer of a transformer with weights in bfloat16, or under autocast with weights in float32."""

    def make(sizes: Sizes, device: str) -> Any:
        with torch.device("meta"):
            module = build(sizes)
        width = getattr(sizes, dim)
        x = _tensor(sizes.batch, sizes.time, width, dtype=dtype, device=device, grad=train)
        return _on(module, dtype, device), (x, None) if mask else (x,)

    return Case(make, train=train, autocast=BF16 if dtype is FP32 else None)


def _bert(sizes: Sizes) -> nn.Module:
    dim = sizes.encoder_dim
    layer = bert.Layer(bert.BertConfig(dim=dim, hidden=4 * dim, heads=sizes.heads))
    layer.attention.dropout = sizes.attention_dropout
    return layer


def _gpt2(sizes: Sizes) -> nn.Module:
    dim = sizes.encoder_dim
    return PreNormBlock(
        Attention(dim, sizes.heads, causal=True, dropout=sizes.attention_dropout),
        feed_forward(dim, 4 * dim, nn.GELU(approximate="tanh")),
        partial(nn.LayerNorm, dim),
        gpt2.CONFIG.dropout,
    )


def _llama(sizes: Sizes) -> nn.Module:
    config = llama.LlamaConfig(
        dim=sizes.dim, hidden=sizes.gated_hidden, heads=2 * sizes.heads, kv_heads=2 * sizes.heads
    )
    return llama.Block(config)


def _dropout(dtype: torch.dtype = BF16) -> Case:
    def make(sizes: Sizes, device: str) -> Any:
        return nn.Dropout(0.1), (_tensor(sizes.rows, sizes.dim, dtype=dtype, device=device),)

    return Case(make)


def _fake_quantize(fmt: str, dtype: torch.dtype = BF16, rounding: str | None = None) -> Case:
    options = {} if rounding is None else {"rounding": rounding}

    def make(sizes: Sizes, device: str) -> Any:
        def function(x: Tensor) -> Tensor:
            return fuse_pass.fake_quantize(x, fmt, **options)

        return function, (_tensor(sizes.rows, sizes.dim, dtype=dtype, device=device, grad=False),)

    return Case(make, train=False, has_rival=False)


def _bit_linear(dtype: torch.dtype = BF16, train: bool = True, packed: bool = False, rows: int | None = None) -> Case:
    def make(sizes: Sizes, device: str) -> Any:
        module = _on(BitLinear(sizes.dim, sizes.dim, variant="b1.58", device="meta"), dtype, device)
        x = _tensor(rows or sizes.rows, sizes.dim, dtype=dtype, device=device, grad=train)
        return module.pack() if packed else module, (x,)

    return Case(make, train=train, has_rival=False)


RMS = nn.RMSNorm
CASES: dict[str, Case] = {
    "dropout_norm": _dropout_norm(),
    "dropout_norm fp32": _dropout_norm(FP32),
    "dropout_norm rms": _dropout_norm(norm=RMS),
    "dropout_norm rms fp32": _dropout_norm(FP32, norm=RMS),
    "dropout_norm sum": _dropout_norm(returns_sum=True),
    "dropout_norm sum fp32": _dropout_norm(FP32, returns_sum=True),
    "dropout_norm p=0": _dropout_norm(p=0.0),
    "dropout_norm p=0 fp32": _dropout_norm(FP32, p=0.0),
    "dropout_norm inference": _dropout_norm(train=False),
    "dropout_norm narrow": _dropout_norm(narrow=4),
    "mlp": _mlp(),
    "mlp fp32": _mlp(FP32),
    "mlp p=0": _mlp(p=0.0),
    "mlp inference": _mlp(train=False),
    "mlp fastest": _mlp(memory="fastest"),
    "mlp smallest": _mlp(memory="smallest"),
    "swiglu": _swiglu(),
    "swiglu fp32": _swiglu(FP32),
    "swiglu inference": _swiglu(train=False),
    "bert": _layer(_bert, "encoder_dim", BF16, mask=True),
    "bert fp32": replace(_layer(_bert, "encoder_dim", FP32, mask=True), autocast=None),
    "bert autocast": _layer(_bert, "encoder_dim", FP32, mask=True),
    "bert inference": _layer(_bert, "encoder_dim", BF16, train=False, mask=True),
    "gpt2": _layer(_gpt2, "encoder_dim", BF16),
    "gpt2 fp32": replace(_layer(_gpt2, "encoder_dim", FP32), autocast=None),
    "gpt2 autocast": _layer(_gpt2, "encoder_dim", FP32),
    "llama": _layer(_llama, "dim", BF16),
    "llama fp32": replace(_layer(_llama, "dim", FP32), autocast=None),
    "llama autocast": _layer(_llama, "dim", FP32),
    "dropout": _dropout(),
    "e4m3": _fake_quantize("fp8_e4m3"),
    "e4m3 fp32": _fake_quantize("fp8_e4m3", FP32),
    "e4m3 stochastic": _fake_quantize("fp8_e4m3", rounding="stoc_prop"),
    "e4m3 stochastic fp32": _fake_quantize("fp8_e4m3", FP32, "stoc_prop"),
    "int8": _fake_quantize("int8"),
    "int8 fp32": _fake_quantize("int8", FP32),
    "mxfp4": _fake_quantize("mxfp4"),
    "mxfp4 fp32": _fake_quantize("mxfp4", FP32),
    "bit_linear": _bit_linear(),
    "bit_linear fp32": _bit_linear(FP32),
    "bit_linear inference": _bit_linear(train=False),
    "bit_linear packed": _bit_linear(train=False, packed=True),
    "bit_linear packed 1 row": _bit_linear(train=False, packed=True, rows=1),
    "bit_linear packed 4 rows": _bit_linear(train=False, packed=True, rows=4),
    "bit_linear packed 4 rows fp32": _bit_linear(FP32, train=False, packed=True, rows=4),
}
