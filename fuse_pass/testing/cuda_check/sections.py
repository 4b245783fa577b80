"""The sections of the check: each yields rows, the cheapest and most telling first."""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass.backend import FuseBackend
from fuse_pass.nn import BitLinear, Int8Linear
from fuse_pass.numerics import random_bits
from fuse_pass.patterns import PATTERNS
from fuse_pass.testing.cuda_check.timing import copy_bandwidth, milliseconds, peak_mebibytes

Row = dict[str, Any]
# Of the spellings, which all become the same few ops: compiling each takes seconds.
_EVERY = 6


@dataclass(frozen=True)
class Scale:
    """Where and how large: the sizes of models, or so small that the check itself can be tried on a CPU."""

    device: torch.device
    norms: tuple[tuple[int, int], ...] = ((8192, 4096), (8192, 1024), (512, 768))
    mlp: tuple[int, int, int] = (8192, 4096, 16384)
    encoder: tuple[int, int, int] = (16, 512, 1024)
    bits: tuple[int, int] = (1031, 517)
    copied: int = 1 << 27
    # On a CPU, stock's own compilation is compared alone: its other modes are for GPUs.
    modes: tuple[str, ...] = ("max-autotune-no-cudagraphs", "reduce-overhead")

    @classmethod
    def small(cls, device: torch.device) -> Scale:
        return cls(device, ((16, 32),), (16, 32, 64), (2, 8, 32), (7, 13), 1 << 10, ())

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype, requires_grad=grad)


def versions(scale: Scale) -> Iterator[Row]:
    """What ran, on what."""
    row = {"python": platform.python_version(), "torch": torch.__version__, "fuse_pass": fuse_pass.__version__}
    if scale.device.type == "cuda":
        import triton

        row |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
        row |= {"device": torch.cuda.get_device_name(), "capability": str(torch.cuda.get_device_capability())}
    yield {"case": "versions", **row, "ok": True}


def results(scale: Scale) -> Iterator[Row]:
    """Some spellings of every pattern: found, and results and gradients no further from float64 than eager's."""
    for pattern in PATTERNS:
        for name, function in list(pattern.corpus.spellings.items())[::_EVERY]:
            inputs = pattern.corpus.example_inputs()
            yield {"case": f"{pattern.name}: {name}", **_compared(function, inputs, scale.device)}


def _compared(function: Callable[..., Tensor], inputs: Mapping[str, Any], device: torch.device) -> Row:
    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        args = [_leaf(value, device, dtype) for value in inputs.values()]
        torch.manual_seed(0)
        y = call(*args)
        wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.sum(), wanted, materialize_grads=True)]

    torch.compiler.reset()
    compiled = torch.compile(function, backend=FuseBackend(strict=True))
    with fuse_pass.collect() as report:
        ours = run(compiled, torch.float32)
    eager, exact = run(function, torch.float32), run(function, torch.float64)
    draws = any("dropout" in match.variant and "dropout 0.0" not in match.variant for match in report.matches)
    errors = [_error(y, true) for y, true in zip(ours, exact, strict=True)]
    of_eager = [_error(y, true) for y, true in zip(eager, exact, strict=True)]
    # With a mask the two drop different elements: what is left to see is that everything is finite.
    is_right = all(bool(y.isfinite().all()) for y in ours) if draws else max(errors) <= 4 * max(of_eager) + 1e-5
    return {
        "found": dict(report.counts()),
        "error": max(errors),
        "eager": max(of_eager),
        "draws": draws,
        "ok": is_right,
    }


def _leaf(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(device, dtype).requires_grad_(value.requires_grad)


def _error(y: Tensor, exact: Tensor) -> float:
    largest = exact.detach().abs().max().clamp(min=1e-30)
    return float((y.detach().double() - exact.detach()).abs().max() / largest)


def bits(scale: Scale) -> Iterator[Row]:
    """Masks and fake-quantised numbers have the bits of the CPU, compiled too."""
    rows, columns = scale.bits
    keep = torch.compile(random_bits.keep_mask, backend=FuseBackend())
    for seed in (0, 1, -1, 2**62 + 12345):
        number = torch.tensor(seed)
        mine = keep(number.to(scale.device), rows, columns, 0.1).cpu()
        yield {
            "case": f"mask of seed {seed}",
            "ok": bool((mine == random_bits.keep_mask(number, rows, columns, 0.1)).all()),
        }
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.logspace(-6, 6, columns)
    for fmt in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int4", "mxfp4", "mxfp8_e4m3"):
        rounded = torch.compile(functools.partial(fuse_pass.fake_quantize, fmt=fmt), backend=FuseBackend())
        mine, expected = rounded(x.to(scale.device)).cpu(), fuse_pass.fake_quantize(x, fmt)
        same = (mine == expected) | (mine.isnan() & expected.isnan())
        yield {"case": f"fake_quantize {fmt}", "differing": int((~same).sum()), "ok": bool(same.all())}


def norms(scale: Scale) -> Iterator[Row]:
    """Dropout, residual and norm: a training step against stock's, and its share of the bandwidth of a copy."""
    bandwidth = copy_bandwidth(scale.device, scale.copied)
    for rows, dim in scale.norms:
        for dtype in (torch.bfloat16, torch.float32):
            for norm in (nn.LayerNorm, nn.RMSNorm):
                layer = _DropoutNorm(norm(dim, device=scale.device, dtype=dtype))
                args = [scale.randn(rows, dim, dtype=dtype, grad=True) for _ in range(2)]
                times = _step_times(scale, layer, args)
                # Forward reads two and writes two, backward reads two and writes two.
                least = 1e3 * 8 * args[0].nbytes / bandwidth
                name = f"dropout_norm {norm.__name__} {rows}x{dim} {dtype}"
                yield {"case": name, "ms": times, "by_copy_ms": least, **_verdict(times)}


class _DropoutNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        return self.norm(F.dropout(x, 0.1) + residual)


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False, **options) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False, **options)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def blocks(scale: Scale) -> Iterator[Row]:
    """Feed-forward blocks with every setting of `memory`: time and peak memory of a training step."""
    rows, dim, hidden = scale.mlp
    options: dict[str, Any] = {"device": scale.device, "dtype": torch.bfloat16}
    mlp = nn.Sequential(nn.Linear(dim, hidden, **options), nn.GELU(), nn.Linear(hidden, dim, **options))
    for name, block in (("mlp", mlp), ("swiglu", _SwiGLU(dim, hidden, **options))):
        args = [scale.randn(rows, dim, dtype=torch.bfloat16, grad=True)]
        for memory in ("fastest", "balanced", "smallest"):
            times = _step_times(scale, block, args, memory=memory)
            peak = {
                who: peak_mebibytes(functools.partial(_step, compiled, args), scale.device)
                for who, compiled in _contenders(scale, block, memory=memory).items()
            }
            yield {"case": f"{name} {memory}", "ms": times, "peak_mib": peak, **_verdict(times)}


def layers(scale: Scale) -> Iterator[Row]:
    """A layer of BERT-large under autocast, then ten steps of training it: the loss falls as eager's does."""
    batch, steps, dim = scale.encoder
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.TransformerEncoderLayer(dim, dim // 16, 4 * dim, 0.1, "gelu", batch_first=True, device=scale.device)
        x = scale.randn(batch, steps, dim)
        with torch.autocast(scale.device.type, dtype):
            times = _step_times(scale, layer, [x.clone().requires_grad_()])
        losses = {}
        for who, backend in (("eager", "eager"), ("ours", FuseBackend(strict=True))):
            losses[who] = _losses(copy.deepcopy(layer), backend, x, dtype)
        falls = losses["ours"][-1] < losses["ours"][0]
        close = abs(losses["ours"][-1] - losses["eager"][-1]) < 0.1 * abs(losses["eager"][0])
        verdict = _verdict(times)
        yield (
            {"case": f"encoder layer autocast {dtype}", "ms": times, "losses": losses}
            | verdict
            | {"ok": verdict["ok"] and falls and close}
        )


def _losses(layer: nn.Module, backend: Any, x: Tensor, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    torch.compiler.reset()
    target, compiled = torch.randn_like(x), torch.compile(layer, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype is torch.float16 and x.device.type == "cuda")
    found = []
    for _ in range(10):
        with torch.autocast(x.device.type, dtype):
            loss = F.mse_loss(compiled(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def low_precision(scale: Scale) -> Iterator[Row]:
    """Layers on integers: the same result as on a CPU, and the time against a Linear in bfloat16."""
    rows, dim, _ = scale.mlp
    makers: dict[str, Callable[[], nn.Module]] = {
        "BitLinear b1.58": lambda: BitLinear(dim, dim, variant="b1.58"),
        "BitLinear b1.58 packed": lambda: BitLinear(dim, dim, variant="b1.58").pack(),
        "Int8Linear": lambda: Int8Linear(dim, dim),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        layer = make()
        few = torch.randn(8, dim)
        expected = layer(few)
        layer = layer.to(scale.device)
        error = _error(
            torch.compile(layer, backend=FuseBackend(strict=True))(few.to(scale.device)).cpu(), expected.double()
        )
        timed = layer if isinstance(layer, Int8Linear) else layer.to(torch.bfloat16)
        plain = nn.Linear(dim, dim, device=scale.device, dtype=torch.bfloat16)
        for count in (rows, 1):
            x = scale.randn(count, dim, dtype=torch.bfloat16)
            with torch.no_grad():
                ours, stock = torch.compile(timed, backend=FuseBackend(strict=True)), torch.compile(plain)
                contenders = {"ours": functools.partial(ours, x), "bfloat16": functools.partial(stock, x)}
                times = milliseconds(contenders, scale.device)
            yield {"case": f"{name}, {count} rows", "ms": times, "error": error, "ok": error < 1e-5}


def _contenders(scale: Scale, model: nn.Module, **options: Any) -> dict[str, Callable[..., Any]]:
    torch.compiler.reset()
    found: dict[str, Callable[..., Any]] = {
        "ours": torch.compile(model, backend=FuseBackend(strict=True, **options)),
        "stock": torch.compile(model),
    }
    for mode in scale.modes:
        found[f"ours {mode}"] = torch.compile(model, backend=FuseBackend(strict=True, **options), mode=mode)
        found[f"stock {mode}"] = torch.compile(model, mode=mode)
    return found


def _step(model: Callable[..., Any], args: list[Tensor]) -> None:
    if torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()
    model(*args).sum().backward()
    for arg in args:
        arg.grad = None


def _step_times(scale: Scale, model: nn.Module, args: list[Tensor], **options: Any) -> dict[str, float]:
    contenders = _contenders(scale, model.train(), **options)
    steps = {name: functools.partial(_step, compiled, args) for name, compiled in contenders.items()}
    return milliseconds(steps, scale.device)


def _verdict(times: Mapping[str, float]) -> Row:
    """Ours is to be no slower than 0.97 of the best of stock's."""
    ours = min(took for name, took in times.items() if name.startswith("ours"))
    stock = min(took for name, took in times.items() if name.startswith("stock"))
    return {"stock_by_ours": stock / ours, "ok": stock / ours >= 0.97}


SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "versions": versions,
    "results": results,
    "bits": bits,
    "norms": norms,
    "blocks": blocks,
    "layers": layers,
    "low_precision": low_precision,
}
