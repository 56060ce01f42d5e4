"""The exchange for DistributedDataParallel, on process groups of torch. Nothing of Horovod is imported."""

from ..scaling import watch_scalers as _watch_scalers
from .hook import double_squeeze_hook, register

__all__ = ["double_squeeze_hook", "register"]

_watch_scalers()
