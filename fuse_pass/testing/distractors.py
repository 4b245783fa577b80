"""What real models do between, around and to the operations of a pattern."""

from __future__ import annotations

from collections.abc import Callable

from fuse_pass.testing.builder import Builder
from fuse_pass.testing.sources import ROWS


def elementwise(b: Builder) -> None:
    v = b.pick()
    b.emit(
        b.one_of(
            f"torch.tanh({v.name})", f"{v.name} * 0.5", f"{v.name} + 1", f"torch.sin({v.name})", f"-{v.name}",
            f"torch.sigmoid({v.name})", f"{v.name}.abs() + 0.1", f"F.softmax({v.name}, -1)", f"F.gelu({v.name})",
        ),
        v.shape, like=v,
    )  # fmt: skip


def combine(b: Builder) -> None:
    v = b.pick()
    w = b.pick(v.width)
    b.emit(b.one_of(f"{v.name} + {w.name}", f"{v.name} * {w.name}", f"torch.sub({v.name}, {w.name})"), v.shape, like=v)


def linear(b: Builder) -> None:
    v = b.pick()
    width = b.random.choice((8, 16, 24))
    b.emit(f"{b.linear(v.width, width)}({v.name})", (*ROWS, width), like=v)


def statistics(b: Builder) -> None:
    v = b.pick()
    b.emit(
        b.one_of(f"{v.name} - {v.name}.mean(-1, keepdim=True)", f"{v.name} * {v.name}.sum(1, keepdim=True)"),
        v.shape, like=v,
    )  # fmt: skip


def view(b: Builder) -> None:
    v = b.pick()
    b.emit(
        b.one_of(
            f"{v.name}.view({v.name}.shape)", f"{v.name}.reshape(-1, {v.width}).view({v.name}.shape)",
            f"{v.name}.unsqueeze(0).squeeze(0)", f"{v.name}.transpose(0, 1).contiguous().transpose(0, 1)",
            f"{v.name}.permute(0, 2, 1).contiguous().permute(0, 2, 1)", f"{v.name}.flip(-1)",
            f"{v.name}[:, :1].expand(-1, {ROWS[1]}, -1)", f"{v.name}[:1].expand({v.name}.shape)", f"{v.name}.clone()",
            f"{v.name}.contiguous()", f"{v.name}.detach()", f"torch.cat([{v.name}[:, 2:], {v.name}[:, :2]], 1)",
        ),
        v.shape, like=v,
    )  # fmt: skip


def mutation(b: Builder) -> None:
    v = b.pick()
    w = b.pick(v.width)
    b.do(
        b.one_of(
            f"{v.name}.add_({w.name}.detach())", f"{v.name} += {w.name}", f"{v.name}.mul_(0.5)",
            f"{v.name}[..., :2] = 0", f"{v.name}[:, 0].zero_()", f"F.relu({v.name}, inplace=True)",
            f"{v.name}.copy_({w.name} * 2)", f"{v.name} *= 1.5", f"{v.name}.view(-1, {v.width}).add_(1)",
        )
    )  # fmt: skip


def cast(b: Builder) -> None:
    v = b.pick()
    if b.chance(0.3):
        b.emit(f"{v.name}.double()", v.shape, base=False)
        return
    b.emit(
        b.one_of(
            f"{v.name}.to(torch.bfloat16).to({v.name}.dtype)", f"{v.name}.double().to({v.name}.dtype)",
            f"{v.name}.to({v.name}.dtype)", f"({v.name}.double() * 0.3).to({v.name}.dtype)",
        ),
        v.shape, like=v,
    )  # fmt: skip


def dropout(b: Builder) -> None:
    v = b.pick()
    b.emit(f"F.dropout({v.name}, {b.one_of('0.2', '0.5')}, self.training)", v.shape, like=v)


def branch(b: Builder) -> None:
    v = b.pick()
    w = b.pick(v.width)
    condition = b.one_of(
        "self.training", f"{v.name}.dim() == 3", f"{v.name}.requires_grad", f"{v.name}.is_contiguous()"
    )
    b.emit(f"{v.name} + 1 if {condition} else {w.name} * 2", v.shape, like=v)


def graph_break(b: Builder) -> None:
    b.do("torch._dynamo.graph_break()")


def checkpointed(b: Builder) -> None:
    v = b.pick()
    module = b.linear(v.width, v.width)
    body = b.one_of(
        f"lambda t: F.gelu({module}(t))",
        f"lambda t: F.layer_norm(F.dropout(t, 0.2, self.training) + t, ({v.width},))",
        f"lambda t: {module}(F.dropout(F.gelu({module}(t)), 0.3, self.training))",
    )
    b.emit(f"checkpoint({body}, {v.name}, use_reentrant=False)", v.shape, like=v)


def norm(b: Builder) -> None:
    v = b.pick()
    b.emit(f"{b.module('norm', f'nn.LayerNorm({v.width})')}({v.name})", v.shape, like=v)


DISTRACTORS: dict[Callable[[Builder], None], float] = {
    elementwise: 4,
    combine: 3,
    linear: 2,
    statistics: 1,
    view: 3,
    mutation: 3,
    cast: 1.5,
    dropout: 1,
    branch: 0.7,
    graph_break: 0.15,
    checkpointed: 0.7,
    norm: 0.7,
}
"""What may be put in, and how often relative to each other."""


def distract(b: Builder) -> None:
    (chosen,) = b.random.choices([*DISTRACTORS], [*DISTRACTORS.values()])
    chosen(b)
