"""The fused operators, `torch.ops.fuse_pass.*`; importing this package registers them."""

from fuse_pass.ops import dense, dense_act_dense, dropout_norm, rng

__all__ = ["dense", "dense_act_dense", "dropout_norm", "rng"]
