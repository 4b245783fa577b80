"""A fusion pass for `torch.compile`: `torch.compile(model, backend=fuse_pass.fuse_backend)`."""

import importlib
from typing import TYPE_CHECKING, Any

import fuse_pass.ops  # noqa: F401 - registers the ops, which saved programs and compiled code call
from fuse_pass import nn
from fuse_pass.inductor.compat import announce_backend
from fuse_pass.nn import BitLinear, FusedDenseGELUDense, FusedDropoutLayerNorm
from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    formats,
)
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization import observers
from fuse_pass.quantization.calibrate import calibrate
from fuse_pass.quantization.comparison import Comparison, compare
from fuse_pass.quantization.convert import convert
from fuse_pass.quantization.functional import FloatPrecisionSimulator, absmax_quantize, fake_quantize
from fuse_pass.quantization.pack import pack, unpack
from fuse_pass.quantization.packing import PackSpec
from fuse_pass.report import Decline, Match, Reason, Report, collect

if TYPE_CHECKING:
    from fuse_pass.analysis import coverage
    from fuse_pass.api import compile
    from fuse_pass.backend import FuseBackend, fuse_backend
    from fuse_pass.export import decompositions, fuse

__version__ = "0.1.0"

__all__ = [
    "BitLinear",
    "BlockFormat",
    "Comparison",
    "Decline",
    "FixedFormat",
    "FloatFormat",
    "FloatPrecisionSimulator",
    "FuseBackend",
    "FusedDenseGELUDense",
    "FusedDropoutLayerNorm",
    "Granularity",
    "IntFormat",
    "Match",
    "PackSpec",
    "QuantSpec",
    "Reason",
    "Report",
    "Site",
    "absmax_quantize",
    "calibrate",
    "collect",
    "compare",
    "compile",
    "convert",
    "coverage",
    "decompositions",
    "fake_quantize",
    "formats",
    "fuse",
    "fuse_backend",
    "nn",
    "observers",
    "pack",
    "unpack",
]

# What compiles needs Dynamo and Inductor, which take twice as long to import as PyTorch and all the rest of ours: it is
# imported when one of these names is asked for.
_LOADED_LATER = {
    "FuseBackend": "fuse_pass.backend",
    "compile": "fuse_pass.api",
    "coverage": "fuse_pass.analysis",
    "decompositions": "fuse_pass.export",
    "fuse": "fuse_pass.export",
    "fuse_backend": "fuse_pass.backend",
}
_MODULES_LOADED_LATER = (
    "analysis",
    "api",
    "backend",
    "calling",
    "export",
    "graph",
    "in_place",
    "joint",
    "options",
    "patterns",
)

for _name in ("fuse_pass", "fuse_pass_backend"):
    announce_backend(_name, "fuse_pass.backend:fuse_backend")


if not TYPE_CHECKING:  # or else any name would be one of this package

    def __getattr__(name: str) -> Any:
        if name in _MODULES_LOADED_LATER:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _LOADED_LATER:
            value = globals()[name] = getattr(importlib.import_module(_LOADED_LATER[name]), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, and not the modules that were imported on the way."""
    return [*__all__, "__version__"]
