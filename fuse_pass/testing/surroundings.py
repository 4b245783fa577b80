"""Patterns that must not be fused because of what surrounds them: a region, a transform, a call that hides them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuse_pass.testing import plants
from fuse_pass.testing.builder import Builder, Value
from fuse_pass.testing.sources import ROWS

_REGIONS = (
    'with torch.autocast("cpu", torch.bfloat16):',
    'with torch.autocast("cpu", torch.bfloat16):',
    'with torch.autocast("cpu", enabled=False):',
    "with torch.no_grad():",
    "with torch.no_grad():",
    "with torch.enable_grad():",
    # Older ones fail to compile it, and no call of PyTorch works in that process afterwards.
    "with torch.inference_mode():" if torch.__version__ >= "2.13" else "with torch.no_grad():",
)


def _steps(b: Builder, x: Value) -> tuple[list[str], tuple[int, ...]]:
    """A pattern in three expressions, each of `t`, the result of the one before; and the shape of the last one."""
    if b.chance(0.5):
        w1, w2 = b.parameter(24, x.width), b.parameter(16, 24)
        form = b.one_of("F.gelu(t)", "torch.relu(t)", "F.silu(t)")
        return [f"F.linear(t, {w1})", form, f"F.linear(t, {w2})"], (*ROWS, 16)
    r, w = b.pick(x.width), b.parameter(x.width)
    dropped = b.one_of("F.dropout(t, 0.25, self.training)", "t * 1")
    normed = b.one_of(f"F.layer_norm(t, ({x.width},), {w})", f"F.rms_norm(t, ({x.width},), {w})")
    return [dropped, f"t + {r.name}", normed], x.shape


def region_inside(b: Builder) -> None:
    """An autocast or grad-mode region begins or ends between the operations of a pattern."""
    x = b.pick()
    steps, shape = _steps(b, x)
    first, end = b.random.choice(((0, 1), (0, 2), (1, 2), (1, 3), (2, 3)))
    region = b.random.choice(_REGIONS)
    cast = ".to(x0.dtype)" if "autocast" in region else ""
    lines = [f"t = {x.name}", *(f"t = {step}" for step in steps[:first]), region]
    lines += [f"    t = ({step}){cast if b.chance(0.5) else ''}" for step in steps[first:end]]
    lines += [f"t = t.clone(){cast}", *(f"t = {step}" for step in steps[end:])]
    b.emit_block(lines, "t.to(x0.dtype)", shape)


def switched_inside(b: Builder) -> None:
    """The grad mode is switched by a call, and later back."""
    x = b.pick()
    steps, shape = _steps(b, x)
    lines = [f"t = {x.name}", f"t = {steps[0]}", "mode = torch.is_grad_enabled()", "torch.set_grad_enabled(not mode)"]
    lines += [f"t = {steps[1]}", "torch.set_grad_enabled(mode)", f"t = {steps[2]}"]
    b.emit_block(lines, "t", shape)


def broadcast(b: Builder) -> None:
    """What is dropped out is smaller than the sum."""
    x = b.pick()
    r = b.pick(x.width)
    part = b.one_of("[:1]", "[:, :1]", "[0]", "[..., :1]", "[0, 0]")
    p = b.one_of("0.25", "0.5", "1.0")
    dropped = f"F.dropout({x.name}{part}, {p}, self.training)"
    other = b.one_of(r.name, r.name, f"{r.name}[:, :1]" if part == "[:1]" else r.name)
    if other != r.name and not b.chance(0.3):
        dropped = f"{x.name}{part}"
    z = b.emit(f"({dropped} + {other}).expand({x.name}.shape)" if other != r.name else f"{dropped} + {other}", x.shape)
    plants.norm(b, z)


def transformed(b: Builder) -> None:
    """By torch.func, row by row or as a derivative."""
    x = b.pick()
    steps, shape = _functions(b, x)
    call = b.one_of("torch.func.vmap({f})({x})", "torch.func.grad(lambda s: ({f})(s).square().sum())({x})")
    b.emit(call.format(f=steps, x=x.name), shape if "vmap" in call else x.shape)


def _functions(b: Builder, x: Value) -> tuple[str, tuple[int, ...]]:
    """One of the patterns without random numbers as a function of its own, and the shape of its result."""
    if b.chance(0.5):
        w1, w2 = b.parameter(24, x.width), b.parameter(16, 24)
        return f"lambda t: F.linear(F.gelu(F.linear(t, {w1})), {w2})", (*ROWS, 16)
    return f"lambda t: F.layer_norm(t + torch.tanh(t), ({x.width},), {b.parameter(x.width)})", x.shape


def in_a_body(b: Builder) -> None:
    """Of a checkpoint that chooses what to keep."""
    x = b.pick()
    function, shape = _functions(b, x)
    b.helpers["keep"] = (
        "def keep():\n    from torch.utils.checkpoint import create_selective_checkpoint_contexts\n"
        "    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])\n"
    )
    b.emit(f"checkpoint({function}, {x.name}, use_reentrant=False, context_fn=keep)", shape)


def hidden_in_a_layer(b: Builder) -> None:
    """PyTorch's fast path runs a whole encoder layer in one call, in eval mode without gradients."""
    x = b.pick()
    options = b.one_of('activation="gelu"', "norm_first=True", 'activation="gelu", norm_first=True', "dropout=0.3")
    layer = b.module("layer", f"nn.TransformerEncoderLayer({x.width}, 4, 24, batch_first=True, {options})")
    b.emit(f"{layer}({x.name})", x.shape, like=x)


def jagged(b: Builder) -> None:
    """A nested tensor of rows."""
    x = b.pick()
    w1, w2 = b.parameter(24, x.width), b.parameter(16, 24)
    lines = [
        f"offsets = torch.arange(0, {x.name}.shape[0] * {ROWS[1]} + 1, {ROWS[1]})",
        f"t = torch.nested.nested_tensor_from_jagged({x.name}.reshape(-1, {x.width}), offsets)",
        f"t = F.linear(F.gelu(F.linear(t, {w1})), {w2}).values()",
    ]
    b.emit_block(lines, f"t.view(-1, {ROWS[1]}, 16)", (*ROWS, 16))


def on_another_device(b: Builder) -> None:
    """The norm runs on the meta device; its shape is all that it gives."""
    x = b.pick()
    r = b.pick(x.width)
    moved = f'({x.name} + {r.name}).to("meta")'
    b.emit(f'{x.name} + torch.ones_like(F.layer_norm({moved}, ({x.width},)), device="cpu")', x.shape)


def quantized_inside(b: Builder) -> None:
    """The sum is rounded to a format that the fused norm cannot round to."""
    x = b.pick()
    r = b.pick(x.width)
    b.helpers["fake_quantize"] = "from fuse_pass import fake_quantize\n"
    form = b.one_of('"int8"', '"mxfp8_e4m3"', '"fp8_e4m3", clip_grad=True')
    z = b.emit(f"fake_quantize({x.name} + {r.name}, {form})", x.shape, like=x)
    b.emit(f"F.layer_norm({z.name}, ({z.width},), {b.parameter(z.width)})", z.shape, like=z)


def two_norms_of_one_sum(b: Builder) -> None:
    x = b.pick()
    r = b.pick(x.width)
    z = plants.add(b, plants.dropout(b, x) if b.chance(0.5) else x, r)
    first, second = plants.norm(b, z), plants.norm(b, z)
    b.emit(f"{first.name} * {second.name}", z.shape, like=z)


def parameter_from_the_sum(b: Builder) -> None:
    """A norm whose scale or shift is computed from what it norms, so that all cannot happen at once."""
    x = b.pick()
    r, w = b.pick(x.width), b.parameter(x.width)
    z = plants.add(b, plants.dropout(b, x) if b.chance(0.5) else x, r)
    form = b.one_of("{w} + {z}.mean()", "{w} * torch.tanh({z}[0, 0])", "torch.sin({w}) + {z}[0, 0]")
    scale = b.emit(form.format(w=w, z=z.name), (z.width,))
    b.values.remove(scale)
    b.emit(f"F.layer_norm({z.name}, ({z.width},), {scale.name}, {w})", z.shape, like=z)


def columns_normed(b: Builder) -> None:
    """A norm over a dimension whose elements do not lie side by side."""
    x = b.pick()
    r = b.pick(x.width)
    z = plants.add(b, x, r)
    v, w = z.name, f"{b.parameter(ROWS[1])}[:, None]"
    mean = f"{v}.mean(1, keepdim=True)"
    b.emit(
        b.one_of(
            f"{v} * torch.rsqrt({v}.pow(2).mean(1, keepdim=True) + 1e-5) * {w}",
            f"({v} - {mean}) / torch.sqrt({v}.var(1, unbiased=False, keepdim=True) + 1e-5) * {w}",
        ),
        z.shape, like=z,
    )  # fmt: skip


def for_eager_s_random_numbers(b: Builder) -> None:
    """The user asked for eager's random numbers, which a fused dropout does not draw."""
    b.fallback_random = True
    (plants.dropout_norm if b.chance(0.5) else plants.block)(b)


SURROUNDINGS: tuple[Callable[[Builder], None], ...] = (
    region_inside,
    region_inside,
    switched_inside,
    broadcast,
    transformed,
    in_a_body,
    hidden_in_a_layer,
    jagged,
    on_another_device,
    quantized_inside,
    two_norms_of_one_sum,
    parameter_from_the_sum,
    columns_normed,
    for_eager_s_random_numbers,
)
