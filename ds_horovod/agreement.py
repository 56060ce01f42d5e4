"""Do all ranks mean the same? Silent disagreement is the worst failure of a collective program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 5


def require_agreement(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless all ranks describe themselves alike.

    Parameters
    ----------
    descriptions
        Of each rank, by rank: plain values, or lists of them that are compared item by item.

    Raises
    ------
    ValueError
        The same on every rank: what differs, and between which ranks.
    """
    differences: list[str] = []
    for rank, description in enumerate(descriptions):
        for key in sorted(descriptions[0].keys() | description.keys()):
            differences += _compare(key, rank, descriptions[0].get(key), description.get(key))
    if differences:
        shown = "\n  ".join(differences[:_SHOWN])
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(f"DoubleSqueeze: the ranks do not agree, so nothing was exchanged:\n  {shown}{more}")


def _compare(key: str, rank: int, ours: Any, theirs: Any) -> list[str]:
    if ours == theirs:
        return []
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return [f"{key}: {ours} on rank 0, {theirs} on rank {rank}"]
    differences = []
    if len(ours) != len(theirs):
        differences.append(f"{key}: {len(ours)} on rank 0, {len(theirs)} on rank {rank}")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            differences.append(f"{key}[{i}]: {a} on rank 0, {b} on rank {rank}")
    return differences
