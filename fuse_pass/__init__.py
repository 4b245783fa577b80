"""A fusion pass for `torch.compile`: `torch.compile(model, backend=fuse_pass.fuse_backend)`."""

from fuse_pass import nn
from fuse_pass.analysis import coverage
from fuse_pass.backend import FuseBackend, fuse_backend
from fuse_pass.front import compile
from fuse_pass.nn import FusedDenseGELUDense, FusedDropoutLayerNorm
from fuse_pass.report import Decline, Match, Reason, Report, collect

__version__ = "0.1.0"

__all__ = [
    "Decline",
    "FuseBackend",
    "FusedDenseGELUDense",
    "FusedDropoutLayerNorm",
    "Match",
    "Reason",
    "Report",
    "collect",
    "compile",
    "coverage",
    "fuse_backend",
    "nn",
]
