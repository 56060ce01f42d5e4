"""An allreduce with an error of its own, for tensors outside an optimizer."""

from __future__ import annotations

import os
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from ..double_squeeze import DoubleSqueeze, tensor_reducer
from ..selection import COMPRESSIBLE
from .hook import is_average
from .transport import HorovodTransport, require_horovod_for

_default: DoubleSqueeze | None = None


def allreduce(
    tensor: Tensor,
    name: str,
    op: Any = hvd.Average,
    compression: DoubleSqueeze | type[DoubleSqueeze] = DoubleSqueeze,
    process_set: Any = hvd.global_process_set,
) -> Tensor:
    """Averages or sums a tensor over all ranks through the two compressed passes, in place of ``hvd.allreduce``.

    What compression takes away stays in an error that belongs to the name and is added at the next call with it: give
    the same tensor the same name each time, and each tensor another one. The tensor is compressed whatever its size.

    Parameters
    ----------
    tensor
        float32, float16 or bfloat16, dense, of the same shape on all ranks and of the same shape and device at each call; not
        modified.
    name
        Of the error and of the collectives; the same on all ranks.
    op
        ``hvd.Average`` or ``hvd.Sum``.
    compression
        An instance holds the errors of the names used with it (`DoubleSqueeze.state_dict`, `DoubleSqueeze.stats`) and
        must not be an optimizer's. The class: an instance with defaults that all such calls share.
    process_set
        The ranks that take part, all of which call it.

    Returns
    -------
    Tensor
        Of the tensor's shape and dtype, the same on all ranks.

    Raises
    ------
    TypeError, ValueError
        The tensor, op, or compression is none of those; the job is elastic; the name stood for another tensor or op; the
        ranks disagree.
    """
    global _default
    if not isinstance(name, str) or not name:
        raise ValueError(f"allreduce: name must be a string that is not empty, since the error belongs to it; got {name!r}")
    if tensor.is_sparse or tensor.dtype not in COMPRESSIBLE or tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"allreduce: {name!r} must be a dense float32, float16 or bfloat16 tensor on cpu or cuda, "
            f"got {tensor.dtype} ({tensor.layout}) on {tensor.device}"
        )
    if compression is DoubleSqueeze:
        compression = _default = _default or DoubleSqueeze()
    if not isinstance(compression, DoubleSqueeze):
        raise TypeError(f"allreduce: compression must be DoubleSqueeze or an instance of it, got {compression!r}")
    if os.environ.get("HOROVOD_ELASTIC") == "1":  # ranks that come would wait for ever for the others to compare notes
        raise ValueError(
            "allreduce: its errors do not follow ranks that come and go, so not in elastic jobs; use hvd.allreduce"
        )
    average = is_average(op)
    if not process_set.included():
        raise ValueError(f"allreduce: process_set must hold this rank, {hvd.rank()}; got {process_set}")
    if process_set.size() == 1 or tensor.numel() == 0:
        return tensor.clone()
    require_horovod_for([tensor.device])
    transport = HorovodTransport(compression.options.server, process_set, compression.options.hierarchical)
    session = tensor_reducer(compression).session("doublesqueeze.tensor", name, tensor, average, transport)
    ((_, stand_in),) = session.parameters
    stand_in.grad = tensor.detach().clone(memory_format=torch.contiguous_format)
    session.admit(stand_in)
    session.ready(stand_in)
    return session.finish(stand_in)
