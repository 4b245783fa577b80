"""The Quantized* layers under the path that they had first; they live in `fuse_pass.quantization.layers`."""

from fuse_pass.quantization.layers import *  # noqa: F403
