"""Everything that touches Horovod, imported once it is used.

Raises
------
ImportError
    There is no Horovod, or another one than the supported.
"""

try:
    import horovod.torch as _horovod  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ds_horovod needs Horovod with PyTorch (horovod.torch) for this, which is not installed or was built for another "
        "torch. Horovod 0.28.1 needs two lines changed to build with torch >= 2.1: scripts/install_horovod.sh of ds_horovod "
        "does that (scripts/install_horovod.sh VENV)."
    ) from error

from ..scaling import watch_scalers as _watch_scalers
from .amp import install as _install_amp
from .elastic import install as _install_elastic
from .hook import install as _install_hook

_install_hook()
_install_amp()
_watch_scalers()
_install_elastic()
