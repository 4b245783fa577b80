"""What Inductor generates for a model on the pretended device: the sources, and why CUDA graphs would be skipped."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._inductor import output_code
from torch._inductor.graph import GraphLowering

from tests.cuda.support import device

Made = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass
class Sources:
    """Python wrappers with the Triton kernels in them; empty where there was no such graph.

    `cudagraph_obstacles` has, with CUDA graphs asked for, what stands against each graph, or one line where a graph was
    given up before.
    """

    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)
    cudagraph_obstacles: list[list[str] | str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        return [*self.forward, *self.backward]


class _CalledError(Exception):
    """Generated code was called: there is nothing to run it on."""


def capture(
    make: Callable[[], Made],
    backend: Any = "inductor",
    *,
    train: bool = True,
    autocast: torch.dtype | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Sources:
    """Compiles what `make` returns, called on fake tensors: a function or module on `cuda`, and its arguments."""
    found = Sources()
    torch._dynamo.reset()
    region = torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext()
    with device.fake_mode(), _kept_in(found):
        function, args = make()
        compiled = torch.compile(function, backend=backend, fullgraph=True, mode=mode, options=options)
        with region, torch.set_grad_enabled(train), contextlib.suppress(_CalledError):
            compiled(*args)
    return found


@contextlib.contextmanager
def _kept_in(found: Sources) -> Iterator[None]:
    def keep(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        (found.backward if graph.is_backward else found.forward).append(code.value)
        graph.cache_key = graph.cache_path = graph.cache_linemap = None
        runner = types.SimpleNamespace(call=_call, recursively_apply_fns=lambda *_: None, partitions=[])
        return types.SimpleNamespace(call=_call, runner=runner, __file__="captured.py")

    def note(example_inputs: Any, graph: Any, *_: Any) -> None:
        found.cudagraph_obstacles.append(graph.cudagraph_info.cudagraph_fail_reasons)

    with (
        mock.patch.object(GraphLowering, "_compile_to_module", keep),
        mock.patch.object(output_code, "cudagraph_post_compile", note),
        mock.patch.object(output_code, "log_cudagraph_skip_and_bump_counter", found.cudagraph_obstacles.append),
    ):
        yield


def _call(args: Any) -> Any:
    raise _CalledError
