"""Which parameters are compressed, with what, and which travel together: known before training, alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .compressors import Compressor
from .layout import Layout, fill_buckets, pack
from .options import Choice, Options

COMPRESSIBLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """A bucket to be."""

    names: list[str]
    parameters: list[Tensor]
    options: Options
    """With the compressors of this bucket."""
    layout: Layout

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(self.layout.numels)

    @property
    def nbytes(self) -> int:
        """Of the gradients."""
        return self.numel * self.parameters[0].element_size()

    @property
    def push_nbytes(self) -> int:
        """Of what a worker pushes, all shards together."""
        return self.layout.shards * self.options.compressor.chunk_nbytes(self.layout)

    @property
    def reply_nbytes(self) -> int:
        """Of what all servers reply, together."""
        return self.layout.shards * self.options.reply_compressor.chunk_nbytes(self.layout)


@dataclass(frozen=True)
class Selection:
    """Which parameters are compressed, and how they are grouped."""

    options: Options
    groups: tuple[tuple[str, ...], ...] = ()
    """Names of parameters that travel together, whatever their size, as Horovod's ``groups=`` says."""
    min_dim: int = 2

    def choice(self, name: str, p: Tensor) -> Choice:
        """What the user has chosen for a parameter. None: nothing.

        Raises
        ------
        TypeError
            A choice that is none.
        """
        choose = self.options.choose
        if choose is None:
            return None
        if isinstance(choose, Mapping):
            choice = next((value for pattern, value in choose.items() if fnmatchcase(name, pattern)), None)
        else:
            choice = choose(name, p)
        if choice is not None and not isinstance(choice, bool | Compressor):
            raise TypeError(f"DoubleSqueeze: choose must give True, False, a Compressor or None; got {choice!r} for {name}")
        return choice

    def why_not(self, name: str, p: Tensor) -> str | None:
        """Why a parameter is not compressed; None where it is.

        Raises
        ------
        ValueError
            The user has chosen what cannot be compressed.
        """
        choice = self.choice(name, p)
        if choice is False:
            return "choose"
        if p.numel() == 0:
            return "no elements"
        if p.dtype not in COMPRESSIBLE:
            if choice is True:
                raise ValueError(f"DoubleSqueeze: choose says True for {name}, but {p.dtype} cannot be compressed")
            return str(p.dtype).removeprefix("torch.")
        if choice is not True and p.dim() < self.min_dim:
            return "one dimension"
        if choice is not True and p.numel() < self.options.min_numel:
            return f"under {self.options.min_numel} elements"
        return None

    def compressor(self, name: str, p: Tensor) -> Compressor | None:
        """The compressor of what is pushed of a parameter; None where it is not compressed."""
        if self.why_not(name, p) is not None:
            return None
        choice = self.choice(name, p)
        return choice if isinstance(choice, Compressor) else self.options.compressor

    def require_fits(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Raises TypeError or ValueError for a choice that no parameter can have, and for a pattern that matches no name."""
        choose, names = self.options.choose, [name for name, _ in parameters]
        if callable(choose):
            for name, p in parameters:
                choice = self.choice(name, p)
                if isinstance(choice, Compressor):
                    self.options.require_compressor(f"choose({name!r})", choice)
        for pattern in choose if isinstance(choose, Mapping) else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"DoubleSqueeze: choose has the pattern {pattern!r}, which matches no parameter; "
                    f"they are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                )

    def plan(self, parameters: Sequence[tuple[str, Tensor]], shards: int, sparse: Collection[str] = ()) -> list[Plan]:
        """The buckets, by nothing that differs between ranks.

        Parameters
        ----------
        parameters
            Names and parameters, in the order of registration.
        shards
            As many as there are servers.
        sparse
            Names of parameters with sparse gradients, which stay with the dense allreduce.
        """
        cap = self.options.bucket_cap_mb
        found = [(n, p, self.compressor(n, p)) for n, p in parameters if n not in sparse]
        chosen = [(n, p, c) for n, p, c in found if c is not None]
        group_of = {name: g for g, names in enumerate(self.groups) for name in names}
        filled = fill_buckets(
            [p.numel() * p.element_size() for _, p, _ in chosen],
            [(p.dtype, p.device, repr(c)) for _, p, c in chosen],
            None if cap is None else cap * 2**20,
            [group_of.get(n) for n, _, _ in chosen],
        )
        return [self._plan([chosen[i] for i in indices], shards) for indices in filled]

    def _plan(self, members: Sequence[tuple[str, Tensor, Compressor]], shards: int) -> Plan:
        names, parameters, compressors = zip(*members, strict=True)
        options = replace(self.options, compressor=compressors[0])
        block = math.lcm(options.compressor.block, options.reply_compressor.block)
        layout = pack([p.numel() for p in parameters], block, shards)
        return Plan(list(names), list(parameters), options, layout)


def explain(
    selection: Selection,
    parameters: Sequence[tuple[str, Tensor]],
    plans: Sequence[Plan],
    workers: int,
    local_size: int = 1,
    levels: str = "",
) -> str:
    """A table of what is compressed, bucket by bucket, what is not and why, and what that saves.

    Parameters
    ----------
    selection, parameters, plans
        What is compressed.
    workers
        How many ranks there are.
    local_size
        In two levels: how many of them are on each host.
    levels
        What there is to say of that.
    """
    lines = [levels] if levels else []
    ring, hosts = 2 * (workers - 1) / workers, workers // local_size
    among_hosts = 2 * (hosts - 1) / hosts / local_size
    dense_nbytes = sent = 0.0
    for b, plan in enumerate(plans):
        compressor, of_replies = plan.options.compressor, plan.options.reply_compressor
        reply = "" if of_replies == compressor else f", replies {of_replies!r}"
        lines.append(f"bucket {b}: {compressor!r}{reply}")
        lines.append(f"  {_size(plan.nbytes)} of gradients, pushes {_size(plan.push_nbytes)}, pulls {_size(plan.reply_nbytes)}")
        lines += [f"    {name} {tuple(p.shape)}" for name, p in zip(plan.names, plan.parameters, strict=True)]
        dense_nbytes += ring * plan.nbytes
        sent += among_hosts / 2 * (plan.push_nbytes + plan.reply_nbytes)
    compressed = {name for plan in plans for name in plan.names}
    rest = [(name, p) for name, p in parameters if name not in compressed]
    if rest:
        nbytes = sum(p.numel() * p.element_size() for _, p in rest)
        lines.append(f"not compressed: {_size(nbytes)} of gradients, by an ordinary allreduce")
        for name, p in rest:
            lines.append(f"    {name} {tuple(p.shape)}: {selection.why_not(name, p) or 'sparse gradients'}")
        dense_nbytes += ring * nbytes
        sent += ring * nbytes
    less = dense_nbytes / sent if sent else 1.0
    where = " to other hosts" if local_size > 1 else ""
    saved = f"{_size(sent)} a step{where} in place of {_size(dense_nbytes)}, {less:.1f} times less"
    lines.append(f"each of {workers} ranks sends {saved}")
    return "\n".join(lines)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
