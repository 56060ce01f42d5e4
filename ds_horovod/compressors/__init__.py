"""Compressors: Q in the algorithm. One file a family; `base` is what a user's own derives from."""

from .base import Compressor
from .dense import NoCompression
from .one_bit import OneBit
from .top_k import TopK

__all__ = ["Compressor", "NoCompression", "OneBit", "TopK"]
