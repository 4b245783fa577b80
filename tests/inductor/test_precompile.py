"""What is noted in a precompiled function decides whether another process may load it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from fuse_pass.inductor import precompile


def refuse(what: str) -> None:
    if what == "old":
        raise RuntimeError("another version")


def test_a_precompiled_function_is_loaded_only_where_it_may_be() -> None:
    noted: set[Any] = set()

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        for what in ("new", "old"):
            precompile.note(refuse, what)
        tracer = torch._dynamo.symbolic_convert.tls.current_tx
        noted.update(tracer.output.package._source_info.inlined_sources)
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(caching_precompile=True):
        torch.compile(lambda x: x.sin(), backend=keep)(torch.ones(2))
    new, old = sorted((stamp for stamp in noted if isinstance(stamp, precompile._Stamp)), key=lambda s: str(s.content))
    for _ in range(2):
        new = pickle.loads(pickle.dumps(new))
    assert torch._dynamo.package._hash_sourcelines(torch, new.firstlineno, new.lastlineno) == new.checksum
    with pytest.raises(RuntimeError, match="another version"):
        pickle.loads(pickle.dumps(old))


def test_without_precompilation_nothing_is_noted() -> None:
    precompile.note(refuse, "old")
    gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    precompile.leave_out(gm)
    assert not hasattr(gm, "_backend_id")
