"""What looks like a pattern and is not: one wrong constant, reader, dimension or operand."""

from __future__ import annotations

from collections.abc import Callable

from fuse_pass.testing import plants
from fuse_pass.testing.builder import Builder, Value

ALMOST_ACTIVATIONS = (
    "0.5 * {h} * (1 + torch.tanh(0.7978845608028654 * ({h} + 0.044716 * {h} ** 3)))",
    "0.5 * {h} * (1 + torch.tanh(0.79788 * ({h} + 0.044715 * {h} ** 2)))",
    "0.5 * {h} * (1 + torch.erf(0.7978845608028654 * ({h} + 0.044715 * {h} ** 3)))",
    "0.5 * {h} * (1 + torch.tanh({h} / 1.4142135623730951))",
    "0.5 * {h} * (1 + torch.erf({h} / 1.41))",
    "0.5 * {h} * (1 - torch.erf({h} / 1.4142135623730951))",
    "0.51 * {h} * (1 + torch.erf({h} / 1.4142135623730951))",
    "{h} * torch.sigmoid(1.7 * {h})",
    "{h} * torch.sigmoid(-{h})",
    "{h} * torch.sigmoid({h} + 0.01)",
    "{h} * torch.tanh(F.softplus({h}, beta=2))",
    "F.gelu({h}) * 2",
    "F.gelu({h} * 1.01)",
    "F.gelu({h}) + {h} * 1e-3",
    "F.softmax({h}, -1)",
    "F.relu({h}) - 0.01",
    "F.relu({h}).flip(-1)",
    "F.gelu({h}.flip(1))",
    "F.gelu({h}).transpose(0, 1).reshape({h}.shape)",
    "F.gelu({h}).detach()",
    "F.gelu({h}).to(torch.bfloat16).to(x0.dtype)",
    "F.gelu(F.dropout({h}, 0.25, self.training))",
    "F.layer_norm(F.gelu({h}), ({h}.shape[-1],))",
)


def almost_an_activation(b: Builder) -> None:
    plants.dense_act_dense(b, forms=ALMOST_ACTIVATIONS)


def interior_read_again(b: Builder) -> None:
    """By another operation, an output, or a write."""
    v = b.pick()
    h = plants.linear(b, v, 24)
    a = plants.activation(b, h, plants.EXACT_GELUS + plants.OTHER_ACTIVATIONS)
    y = plants.linear(b, a, 16)
    seen = b.random.choice((h, a))
    how = b.one_of(
        f"{seen.name} * 2", f"torch.tanh({seen.name})", f"{seen.name}.mul_(0.5)", f"{seen.name}.view(-1, 24)"
    )
    other = b.emit(f"({how}).sum()", ())
    b.values.remove(other)
    b.emit(f"{y.name} + {other.name}", y.shape, like=y)


def reused_module(b: Builder) -> None:
    v = b.pick()
    module = b.linear(v.width, v.width)
    form = b.random.choice(plants.EXACT_GELUS[:1] + plants.OTHER_ACTIVATIONS)
    h = b.emit(f"{module}({v.name})", v.shape, like=v)
    a = plants.activation(b, h, (form,))
    b.emit(f"{module}({a.name})", v.shape, like=v)


def written_between(b: Builder) -> None:
    """A weight or an interior value is written to in the middle."""
    v = b.pick()
    w = b.parameter(24, v.width)
    h = b.emit(f"F.linear({v.name}, {w} * 1)", (*v.shape[:-1], 24))
    b.do(b.one_of(f"{h.name}.add_(1)", f"{h.name}[:, 0] = 0", f"{v.name}.mul_(0.5)", f"{h.name}.view(-1)[:2].zero_()"))
    a = plants.activation(b, h, plants.EXACT_GELUS)
    b.do(b.one_of(f"{a.name}.mul_(2)", f"{a.name} += 1", f"{h.name}.zero_()", f"{v.name}.add_(1)"))
    plants.linear(b, a, 16)


def gated(b: Builder) -> None:
    v = b.pick()
    gate, up = plants.linear(b, v, 24), plants.linear(b, v, 24)
    a = plants.activation(b, gate, plants.EXACT_GELUS + plants.OTHER_ACTIVATIONS)
    product = b.emit(b.one_of(f"{a.name} * {up.name}", f"{a.name} + {up.name}", f"{a.name} * {a.name}"), up.shape)
    plants.linear(b, product, 16)


def mixed_dtypes(b: Builder) -> None:
    """A cast between the operations, or another dtype for one of them."""
    v = b.pick()
    w = b.parameter(24, v.width)
    h = b.emit(f"F.linear({v.name}.double(), {w}.double())", (*v.shape[:-1], 24), base=False)
    a = b.emit(f"F.gelu({h.name})", h.shape, base=False)
    w2 = b.parameter(16, 24)
    b.emit(
        b.one_of(f"F.linear({a.name}.to(x0.dtype), {w2})", f"F.linear({a.name}, {w2}.double()).to(x0.dtype)"),
        (*v.shape[:-1], 16),
    )


def _residuals(b: Builder) -> tuple[Value, Value]:
    x = b.pick()
    return x, b.pick(x.width)


def almost_a_sum(b: Builder) -> None:
    x, r = _residuals(b)
    d = f"F.dropout({x.name}, 0.25, self.training)"
    z = b.emit(
        b.one_of(
            f"torch.add({d}, {r.name}, alpha=2)", f"torch.add({r.name}, {d}, alpha=0.5)", f"{d} - {r.name}",
            f"{r.name} - {d}", f"{d} * {r.name}", f"{d} + {r.name} + {r.name}", f"{d} + 2 * {r.name}", f"{d} + 1",
            f"{x.name} + F.dropout({r.name}, 0.25, self.training)", f"{d} + {x.name}", f"{d} + {r.name}[:1]",
            f"{d} + F.dropout({r.name}, 0.5, self.training)", f"F.dropout({x.name} + {r.name}, 0.25, self.training)",
            f"F.dropout({d}, 0.5, self.training) + {r.name}", f"{d}[:, :1] + {r.name}", f"{d}.flip(0) + {r.name}",
            f"{d}.transpose(0, 1).transpose(0, 1) + {r.name}", f"torch.sub({d}, {r.name}, alpha=-1)",
            f"{d} + {r.name}.detach()", f"{d} + {r.name}.double()",
        ),
        x.shape, base=False,
    )  # fmt: skip
    b.distract()
    plants.norm(b, b.emit(f"{z.name}.to(x0.dtype)", z.shape))


def almost_a_norm(b: Builder) -> None:
    x, r = _residuals(b)
    z = b.emit(f"F.dropout({x.name}, 0.25, self.training) + {r.name}", x.shape)
    v, n, w = z.name, z.width, b.parameter(x.width)
    mean, eps = f"{v}.mean(-1, keepdim=True)", f"torch.tensor(1e-5, dtype={v}.dtype)"
    b.emit(
        b.one_of(
            f"({v} - {mean}) / torch.sqrt({v}.var(-1, keepdim=True) + 1e-5) * {w}",
            f"({v} - {mean}) / ({v}.var(-1, unbiased=False, keepdim=True).sqrt() + 1e-5) * {w}",
            f"({v} - {mean}) / torch.sqrt({v}.var(-1, unbiased=False, keepdim=True) + {eps}) * {w}",
            f"({v} - {mean}) * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + 1e-5) * {w}",
            f"({v} + {mean}) / torch.sqrt({v}.var(-1, unbiased=False, keepdim=True) + 1e-5) * {w}",
            f"({v} - {v}.mean(1, keepdim=True)) / torch.sqrt({v}.var(-1, unbiased=False, keepdim=True) + 1e-5) * {w}",
            f"{v} * torch.rsqrt({v}.pow(2).mean(1, keepdim=True) + 1e-5) * {w}",
            f"{v} * torch.rsqrt({v}.pow(2).sum(-1, keepdim=True) + 1e-5) * {w}",
            f"{v} * torch.rsqrt({v}.abs().mean(-1, keepdim=True) + 1e-5) * {w}",
            f"{v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + {eps}) * {w}",
            f"{v} * torch.sqrt({v}.pow(2).mean(-1, keepdim=True) + 1e-5) * {w}",
            f"{v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + 0.1 * {v}.detach().abs()) * {w}",
            f"{v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + 1e-5) * {w} * {v}",
            f"F.layer_norm({v}.transpose(0, 1), ({n},), {w}).transpose(0, 1)",
            f"F.layer_norm({v}.transpose(1, 2), ({v}.shape[1],)).transpose(1, 2)",
            f"F.layer_norm({v}, ({n},), {v}[0, 0], {w})",
            f"F.layer_norm({v}, ({n},), {w} + {v}.sum(), {w})",
            f"F.layer_norm({v}.view(-1, 4, {n} // 4), ({n} // 4,)).view({v}.shape)",
            f"F.layer_norm({v} * 2, ({n},), {w}, None, 1e-2)",
            f"F.layer_norm({v}.abs(), ({n},), {w})",
            f"F.group_norm({v}.reshape(-1, {n}), 4, {w}).view({v}.shape)",
            f"F.batch_norm({v}.reshape(-1, {n}), None, None, {w}, training=True).view({v}.shape)",
            f"F.instance_norm({v})",
            f"F.normalize({v}, dim=-1)",
        ),
        z.shape, like=z,
    )  # fmt: skip


def written_before_the_norm(b: Builder) -> None:
    """The sum, its dropout or its residual changes in place before or after the norm reads it."""
    x, r = _residuals(b)
    d = b.emit(f"F.dropout({x.name} * 1, 0.25, self.training)", x.shape)
    if b.chance(0.5):
        b.do(b.one_of(f"{d.name}.mul_(2)", f"{r.name}.add_(1)", f"{d.name} += 1"))
    z = plants.add(b, d, r)
    if b.chance(0.7):
        b.do(b.one_of(f"{z.name}.mul_(2)", f"{r.name}.add_(1)", f"{z.name}[:, 0] = 0", f"{d.name}.zero_()"))
    plants.norm(b, z)
    if b.chance(0.5):
        b.do(f"{z.name}.add_(1)")


NEAR_MISSES: tuple[Callable[[Builder], None], ...] = (
    almost_an_activation,
    almost_an_activation,
    interior_read_again,
    reused_module,
    written_between,
    gated,
    mixed_dtypes,
    almost_a_sum,
    almost_a_sum,
    almost_a_norm,
    almost_a_norm,
    written_before_the_norm,
)
