"""DoubleSqueeze: what the user passes to Horovod. Options, statistics, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import FORMAT, Shared, Snapshot, load_buckets, require_fits, save_bucket
from .compressors import Compressor, OneBit, Quantize
from .exchange import Options
from .selection import Choose, Selection, explain
from .session import GroupTransport, Owed, Session, combine_stats, share
from .uncompressed import Velocities
from .units import Units


class _Bound(NamedTuple):
    name: str
    parameters: list[tuple[str, Tensor]]
    average: bool
    selection: Selection


class DoubleSqueeze:
    """Two-way compression with error feedback on both sides, for ``compression=`` of ``hvd.DistributedOptimizer``.

    Workers compress what they push, the servers compress what they reply, and both add what compression took away to
    the next step (Tang et al., ICML 2019, arXiv 1905.05957). By default every rank serves its share of each bucket, so
    that traffic per rank does not grow with the number of ranks.

    Pass the class itself for the defaults, or an instance of your own for each optimizer::

        compression=DoubleSqueeze
        compression=DoubleSqueeze(OneBit())
        compression=DoubleSqueeze(TopK(0.045, values="sign"), momentum=0.9)             # the optimizer: momentum=0
        compression=DoubleSqueeze(OneBit(), server_compressor=NoCompression())          # one-way: MEM-SGD
        compression=DoubleSqueeze(TopK(0.01), worker_error=False, server_error=False)   # no compensation
        compression=DoubleSqueeze(choose={"*.embedding.weight": False, "head.*": TopK(0.1)})
        compression=DoubleSqueeze.paper()                                               # as in the paper

    Parameters
    ----------
    compressor
        Of what the workers push. Default ``Quantize(bits=4)``, which trains every network of docs/results.md like no
        compression does.
    server_compressor
        Of what the servers reply. Default: the same.
    worker_error, server_error
        Whether workers and servers compensate their error.
    momentum
        Of momentum correction with factor masking (Lin et al., ICLR 2018, arXiv 1712.01887), in place of the optimizer's
        own, which must be 0 then (of Adam: beta1): each worker adds up its own gradients, u = momentum * u + g, sends what
        is largest of error + u, and forgets the velocity u of what it has sent. In [0, 1); 0: none. It needs a compressor
        that leaves elements out (`Compressor.sparse`): one that sends every element would clear u in every step. Parameters
        that are not compressed, and all of them on one rank, have plain momentum.
    warmup_steps
        First steps in which everything travels uncompressed.
    max_norm
        To which each worker clips the norm of all its gradients before it compresses them, as
        ``torch.nn.utils.clip_grad_norm_`` does. Clipping the averaged gradient instead loses what is cut off, for the
        error does not know of it. No bucket leaves before backward has ended then. None: gradients are not clipped.
    grad_scaler
        The ``torch.amp.GradScaler`` that scales the loss: errors follow its scale then, up and down. The same on all ranks.
        ``max_norm`` is in units of gradients that are not scaled.
    lr_aware
        Whether errors follow the learning rate, of each parameter group: multiplied by old / new when a schedule changes it
        (Zheng et al. 2019, arXiv 1905.10936), so that what waits is worth what it was. Default False, as in the paper.
    server
        The rank that serves everything, as in the paper. Default None: sharded over all ranks.
    bucket_cap_mb
        MiB of gradients that travel together, at most; a larger parameter travels alone. Smaller buckets leave earlier,
        larger ones cost fewer collectives. None: one bucket for all.
    min_numel
        Elements from which a parameter is compressed. Smaller ones, those of one dimension, float64 ones and sparse
        gradients stay with Horovod's own allreduce.
    choose
        What to do with a parameter, by patterns of its name (`fnmatch`; the first that matches counts), or a function of name
        and parameter. True: compressed whatever its size. False: not compressed. A compressor: with this one, if its size
        says so. None, or no pattern: as the other options say. The same on all ranks.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong type or out of range.
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        *,
        server_compressor: Compressor | None = None,
        worker_error: bool = True,
        server_error: bool = True,
        momentum: float = 0.0,
        warmup_steps: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
        lr_aware: bool = False,
        server: int | None = None,
        bucket_cap_mb: float | None = 25.0,
        min_numel: int = 4096,
        choose: Choose | None = None,
    ) -> None:
        compressor = Quantize(bits=4) if compressor is None else compressor
        if not 0 <= momentum < 1:
            raise ValueError(f"DoubleSqueeze: momentum must be at least 0 and under 1, got {momentum!r}")
        _require_compressor("compressor", compressor, momentum)
        if server_compressor is not None:
            _require_compressor("server_compressor", server_compressor)
        if choose is not None and not isinstance(choose, Mapping) and not callable(choose):
            raise TypeError(f"DoubleSqueeze: choose must map patterns to choices, or be a function; got {choose!r}")
        for pattern, choice in choose.items() if isinstance(choose, Mapping) else ():
            if not isinstance(pattern, str):
                raise TypeError(f"DoubleSqueeze: choose must have patterns of names, got {pattern!r}")
            if choice is not None and not isinstance(choice, bool):
                _require_compressor(f"choose[{pattern!r}]", choice, momentum)
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"DoubleSqueeze: grad_scaler must be a torch.amp.GradScaler, got {grad_scaler!r}")
        if momentum and not worker_error:
            raise ValueError(f"DoubleSqueeze: momentum={momentum!r} needs worker_error=True, got {worker_error!r}")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"DoubleSqueeze: warmup_steps must be a whole number, 0 or more; got {warmup_steps!r}")
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"DoubleSqueeze: max_norm must be positive and finite, or None; got {max_norm!r}")
        if server is not None and (not isinstance(server, int) or server < 0):
            raise ValueError(f"DoubleSqueeze: server must be a rank, or None for all ranks; got {server!r}")
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ValueError(f"DoubleSqueeze: bucket_cap_mb must be positive, or None for one bucket; got {bucket_cap_mb!r}")
        if not isinstance(min_numel, int) or min_numel < 1:
            raise ValueError(f"DoubleSqueeze: min_numel must be a positive whole number, got {min_numel!r}")
        self.compressor = compressor
        self.server_compressor = compressor if server_compressor is None else server_compressor
        self._replies_alike = server_compressor is None  # whatever is chosen for a parameter
        self.worker_error = bool(worker_error)
        self.server_error = bool(server_error)
        self.momentum = float(momentum)
        self.warmup_steps = warmup_steps
        self.max_norm = max_norm
        self.grad_scaler = grad_scaler
        self.lr_aware = bool(lr_aware)
        self.server = server
        self.bucket_cap_mb = bucket_cap_mb
        self.min_numel = min_numel
        self.choose = choose
        self.units = Units(grad_scaler, self.lr_aware)
        self.velocities = Velocities(self.momentum)
        self.session: Session[Any] | None = None
        """The exchange of an optimizer's gradients; None for one rank, and before the first use."""
        self._bound: _Bound | None = None
        self._inherited: dict[str, Tensor] = {}  # what one rank owes to gradients, of times when there were several
        self._inherited_step = 0
        self._tensor_sessions: dict[str, Session[Any]] = {}
        self._loaded: Mapping[str, Any] | None = None  # for what is not in use yet
        self._size = self._rank = -1  # not in use yet

    def __repr__(self) -> str:
        return (
            f"DoubleSqueeze({self.compressor!r}, server_compressor={self.server_compressor!r}, "
            f"worker_error={self.worker_error}, server_error={self.server_error}, momentum={self.momentum}, "
            f"warmup_steps={self.warmup_steps}, max_norm={self.max_norm}, "
            f"grad_scaler={self.grad_scaler!r}, lr_aware={self.lr_aware}, server={self.server}, "
            f"bucket_cap_mb={self.bucket_cap_mb}, min_numel={self.min_numel}, choose={self.choose!r})"
        )

    @classmethod
    def paper(cls, compressor: Compressor | None = None, server: int = 0) -> DoubleSqueeze:
        """As in the paper: one server for one bucket of all parameters, and 1-bit with one scale that keeps its norm.

        Parameters
        ----------
        compressor
            In place of 1-bit; the paper's other one is ``TopK(k=300_000)``.
        server
            The rank that serves.
        """
        compressor = OneBit(scale="l2", granularity="bucket") if compressor is None else compressor
        return cls(compressor, server=server, bucket_cap_mb=None)

    @staticmethod
    def compress(*args: Any) -> Any:
        """Not how this works: raises TypeError and names the right call."""
        raise TypeError(
            "DoubleSqueeze is more than compress() and decompress(): it keeps errors and replaces the collective. "
            "Pass it to hvd.DistributedOptimizer(..., compression=DoubleSqueeze), "
            "or call ds_horovod.allreduce(tensor, name=...) in place of hvd.allreduce."
        )

    decompress = compress

    # ---- called by the hook

    def bind(
        self,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        average: bool,
        transport: GroupTransport[Any],
        groups: Sequence[Sequence[str]] = (),
    ) -> Session[Any] | None:
        """Ties this instance to the parameters of one optimizer.

        Parameters
        ----------
        name, parameters, transport
            As for `Session`.
        average
            Whether gradients are averaged rather than added up.
        groups
            Names of parameters that travel together.

        Returns
        -------
        Session or None
            None for one rank, which has nobody to exchange with.

        Raises
        ------
        ValueError
            The instance is in use already, or cannot work with these parameters.
        """
        if self._size >= 0:
            raise ValueError("DoubleSqueeze: this instance is in use already; make one for each optimizer")
        selection = self._selection(parameters, groups)
        for label, p in parameters:
            if not p.is_floating_point():
                raise ValueError(f"DoubleSqueeze: parameter {label} is {p.dtype}; only floating-point ones can be trained")
            if p.device.type not in ("cpu", "cuda"):
                raise ValueError(f"DoubleSqueeze: parameter {label} is on {p.device}; only cpu and cuda are supported")
        trained = [(label, p) for label, p in parameters if p.requires_grad]
        self._bound = _Bound(name, trained, average, selection)
        self._enter(transport)
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
        return self.session

    def _enter(self, transport: GroupTransport[Any]) -> None:
        assert self._bound is not None
        name, parameters, average, selection = self._bound
        options = self._options(average, transport.size)
        self._size, self._rank = transport.size, transport.rank
        several = transport.size > 1
        self.session = Session(name, parameters, options, selection, transport, self.units) if several else None

    # ---- going on among other ranks, or from a file that they have written

    @property
    def size(self) -> int:
        """Ranks that take part; -1 before the first use."""
        return self._size

    def snapshot(self) -> Snapshot:
        """What this rank needs to go on later, among any number of ranks. Raises RuntimeError while a step is under way."""
        owed = {name: Owed(error, None) for name, error in self._inherited.items()}
        sparse: list[str] = []
        step = self._inherited_step
        if self.session is not None:
            owed, sparse, step = self.session.owed(), sorted(self.session.sparse), self.session.step
        velocities = {name: velocity.clone() for name, velocity in self.velocities.state_dict().items()}
        compressors = self.compressor, None if self._replies_alike else self.server_compressor
        return Snapshot(owed, Shared(compressors, step, sparse, velocities, self.units.state_dict()))

    def rebind(self, transport: GroupTransport[Any], snapshot: Snapshot) -> None:
        """Goes on among other ranks, with what this one has kept of the time before; all of them call it.

        What the ranks owed to the gradients (`Exchange.owed`) is what those that are still there owe from now on.
        """
        if self._bound is None:
            raise ValueError("DoubleSqueeze: only an optimizer's instance can go on among other ranks")
        (self.compressor, server_compressor), shared = snapshot.shared.compressors, snapshot.shared
        self._replies_alike = server_compressor is None
        self.server_compressor = self.compressor if server_compressor is None else server_compressor
        self._enter(transport)
        owed = snapshot.owed
        if self.session is not None and not self.worker_error and self.server_error:  # servers take it over
            owed = self.session.level(owed)
        self._take_over(owed, shared.step, shared.sparse, shared.velocities)
        self.units.load_state_dict(shared.units)

    def _take_over(self, owed: dict[str, Owed], step: int, sparse: Iterable[str], velocities: Mapping[str, Tensor]) -> None:
        """In place of all that is kept: what this rank owes, and velocities that are the same on all ranks."""
        velocities = dict(velocities)
        session = self.session
        if session is None:
            self._inherited = {name: o.error for name, o in owed.items()}
            self._inherited_step = step
            velocities |= {name: o.velocity for name, o in owed.items() if o.velocity is not None}
        else:
            self._inherited = {}
            names = frozenset(sparse)
            session.adopt(names, session.buckets if names == session.sparse else session.fill(names), hold_errors=True)
            if self.momentum:
                for name in [n for n, p in session.parameters if session.covers(p) and n in velocities]:
                    own = velocities.pop(name).float() / session.transport.size
                    error, u = owed.get(name, Owed(torch.zeros_like(own), None))
                    owed[name] = Owed(error, own if u is None else own.to(u.device) + u)
            session.owe(owed, step)
        self.velocities.load_state_dict(velocities)

    def pay(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """On one rank: what an exchange of several ranks has owed is added to the gradients of the next step, once."""
        for name, gradient in gradients if self._inherited else ():
            if name in self._inherited:
                gradient += self._inherited.pop(name).to(gradient.device)

    def tensor_session(
        self, prefix: str, name: str, tensor: Tensor, average: bool, transport: GroupTransport[Any]
    ) -> Session[Any]:
        """The session of one tensor outside an optimizer, made at its first use; its only parameter stands for it.

        Raises
        ------
        ValueError
            The instance belongs to an optimizer, or the tensor is another than the name stood for.
        """
        if self.session is not None:
            raise ValueError("DoubleSqueeze: this instance belongs to an optimizer; make another one for allreduce")
        for option in ("momentum", "warmup_steps", "max_norm", "grad_scaler", "lr_aware", "choose"):
            if getattr(self, option):
                raise ValueError(f"allreduce: {option} is for optimizers; got a compression with {getattr(self, option)!r}")
        options = self._options(average, transport.size)
        session = self._tensor_sessions.get(name)
        if session is None:
            self._size, self._rank = transport.size, transport.rank
            stand_in = torch.empty_like(tensor).requires_grad_()
            session = Session(f"{prefix}.{name}", [(name, stand_in)], options, Selection(1, None, min_dim=0), transport)
            if self._loaded is not None:
                self._load_tensor(self._loaded, session)
            self._tensor_sessions[name] = session
        ((_, stand_in),) = session.parameters
        now, then = ((x.dtype, tuple(x.shape), x.device) for x in (tensor, stand_in))
        if (now, options) != (then, session.options):
            raise ValueError(
                f"allreduce: {name!r} stood for {then[0]} {then[1]} on {then[2]} with weight {session.options.weight}, "
                f"now for {now[0]} {now[1]} on {now[2]} with weight {options.weight}; "
                "its error belongs to one tensor and op: give another name"
            )
        return session

    def _options(self, average: bool, size: int) -> Options:
        weight = 1.0 / size if average else 1.0
        return Options(
            self.compressor,
            None if self._replies_alike else self.server_compressor,
            self.worker_error,
            self.server_error,
            weight,
            self.momentum,
            self.warmup_steps,
            self.max_norm,
        )

    def _selection(self, parameters: Sequence[tuple[str, Tensor]], groups: Sequence[Sequence[str]] = ()) -> Selection:
        selection = Selection(self.min_numel, self.bucket_cap_mb, groups=tuple(map(tuple, groups)), choose=self.choose)
        selection.require_matches([name for name, _ in parameters])
        if callable(self.choose):
            for name, p in parameters:
                choice = selection.choice(name, p)
                if isinstance(choice, Compressor):
                    _require_compressor(f"choose({name!r})", choice, self.momentum)
        return selection

    def follow(self, rates: Mapping[str, float]) -> None:
        """A step begins: errors follow the loss scale and, with `lr_aware`, the learning rate.

        Parameters
        ----------
        rates
            The learning rate of each parameter, by name.
        """
        change = self.units.follow(rates)
        if change is None:
            return
        if self.session is not None:
            self.session.rescale(change)
        for name, error in self._inherited.items():  # which a snapshot may hold too
            self._inherited[name] = error * (change.scale * change.rates.get(name, 1.0))
        self.velocities.rescale(change.scale)

    @property
    def _sessions(self) -> list[Session[Any]]:
        return list(self._tensor_sessions.values()) if self.session is None else [self.session]

    # ---- for the user

    def stats(self) -> dict[str, float]:
        """What the exchange has cost, and how large the errors are now, on this rank.

        Returns
        -------
        dict
            ``steps``; per step, in bytes: ``compressed_bytes_sent``, ``compressed_bytes_received`` (what crosses the
            network by the formula ``2 (n-1)/n |payload|``, n ranks), ``dense_bytes_sent``, ``dense_bytes_received``
            (what stays with Horovod's allreduce); ``compression_ratio``: bytes of an uncompressed ring allreduce over
            bytes sent; ``worker_error_norm``, ``server_error_norm`` (l2); per step, in seconds:
            ``worker_pass_seconds``, ``server_pass_seconds``, ``decode_seconds``, ``wait_seconds``. Of a tensor outside
            an optimizer, a step is a call. Empty for one rank, and before the first use.
        """
        return combine_stats([session.stats() for session in self._sessions])

    def explain(self, model: torch.nn.Module | Iterable[tuple[str, Tensor]] | None = None, workers: int = 2) -> str:
        """What is compressed, bucket by bucket, what is not and why, and what that saves; before training too.

        Parameters
        ----------
        model
            A model, or names and parameters as for ``named_parameters=``. None: those of the optimizer.
        workers
            Ranks, where no optimizer has been made yet.

        Returns
        -------
        str
            A table to print. Sizes are those after the warm-up.

        Raises
        ------
        ValueError
            There is no model and no optimizer either.
        """
        session = self.session
        if model is None:
            if session is None:
                raise ValueError("DoubleSqueeze: explain needs a model, since no optimizer of several ranks uses this instance")
            return explain(session.selection, session.parameters, session.plan(session.sparse), session.transport.size)
        named = list(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
        selection = self._selection(named)
        trained = [(name, p) for name, p in named if p.requires_grad]
        reply = None if self._replies_alike else self.server_compressor
        plans = selection.plan(trained, self.compressor, reply, workers if self.server is None else 1)
        return explain(selection, trained, plans, workers)

    def state_dict(self) -> dict[str, Any]:
        """Errors and velocities of this rank: plain tensors (not copied) and values, for `ds_horovod.save`.

        Each rank has its own; `load_state_dict` takes it back on the same rank of as many ranks, bit for bit. For one file that
        any number of ranks can load there is `full_state_dict`.
        """
        for session in self._sessions:
            session.put_back()
        return {
            "format": FORMAT,
            "size": self._size,
            "rank": self._rank,
            "server": self.server,
            "sparse": sorted(name for session in self._sessions for name in session.sparse),
            "buckets": [save_bucket(bucket) for session in self._sessions for bucket in session.buckets],
            "velocities": self.velocities.state_dict(),
            "units": self.units.state_dict(),
        }

    def full_state_dict(self) -> dict[str, Any]:
        """What all ranks hold together, for one file that any number of ranks can load; all of them call this, one saves it.

        Returns
        -------
        dict
            ``errors``: ``mean_i(e_i) + E`` of each parameter that is compressed (for ``op=Sum`` the sum), float32, of its
            shape, on the cpu; ``velocities`` likewise; ``step``, ``sparse``, ``units``: plain values. The same on all ranks.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        errors = {name: error.to("cpu", copy=True) for name, error in self._inherited.items()}
        velocities = {name: velocity.to("cpu", copy=True) for name, velocity in self.velocities.state_dict().items()}
        for session in self._sessions:
            for name, owed in session.owed(by_all=True).items():
                if self.worker_error or self.server_error:
                    errors[name] = owed.error.to("cpu", copy=True)
                if owed.velocity is not None:
                    velocities[name] = owed.velocity.to("cpu", copy=True)
        return {
            "format": FORMAT,
            "step": max((session.step for session in self._sessions), default=self._inherited_step),
            "sparse": sorted(name for session in self._sessions for name in session.sparse),
            "errors": errors,
            "velocities": velocities,
            "units": self.units.state_dict(),
        }

    def change_compressor(self, compressor: Compressor, server_compressor: Compressor | None = None) -> None:
        """Goes on with another compressor from the next step on; all ranks call it, between two steps.

        What the errors hold is kept: the law holds across the change. The next step begins as the first one did, so that ranks
        that have changed to different ones are told. Before the optimizer is made it says what to begin with.

        Parameters
        ----------
        compressor, server_compressor
            As for the class.

        Raises
        ------
        TypeError, ValueError
            As for the class; or the instance is that of tensors outside an optimizer.
        RuntimeError
            A step is under way.
        """
        _require_compressor("compressor", compressor, self.momentum)
        if server_compressor is not None:
            _require_compressor("server_compressor", server_compressor)
        if self._tensor_sessions:
            raise ValueError("DoubleSqueeze: change_compressor is for optimizers, and allreduce uses this instance")
        replies_alike = server_compressor is None
        if self.session is not None:
            reply = None if replies_alike else server_compressor
            self.session.change(replace(self.session.options, compressor=compressor, server_compressor=reply))
        self.compressor = compressor
        self.server_compressor = compressor if server_compressor is None else server_compressor
        self._replies_alike = replies_alike

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, exactly, or what `full_state_dict` gave, on all ranks.

        Of an instance that is not in use yet, and of tensors that `allreduce` has not seen yet: at their first use, which
        then raises what is said here.

        Raises
        ------
        ValueError
            The state is of another format, world size, rank or layout: which one, and what was expected. Nothing has
            changed then.
        """
        if "buckets" not in state:
            self._load_full(state)
            return
        self._require_same_place(state)
        session = self.session
        if session is not None:
            sparse = set(state["sparse"])
            buckets = session.buckets if session.started or sparse == session.sparse else session.fill(sparse)
            load_buckets(state["buckets"], buckets)
            session.adopt(sparse, buckets, hold_errors=True)
        else:
            if self._tensor_sessions and any(len(b["parameters"]) > 1 for b in state["buckets"]):
                raise ValueError("DoubleSqueeze: the state is of an optimizer, this instance is used by allreduce")
            known = [b for b in state["buckets"] if b["parameters"][0] in self._tensor_sessions]
            load_buckets(known, [self._tensor_sessions[b["parameters"][0]].buckets[0] for b in known])
            self._loaded = state
        self.velocities.load_state_dict(state["velocities"])
        self.units.load_state_dict(state["units"])

    def _load_full(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise ValueError(f"DoubleSqueeze: the state is of format {state.get('format')}, this is format {FORMAT}")
        if self._bound is None:
            for session in self._tensor_sessions.values():
                self._load_tensor(state, session)
            self._loaded = state
            return
        require_fits(state, self._bound.parameters, self._bound.selection, self.compressor, self._options(True, 1))
        owed = share({name: Owed(error, None) for name, error in state["errors"].items()}, self._size)
        self._take_over(owed, state["step"], state["sparse"], state["velocities"])
        self.units.load_state_dict(state["units"])

    def _load_tensor(self, state: Mapping[str, Any], session: Session[Any]) -> None:
        ((name, _),) = session.parameters
        if "buckets" in state:
            self._require_same_place(state)
            saved = [b for b in state["buckets"] if b["parameters"] == [name]]
            load_buckets(saved, session.buckets if saved else [])
        elif name in state["errors"]:
            require_fits({**state, "errors": {name: state["errors"][name]}}, session.parameters, session.selection,
                         self.compressor, session.options)  # fmt: skip
            session.owe(share({name: Owed(state["errors"][name], None)}, session.transport.size), state["step"])

    def _require_same_place(self, state: Mapping[str, Any]) -> None:
        expected = {"format": FORMAT, "server": self.server}
        if self._size >= 0:
            expected |= {"world size": self._size, "rank": self._rank}
        for label, value in expected.items():
            found = state.get("size" if label == "world size" else label)
            if found != value:
                raise ValueError(f"DoubleSqueeze: the state is of {label} {found}, this is {label} {value}")


def _require_compressor(option: str, value: Any, momentum: float = 0.0) -> None:
    """Raises TypeError or ValueError unless an option is a compressor, and one that leaves elements out under momentum."""
    if not isinstance(value, Compressor):
        hint = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
        raise TypeError(f"DoubleSqueeze: {option} must be a ds_horovod Compressor, got {value!r}{hint}")
    if not isinstance(value.block, int) or value.block <= 0 or value.block % 32:
        raise ValueError(f"DoubleSqueeze: {option}.block must be a positive multiple of 32, got {value.block!r}")
    if momentum and not value.sparse:
        raise ValueError(
            f"DoubleSqueeze: momentum={momentum!r} needs a compressor that leaves elements out, as TopK does; "
            f"{value!r} sends all of them, so leave the momentum to the optimizer"
        )
