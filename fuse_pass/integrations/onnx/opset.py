"""Which version of ONNX's operators a model is written in, and what needs a newer one."""

from __future__ import annotations

from dataclasses import dataclass

# Where all that the package writes has a word of its own, block scales and 4-bit integers included.
DEFAULT = 21
# The first that PyTorch's exporter writes.
LEAST = 18


class OpsetError(ValueError):
    """A model that the version which was asked for has no operators for."""


@dataclass(frozen=True)
class Opset:
    """The version that was asked for."""

    version: int

    def __post_init__(self) -> None:
        self.require(LEAST, "a model exported by torch.onnx")

    def require(self, version: int, what: str) -> None:
        """OpsetError if `what` came with a later version."""
        if self.version < version:
            raise OpsetError(
                f"ONNX export: {what} needs opset {version} or newer, got opset_version={self.version}; pass "
                f"opset_version={max(version, DEFAULT)}, or leave it out"
            )
