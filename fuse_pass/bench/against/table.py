"""Every contender, and which of them were asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from fuse_pass.bench.against.bitsandbytes import BITSANDBYTES
from fuse_pass.bench.against.contender import Contender
from fuse_pass.bench.against.onnxruntime import ONNXRUNTIME
from fuse_pass.bench.against.openvino import OPENVINO
from fuse_pass.bench.against.torch_dynamic import TORCH_DYNAMIC
from fuse_pass.bench.against.torchao import TORCHAO
from fuse_pass.bench.against.zentorch import ZENTORCH
from fuse_pass.commands.errors import CommandError

CONTENDERS: tuple[Contender, ...] = (ONNXRUNTIME, OPENVINO, ZENTORCH, TORCHAO, TORCH_DYNAMIC, BITSANDBYTES)


def chosen(names: str, known: Sequence[Contender] = CONTENDERS) -> tuple[Contender, ...]:
    """The contenders that a comma-separated list names, each once.

    Raises:
        CommandError: an unknown name, or a package that is not installed.
    """
    by_name = {contender.name: contender for contender in known}
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise CommandError(
            f"--against: expected names among {','.join(by_name)}, separated by commas; "
            f"got {', '.join(map(repr, unknown))}"
        )
    found = tuple(by_name[name] for name in wanted)
    for contender in found:
        _require(contender)
    return found


def _require(contender: Contender) -> None:
    missing = [module for module in contender.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(
            f"--against {contender.name} needs {', '.join(missing)}, not installed here: "
            f"pip install '{contender.install}'"
        )
