"""The exchange for DistributedDataParallel, on process groups of torch. Nothing of Horovod is imported."""

from .amp import install as _install_amp
from .hook import double_squeeze_hook, register

__all__ = ["double_squeeze_hook", "register"]

_install_amp()
