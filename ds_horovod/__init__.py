"""DoubleSqueeze gradient compression for Horovod and PyTorch.

Importing it is enough for ``hvd.DistributedOptimizer(..., compression=DoubleSqueeze)`` to work. Nothing of Horovod is
imported before it is used.
"""

from typing import TYPE_CHECKING, Any

from .compressors import Cast, Compressor, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from .double_squeeze import DoubleSqueeze
from .files import save
from .on_import import extend_horovod as _extend_horovod

if TYPE_CHECKING:
    from .horovod.allreduce import allreduce

_extend_horovod()

__version__ = "0.1.0"
__all__ = [
    "Cast",
    "Compressor",
    "DoubleSqueeze",
    "NoCompression",
    "OneBit",
    "Quantize",
    "RandomK",
    "Ternary",
    "TopK",
    "allreduce",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "allreduce":
        from .horovod.allreduce import allreduce

        return allreduce
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
