"""Patterns written step by step, with distractors between the steps; and a spelling of any pattern as one step."""

from __future__ import annotations

from fuse_pass.testing.builder import Builder, Value
from fuse_pass.testing.sources import ROWS, Spelling, spellings

EXACT_GELUS = (
    "F.gelu({h})",
    "{gelu}({h})",
    "{h} * 0.5 * (1.0 + torch.erf({h} / 1.4142135623730951))",
    "0.5 * {h} * (1.0 + torch.erf({h} * 0.7071067811865476))",
)
TANH_GELUS = (
    'F.gelu({h}, approximate="tanh")',
    "0.5 * {h} * (1 + torch.tanh(0.7978845608028654 * ({h} + 0.044715 * {h} ** 3)))",
    "0.5 * {h} * (1.0 + torch.tanh(0.7978845608028654 * {h} * (1 + 0.044715 * {h} * {h})))",
)
OTHER_ACTIVATIONS = (
    "F.relu({h})",
    "F.relu({h}, inplace=True)",
    "{h}.relu_()",
    "torch.relu({h})",
    "F.silu({h})",
    "{h} * torch.sigmoid({h})",
    "{h} * torch.sigmoid(1.702 * {h})",
    "F.leaky_relu({h}, 0.2)",
    "F.elu({h}, 0.7)",
    "F.selu({h})",
    "F.mish({h})",
    "{h} * torch.tanh(F.softplus({h}))",
    "F.relu({h}) ** 2",
    "F.hardswish({h})",
    "torch.tanh({h})",
    "{scale} * F.relu({h}) ** 2 + {shift}",
)


def linear(b: Builder, v: Value, width: int) -> Value:
    """A Linear in one of its spellings."""
    w, bias = (b.parameter(width, v.width), b.parameter(width)) if b.chance(0.6) else ("", "")
    if not w:
        return b.emit(f"{b.linear(v.width, width)}({v.name})", (*v.shape[:-1], width), like=v)
    x = v.name
    expression = b.one_of(
        f"F.linear({x}, {w}, {bias})",
        f"F.linear({x}, {w})",
        f"{x} @ {w}.T + {bias}",
        f"{bias} + torch.matmul({x}, {w}.t())",
        f"torch.addmm({bias}, {x}.reshape(-1, {v.width}), {w}.t()).view(*{x}.shape[:-1], {width})",
        f'torch.einsum("bti,oi->bto", {x}, {w})',
        f"F.conv1d({x}.transpose(1, 2), {w}.unsqueeze(-1), {bias}).transpose(1, 2)",
        f"F.linear({x}, {w} * 1.5, {bias})",
        *([f"{x} @ {w}"] if width == v.width else []),
    )
    return b.emit(expression, (*v.shape[:-1], width), like=v)


def activation(b: Builder, h: Value, forms: tuple[str, ...]) -> Value:
    form = b.random.choice(forms)
    gelu = b.module("gelu", "nn.GELU()") if "{gelu}" in form else ""
    scale, shift = (b.parameter(1), b.parameter(1)) if "{scale}" in form else ("", "")
    return b.emit(form.format(h=h.name, gelu=gelu, scale=scale, shift=shift), h.shape, like=h)


def dropout(b: Builder, v: Value) -> Value:
    p = b.one_of("0.1", "0.25", "0.5", "0.0", "1.0") if b.chance(0.2) else b.one_of("0.1", "0.25", "0.5")
    expression = b.one_of(
        f"F.dropout({v.name}, {p}, self.training)",
        f"F.dropout({v.name}, p={p}, training=self.training)",
        f"F.dropout({v.name}, {p}, self.training, inplace=True)",
        f"F.dropout({v.name}, {p})",
        f"torch.dropout({v.name}, {p}, self.training)",
        "module",
    )
    if expression == "module":
        expression = f"{b.module('dropout', f'nn.Dropout({p})')}({v.name})"
    return b.emit(expression, v.shape, like=v)


def dense_act_dense(b: Builder, *, forms: tuple[str, ...] | None = None) -> Value:
    v = b.pick()
    h = linear(b, v, b.random.choice((16, 24)))
    b.distract()
    a = activation(b, h, forms or b.random.choice((EXACT_GELUS, TANH_GELUS, OTHER_ACTIVATIONS)))
    b.distract()
    if b.chance(0.5):
        a = dropout(b, a)
        b.distract()
    return linear(b, a, b.random.choice((8, 16, 24)))


def add(b: Builder, x: Value, r: Value) -> Value:
    expression = b.one_of(
        f"{x.name} + {r.name}", f"{r.name} + {x.name}", f"torch.add({x.name}, {r.name})", f"{r.name}.add({x.name})"
    )
    return b.emit(expression, x.shape, like=x)


def norm(b: Builder, z: Value) -> Value:
    """LayerNorm or RMSNorm in one of their spellings."""
    n, eps = z.width, b.one_of("1e-12", "1e-6", "1e-5", "1e-3")
    w, bias, v = b.parameter(n), b.parameter(n), z.name
    expression = b.one_of(
        f"{b.module('norm', f'nn.LayerNorm({n}, eps={eps})')}({v})",
        f"{b.module('norm', f'nn.RMSNorm({n}, eps={eps})')}({v})",
        f"F.layer_norm({v}, ({n},), {w}, {bias}, {eps})",
        f"F.layer_norm({v}, ({n},), {w}, None, {eps})",
        f"F.layer_norm({v}, ({n},), eps={eps})",
        f"F.layer_norm({v}, {v}.shape[1:])",
        f"torch.layer_norm({v}, ({n},), {w}, {bias}, {eps})",
        f"F.rms_norm({v}, ({n},), {w}, {eps})",
        f"F.rms_norm({v}, ({n},))",
        f"{v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + {eps}) * {w}",
        f"{w} * ({v} * torch.rsqrt(({v} * {v}).mean(-1, keepdim=True) + {eps}))",
        f"({v} - {v}.mean(-1, keepdim=True)) / torch.sqrt({v}.var(-1, unbiased=False, keepdim=True) + {eps}) * {w}",
        f"F.layer_norm({v}.double(), ({n},)).to(x0.dtype)",
    )
    return b.emit(expression, z.shape, like=z)


def dropout_norm(b: Builder) -> Value:
    z = b.pick()
    r = b.pick(z.width)
    if b.chance(0.75):
        z = dropout(b, z)
        b.distract()
    if b.chance(0.8):
        if b.chance(0.12):
            b.do(f"{z.name} += {r.name}")
        else:
            z = add(b, z, r)
        b.distract()
    y = norm(b, z)
    if b.chance(0.3):  # the residual stream of a pre-norm block
        b.distract()
        return b.emit(f"{z.name} + torch.tanh({y.name})", y.shape, like=y)
    return y


def spelled(b: Builder) -> Value:
    """One of the patterns' own spellings, as a function of its own."""
    return plant(b, b.random.choice(spellings()))


def plant(b: Builder, spelling: Spelling) -> Value:
    """Calls a spelling, plainly or in a checkpoint."""
    name = b.name("spelled")
    b.helpers[name] = f"def make_{name}():\n{spelling.factory}\n\n\n{name} = make_{name}()\n"
    arguments = []
    for argument in spelling.arguments:
        if argument in spelling.values:
            shape = spelling.values[argument]
            arguments.append(b.fit(b.pick(shape[-1] if b.chance(0.7) else None), shape).name)
        elif argument in spelling.parameters:
            arguments.append(b.parameter(*spelling.parameters[argument]))
        else:
            arguments.append("None")
    call = f"{name}({', '.join(arguments)})"
    if b.chance(0.12):
        call = f"checkpoint({name}, {', '.join(arguments)}, use_reentrant=False)"
    base = [dtype.itemsize == 4 for dtype in spelling.dtypes]
    if not spelling.several:
        return b.emit(call, spelling.results[0], base=base[0])
    whole = b.emit(call, (), base=False)
    b.values.remove(whole)
    parts = [b.emit(f"{whole.name}[{i}]", shape, base=base[i]) for i, shape in enumerate(spelling.results)]
    return parts[-1]


def block(b: Builder) -> Value:
    """A transformer's feed-forward half: both patterns, one behind the other."""
    v = b.pick()
    normed = norm(b, v) if b.chance(0.5) else v
    h = linear(b, normed, 24)
    a = activation(b, h, EXACT_GELUS + TANH_GELUS + OTHER_ACTIVATIONS)
    y = linear(b, dropout(b, a) if b.chance(0.5) else a, v.width)
    z = add(b, dropout(b, y), v)
    b.distract()
    return norm(b, z)


assert len(ROWS) == 2, "the einsum above is written for three dimensions"
