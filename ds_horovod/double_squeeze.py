"""DoubleSqueeze: what the user passes to Horovod. Options, statistics, checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral
from operator import attrgetter
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from .broadcast import broadcast
from .checkpoint import full_state, load, rank_state, require_format
from .compressors import Compressor, OneBit
from .eager import TensorReducer
from .options import Options
from .reducer import Reducer
from .selection import Selection, explain
from .session import GradientOf
from .stats import combine_stats, reset, stats_of
from .transport import GroupTransport

_P = ParamSpec("_P")


def _takes(options: Callable[_P, Options]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _P], None]]:
    """Gives a method the arguments of `Options`, so that type checkers and ``help()`` know them, and they stand once."""

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, _P], None]:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(options)
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()], return_annotation=None
        )
        return method

    return decorate


class DoubleSqueeze:
    """Two-way compression with error feedback on both sides, for ``compression=`` of ``hvd.DistributedOptimizer``.

    Workers compress what they push, the servers compress what they reply, and both add what compression took away to
    the next step (Tang et al., ICML 2019, arXiv 1905.05957). By default every rank serves its share of each bucket: each of
    n ranks sends 2 (n-1)/n times the compressed gradient, less than twice its size, however many ranks there are.

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
        Of what the workers push. Default ``Quantize(bits=4)``; docs/results.md says how near to uncompressed training it
        has ended where it was tried.
    server_compressor
        Of what the servers reply. Default: the same.
    worker_error, server_error
        Whether workers and servers compensate their error. A compressor that is no contraction (`Compressor.contracts`) is
        refused where they do: the error would grow without bound.
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
    staleness
        By how many steps the averaged gradient comes late, 0 to 4: a step gets what the one so many steps before it has sent,
        so that the exchange has all that time. The optimizer does not take the first so many steps. A late gradient trains
        worse, see docs/guide.md. It needs ``worker_error=True``.
    sync_steps
        First steps in which nothing comes late, where ``staleness`` is on.
    model
        With ``staleness``: the model that is trained, for tentative steps. In training, its weights are where the updates
        under way are expected to lead them, from its forward to the end of backward: by steps of the optimizer with this
        rank's own gradients in place of their averages. Nowhere else does anybody see them. That takes nearly all away that a
        late gradient costs; it takes as much memory as the weights for each step of staleness. See `attach` and `tentative`.
    server
        The rank that serves everything, as in the paper. Default None: sharded over all ranks.
    hierarchical
        Whether the ranks of a host add up their gradients first, and each of them exchanges its slice of every bucket with one
        rank of every other host: a host sends, and holds of worker errors, what one rank would. None: where there are several
        hosts with the same number of ranks, more than one.
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

    @_takes(Options)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._options = Options(*args, **kwargs)
        self._reducer: Reducer | TensorReducer | None = None  # of what uses this instance
        self._loaded: Mapping[str, Any] | None = None  # for what will
        self._root_rank: int | None = None  # whose state all ranks will take, once an optimizer is made

    def __repr__(self) -> str:
        return repr(self.options)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: an instance for another model, of the same options, which holds nothing."""
        return {"_options": replace(self.options, model=None), "_reducer": None, "_loaded": None, "_root_rank": None}

    @property
    def options(self) -> Options:
        """The arguments, as they were given or by default, with the compressors of now."""
        return self._options if self._reducer is None else self._reducer.options

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

    def stats(self) -> dict[str, float]:
        """What the exchange has cost, and how large the errors are now, on this rank.

        Returns
        -------
        dict
            ``steps``; per step, in bytes: ``compressed_bytes_sent``, ``compressed_bytes_received`` (what crosses the
            network by the formula ``2 (n-1)/n |payload|``, n ranks; in two levels what crosses it to other hosts,
            ``2 (h-1)/h |payload| / l``, h hosts of l ranks), ``dense_bytes_sent``, ``dense_bytes_received``
            (what stays with Horovod's allreduce); ``compression_ratio``: bytes of an uncompressed ring allreduce over
            bytes sent; ``worker_error_norm``, ``server_error_norm`` (l2); per step, in seconds:
            ``worker_pass_seconds``, ``server_pass_seconds``, ``decode_seconds``, ``wait_seconds``. Of a tensor outside
            an optimizer, a step is a call. Empty for one rank, and before the first use. Means begin with the first step,
            or where `reset_stats` was called.
        """
        return combine_stats([stats_of(session) for session in self._reducer.sessions] if self._reducer else [])

    def reset_stats(self) -> None:
        """Counts steps, bytes and seconds of `stats` from here on, so that the first step and a warm-up can be left out.

        Errors stay as they are.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        self._require_between_steps()
        for session in [] if self._reducer is None else self._reducer.sessions:
            reset(session)

    def explain(self, model: torch.nn.Module | Iterable[tuple[str, Tensor]] | None = None, workers: int = 2) -> str:
        """What is compressed, bucket by bucket, what is not and why, and what that saves; before training too.

        Parameters
        ----------
        model
            A model, or names and parameters as for ``named_parameters=``. None: those of the optimizer.
        workers
            Ranks, where no optimizer of several ranks has been made yet.

        Returns
        -------
        str
            A table to print. Sizes are those after the warm-up.

        Raises
        ------
        ValueError
            There is no model and no optimizer either, or no worker.
        """
        if not isinstance(workers, Integral) or isinstance(workers, bool) or workers < 1:
            raise ValueError(f"DoubleSqueeze: workers must be a whole number of ranks, 1 or more; got {workers!r}")
        alone = "one rank: nothing is exchanged, and so nothing compressed"
        shards = workers if self.options.server is None else 1
        if model is None:
            if not isinstance(self._reducer, Reducer):
                raise ValueError("DoubleSqueeze: explain needs a model, since no optimizer uses this instance")
            session, selection, parameters = self._reducer.session, self._reducer.selection, self._reducer.parameters
            if session is not None:
                host, n, levels = session.transport.host, session.transport.size, session.transport.levels
                local_size = 1 if host is None else host.size
                return explain(selection, parameters, session.plan(session.sparse), n, local_size, levels)
            table = f"; with workers={workers}:\n{explain(selection, parameters, selection.plan(parameters, shards), workers)}"
            return alone if workers == 1 else alone + table
        named = list(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
        selection = Selection(self.options)
        selection.require_fits(named)
        trained = [(name, p) for name, p in named if p.requires_grad]
        return alone if workers == 1 else explain(selection, trained, selection.plan(trained, shards), workers)

    def state_dict(self) -> dict[str, Any]:
        """Errors and velocities of this rank: plain tensors (not copied) and values, for `ds_horovod.save`.

        Each rank has its own; `load_state_dict` takes it back on the same rank of as many ranks, bit for bit. For one file that
        any number of ranks can load there is `full_state_dict`.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        self._require_between_steps()
        return rank_state(self.options, self._reducer)

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
        return full_state(self.options, self._reducer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, exactly, or what `full_state_dict` gave, on all ranks.

        Of an instance that is not in use yet, and of tensors that `allreduce` has not seen yet: at their first use, which
        then raises what is said here.

        Raises
        ------
        ValueError
            The state is of another format, world size, rank or layout: which one, and what was expected. Or it is malformed,
            or holds values that are not finite: where. Nothing has changed then.
        RuntimeError
            A step is under way.
        """
        self._require_between_steps()
        if self._reducer is None:
            require_format(state, self.options, None)
            self._loaded = state
        elif isinstance(self._reducer, Reducer):
            load(self._reducer, state)
        else:
            self._reducer.load(state)

    def _require_between_steps(self) -> None:
        for session in [] if self._reducer is None else self._reducer.sessions:
            session.require_between_steps()

    def broadcast_state(self, root_rank: int = 0) -> None:
        """Gives all ranks the state of one of them, as ``hvd.broadcast_optimizer_state`` does; all ranks call it.

        A `full_state_dict` that it has loaded since its last step is as if all had loaded it. Otherwise its own errors and
        velocities are divided among all. Before the optimizer is made, it says what making it begins with.

        Raises
        ------
        ValueError
            No such rank is in the optimizer's process set, or ranks name different ones; the state does not fit.
        RuntimeError
            A step is under way.
        """
        if isinstance(self._reducer, TensorReducer):
            raise ValueError("DoubleSqueeze: broadcast_state is for optimizers, and allreduce uses this instance")
        if self._reducer is None:
            self._root_rank = root_rank
        else:
            broadcast(self._reducer, root_rank)

    def attach(self, model: torch.nn.Module) -> None:
        """With ``staleness``: takes tentative steps with a model, as ``model=`` does; before the optimizer is made or later.

        Raises
        ------
        TypeError, ValueError
            It is no module, or none of its parameters is the optimizer's; or ``staleness`` is 0.
        """
        options = replace(self.options, model=model)
        if self._reducer is None:
            self._options = options
        elif isinstance(self._reducer, Reducer):
            self._reducer.attach(model)

    @contextmanager
    def tentative(self) -> Iterator[None]:
        """Takes a tentative step for the forward and backward inside, of code that no ``model=`` stands for.

        ::

            with squeeze.tentative():
                loss = loss_of(weights)
                loss.backward()
            optimizer.step()

        Weights are themselves again afterwards, bit for bit. Without ``staleness``, and on one rank, nothing happens.
        """
        steps = self._reducer.tentative_steps() if isinstance(self._reducer, Reducer) else None
        with nullcontext() if steps is None else steps.entered_here():
            yield

    def flush(self) -> None:
        """With ``staleness``: moves what has been sent and is not due yet to the errors; all ranks call it, between two steps.

        Nothing is lost: the next steps send it again. The optimizer does not take the first ``staleness`` of them. To apply
        it instead, as at the end of training, take so many steps without backward: ``optimizer.zero_grad()``,
        ``optimizer.step()``.

        Raises
        ------
        RuntimeError
            A step is under way.
        """
        if isinstance(self._reducer, Reducer):
            self._reducer.flush()

    def reset_errors(self) -> None:
        """Drops what waits to be sent, errors and velocities, on all ranks, which all call it between two steps.

        For a step that is not taken because its gradients are absurd: what has not been sent of them would spoil the steps
        after it. What had waited from earlier steps is lost too. After ``optimizer.synchronize()`` in place of
        ``optimizer.step()``, where the averaged gradients, which are the same on all ranks, say so. ``max_norm`` keeps such
        gradients out in the first place, and loses nothing that waits.

        Raises
        ------
        ValueError
            The ranks have taken different numbers of steps; or no optimizer uses the instance.
        RuntimeError
            A step is under way.
        """
        if not isinstance(self._reducer, Reducer):
            raise ValueError("DoubleSqueeze: reset_errors is for an instance that an optimizer uses, and this one is not")
        self._reducer.reset()

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
        if compressor is None:
            raise TypeError("DoubleSqueeze: compressor must be a ds_horovod Compressor, got None")
        options = replace(self.options, compressor=compressor, server_compressor=server_compressor)
        if isinstance(self._reducer, TensorReducer):
            raise ValueError("DoubleSqueeze: change_compressor is for optimizers, and allreduce uses this instance")
        if self._reducer is None:
            self._options = options
        else:
            self._reducer.change(options)


def bind(
    squeeze: DoubleSqueeze,
    name: str,
    parameters: Sequence[tuple[str, Tensor]],
    average: bool,
    transport: GroupTransport[Any],
    groups: Sequence[Sequence[str]] = (),
    gradient_of: GradientOf = attrgetter("grad"),
    may_freeze: bool = True,
) -> Reducer:
    """Ties an instance to the parameters of one optimizer; the arguments are those of `Reducer`.

    Raises
    ------
    ValueError
        The instance is in use already, or cannot work with these parameters.
    """
    if squeeze._reducer is not None:
        raise ValueError("DoubleSqueeze: this instance is in use already; make one for each optimizer")
    reducer = Reducer(squeeze.options, name, parameters, average, transport, groups, gradient_of, may_freeze)
    if squeeze._loaded is not None:
        load(reducer, squeeze._loaded)
    if squeeze._root_rank is not None:
        broadcast(reducer, squeeze._root_rank)
    squeeze._reducer, squeeze._loaded, squeeze._root_rank = reducer, None, None
    return reducer


def reducer_of(squeeze: DoubleSqueeze) -> Reducer:
    """The reducer of the optimizer that uses an instance. Raises ValueError where there is none."""
    if not isinstance(squeeze._reducer, Reducer):
        raise ValueError("DoubleSqueeze: only an optimizer's instance can go on among other ranks")
    return squeeze._reducer


def tensor_reducer(squeeze: DoubleSqueeze) -> TensorReducer:
    """Ties an instance to tensors outside an optimizer, at the first call.

    Raises
    ------
    ValueError
        The instance belongs to an optimizer, or has options for optimizers alone.
    """
    if isinstance(squeeze._reducer, Reducer):
        raise ValueError("DoubleSqueeze: this instance belongs to an optimizer; make another one for allreduce")
    if squeeze._root_rank is not None:
        raise ValueError("DoubleSqueeze: broadcast_state is for optimizers; call load_state_dict on all ranks for allreduce")
    if squeeze._reducer is None:
        squeeze._reducer, squeeze._loaded = TensorReducer(squeeze.options, squeeze._loaded), None
    return squeeze._reducer
