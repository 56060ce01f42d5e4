"""DoubleSqueeze gradient compression for Horovod and PyTorch.

Importing it is enough for ``hvd.DistributedOptimizer(..., compression=DoubleSqueeze)`` to work.
"""

try:
    import horovod.torch as _horovod  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ds_horovod needs Horovod with PyTorch (horovod.torch), which is not installed or was built for another torch. "
        "Horovod 0.28.1 needs two lines changed to build with torch >= 2.1: scripts/install_horovod.sh of ds_horovod "
        "does that (scripts/install_horovod.sh VENV)."
    ) from error

from .compressors import Cast, Compressor, NoCompression, OneBit, Quantize, RandomK, Ternary, TopK
from .double_squeeze import DoubleSqueeze
from .eager import allreduce
from .elastic import install as _install_elastic
from .files import save
from .hook import install as _install

_install()
_install_elastic()

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
