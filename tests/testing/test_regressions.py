"""Programs that the fuzzer once found to be wrong, made small."""

from __future__ import annotations

import pytest

from fuse_pass.testing.compare import Status, check
from fuse_pass.testing.program import Input, Program, Settings, Statement

MEMBERS = {
    "norm": "self.norm = nn.LayerNorm(24)",
    "up": "self.up = nn.Linear(24, 16)",
    "down": "self.down = nn.Linear(16, 24)",
}

# inputs need gradients, statements, outputs, settings, matches
PROGRAMS: dict[str, tuple[bool, tuple[str, ...], str, Settings, int]] = {
    "parameters of a norm that is only read detached have no gradient": (
        True,
        ("z = F.dropout(x0, 0.1)", "y = self.norm(z)", "v = torch.tanh(z)"),
        "v, y.detach()",
        Settings(),
        1,
    ),
    "a sum that is written to after a norm that nobody reads": (
        True,
        ("z = F.dropout(x0 * 1, 0.25)", "y = self.norm(z)", "z.add_(1)", "v = self.up(z)"),
        "v",
        Settings(),
        0,
    ),
    "a sum of frozen values needs no gradient": (
        False,
        ("z = F.dropout(x0, 0.5)", "y = self.norm(z)"),
        "y, z",
        Settings(),
        1,
    ),
    "a checkpoint in an autocast region": (
        True,
        (
            'with torch.autocast("cpu", torch.bfloat16):',
            "    y = checkpoint(lambda t: self.down(F.gelu(self.up(t))), x0, use_reentrant=False)",
        ),
        "y",
        Settings(),
        1,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stays_right(name: str) -> None:
    requires_grad, lines, outputs, settings, matches = PROGRAMS[name]
    program = Program(
        (Input("x0", (3, 5, 24), requires_grad),), (Statement("", lines),), (outputs,), MEMBERS, {}, settings
    )
    verdict = check(program.text())
    assert verdict.status is Status.RIGHT, str(verdict)
    assert verdict.report.counts().total() == matches
