"""A fusion pass for `torch.compile`: `torch.compile(model, backend=fuse_pass.fuse_backend)`."""

from fuse_pass import nn
from fuse_pass.analysis import coverage
from fuse_pass.api import compile
from fuse_pass.backend import FuseBackend, fuse_backend
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
from fuse_pass.quantization.convert import convert
from fuse_pass.quantization.functional import FloatPrecisionSimulator, absmax_quantize, fake_quantize
from fuse_pass.report import Decline, Match, Reason, Report, collect

__version__ = "0.1.0"

__all__ = [
    "BitLinear",
    "BlockFormat",
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
    "QuantSpec",
    "Reason",
    "Report",
    "Site",
    "absmax_quantize",
    "calibrate",
    "collect",
    "compile",
    "convert",
    "coverage",
    "fake_quantize",
    "formats",
    "fuse_backend",
    "nn",
    "observers",
]


def __dir__() -> list[str]:
    """The public names, and not the modules that were imported on the way."""
    return [*__all__, "__version__"]
