"""What a worker, or a server, keeps of one bucket from step to step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class FeedbackState:
    """What one side keeps of a bucket, and which random numbers it draws next.

    A pass of the worker, with a coefficient of momentum correction m (Lin et al. 2018, arXiv 1712.01887; zero: none)::

        u = m * u + g
        v = e + u
        payload = Q[v]
        e = v - Q[v]
        u = 0 where v was sent      factor masking, for compressors that leave elements out

    Random numbers are those of a counter (``csrc/shared/philox.h``): the same step, bucket and sender draw the
    same ones on every device.
    """

    error: Tensor | None = None
    """e: float32, of the bucket or of the shard that is served. None: nothing is compensated."""
    velocity: Tensor | None = None
    """u: float32, as large. None: no momentum correction."""
    _: KW_ONLY
    total: Tensor | None = None
    """Of a server whose error must stay where the reply is not finite: error and pushes summed up, as large. It is encoded in
    place of the error, and may be overwritten."""
    momentum: float = 0.0
    """m: in [0, 1)."""
    bucket: int = 0
    """Index of the bucket."""
    sender: int = 0
    """2 * rank for a worker, one more for a server: each rounds by random numbers of its own."""
    first_shard: int = 0
    """Index of the first shard of the layout that is encoded: what all ranks draw alike is drawn by shard."""
    step: int = 0
    """Passes so far."""
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What kernels keep between passes for the sake of speed alone: no result depends on it, and no checkpoint has it."""
