"""Do all ranks mean the same? Silent disagreement is the worst failure of a collective program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 5


def require_agreement(descriptions: Sequence[Mapping[str, Any]], ways_out: Mapping[str, str] | None = None) -> None:
    """Raises unless all ranks describe themselves alike.

    Parameters
    ----------
    descriptions
        Of each rank, by rank: plain values, lists of them that are compared item by item, or mappings, by key.
    ways_out
        What to do where ranks differ in a key.

    Raises
    ------
    ValueError
        The same on every rank: what differs, and between which ranks.
    """
    items = [dict(_items(description)) for description in descriptions]
    ours = items[0]
    differences: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(items):
        for at in [*ours, *(other for other in theirs if other not in ours)]:
            of_longer_list = at[1].endswith("]") and not (at in ours and at in theirs)
            if ours.get(at) != theirs.get(at) and not of_longer_list:
                differences[at][str(theirs.get(at))].append(rank)
    if not differences:
        return
    lines = [
        f"{label}: {ours.get((key, label))} on rank 0, "
        + ", ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in others.items())
        for (key, label), others in differences.items()
    ]
    shown = "\n  ".join(lines[:_SHOWN])
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    keys = dict.fromkeys(key for key, _ in differences)
    advice = "".join(f"\n{ways_out[key]}" for key in keys if ways_out and key in ways_out)
    raise ValueError(f"DoubleSqueeze: the ranks do not agree, so nothing was exchanged:\n  {shown}{more}{advice}")


def _items(description: Mapping[str, Any]) -> list[tuple[tuple[str, str], Any]]:
    """The key and the label of each plain value, and the value; the label of a list alone is its length."""
    items: list[tuple[tuple[str, str], Any]] = []
    for key, value in description.items():
        if isinstance(value, list):
            items.append(((key, key), len(value)))
            items += [((key, f"{key}[{i}]"), item) for i, item in enumerate(value)]
        elif isinstance(value, Mapping):
            items += [((key, f"{key} of {name}"), item) for name, item in value.items()]
        else:
            items.append(((key, key), value))
    return items
