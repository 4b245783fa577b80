"""A fusion pass for `torch.compile`: `torch.compile(model, backend=fuse_pass.fuse_backend)`."""

from fuse_pass import nn
from fuse_pass.analysis import coverage
from fuse_pass.backend import FuseBackend, fuse_backend
from fuse_pass.calibrate import calibrate
from fuse_pass.convert import convert
from fuse_pass.formats import BlockFormat, FixedFormat, FloatFormat, Granularity, IntFormat, formats
from fuse_pass.front import compile
from fuse_pass.nn import BitLinear, FusedDenseGELUDense, FusedDropoutLayerNorm
from fuse_pass.quantize import FloatPrecisionSimulator, absmax_quantize, fake_quantize
from fuse_pass.report import Decline, Match, Reason, Report, collect
from fuse_pass.spec import QuantSpec, Site

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
]
