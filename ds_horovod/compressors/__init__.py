"""Compressors: Q in the algorithm. One file a family; `base` is what a user's own derives from."""

from .base import Compressor
from .cast import Cast
from .dense import NoCompression
from .one_bit import OneBit
from .quantize import Quantize, Ternary
from .random_k import RandomK
from .top_k import TopK

__all__ = ["Cast", "Compressor", "NoCompression", "OneBit", "Quantize", "RandomK", "Ternary", "TopK"]
