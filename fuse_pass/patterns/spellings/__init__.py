"""The patterns as models write them, one file each."""

from fuse_pass.patterns.spellings import dense, dense_act_dense, dropout_norm, gated_dense
from fuse_pass.patterns.spellings.corpus import Corpus

__all__ = ["Corpus", "dense", "dense_act_dense", "dropout_norm", "gated_dense"]
