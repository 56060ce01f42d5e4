"""The gradient reduction of one optimizer on one rank: what a `DoubleSqueeze` is once an optimizer uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .agreement import require_agreement
from .checksum import checksums
from .options import Options
from .residual import Residual
from .scaling import active_scaler, in_backward
from .selection import Selection
from .session import GradientOf, Session
from .tentative import Tentative, TentativeSteps
from .transport import GroupTransport
from .uncompressed import Velocities, clip
from .units import Units, rescaled


class Loaded(NamedTuple):
    """A state that an optimizer has loaded, and taken no step since."""

    description: str
    """By which ranks tell whether it is the same one."""
    step: int
    """Of the state."""
    of_all: bool
    """Whether it is what all ranks hold together, of which each took its part."""
    whole: dict[str, dict[str, Tensor]] | None = None
    """Its errors and velocities, where no rank's part tells what the whole was: where only servers compensate, each for its
    shard, and in two levels, where each rank holds its slice."""


class Reducer:
    """Exchanges what is compressed, and keeps what goes with it: units, velocities of the rest, residuals carried over.

    Parameters
    ----------
    options
        As the user chose them.
    name
        With which names of collectives begin.
    transport
        As for `Session`.
    parameters
        Names and parameters of the optimizer, in the order of registration.
    average
        Whether gradients are averaged rather than added up.
    groups
        Names of parameters that travel together.
    gradient_of
        Where the gradient of a parameter is to be found.
    may_freeze
        Whether ``requires_grad`` says what is trained. False: all parameters are, and the caller knows what moves.

    Raises
    ------
    TypeError, ValueError
        The options do not fit these parameters, or a parameter cannot be trained.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        parameters: Sequence[tuple[str, Tensor]],
        average: bool,
        transport: GroupTransport[Any],
        groups: Sequence[Sequence[str]] = (),
        gradient_of: GradientOf = attrgetter("grad"),
        may_freeze: bool = True,
    ) -> None:
        self.gradient_of = gradient_of
        self.selection = Selection(options, tuple(map(tuple, groups)))
        self.selection.require_fits(parameters)
        for label, p in parameters:
            if p.requires_grad and not p.is_floating_point():
                raise ValueError(f"DoubleSqueeze: parameter {label} is {p.dtype}; only floating-point ones can be trained")
            if p.requires_grad and p.device.type not in ("cpu", "cuda"):
                raise ValueError(f"DoubleSqueeze: parameter {label} is on {p.device}; only cpu and cuda are supported")
        self.parameters = [(label, p) for label, p in parameters if p.requires_grad or not may_freeze]
        self._may_freeze = may_freeze
        self.units = Units(options.grad_scaler, options.lr_aware)
        self.velocities = Velocities(options.momentum)
        self._all_parameters = list(parameters)
        self._name = self._first_name = name
        self._average = average
        self._carried_over: dict[str, Tensor] = {}  # on one rank: the residuals of times when there were several
        self._late: dict[str, Tensor] = {}  # of parameters that no exchange takes: averages of steps that have been flushed
        self._steps_carried_over = 0
        self.tentative: TentativeSteps | None = None
        """With staleness, where several ranks train."""
        self.enter(transport)

    def enter(self, transport: GroupTransport[Any], era: str = "") -> None:
        """Begins anew among the ranks that a transport reaches, with nothing held.

        Parameters
        ----------
        transport
            To the other ranks.
        era
            Part of names that no rank has ever used. Empty: as before.
        """
        if era:
            self._name = f"{self._first_name}.{era}"
        self.transport = transport
        self.session: Session[Any] | None = None
        """The exchange; None for one rank, which has nobody to exchange with."""
        self._loaded: Loaded | None = None
        if transport.size > 1:
            weight = 1.0 / transport.size if self._average else 1.0
            self.session = Session(
                self._name, self.parameters, self.selection, weight, transport, self.units, self._more_to_compare,
                self.gradient_of, self._may_freeze,
            )  # fmt: skip
        else:
            self._name_alone = transport.unique_name(self._name)

    def _more_to_compare(self) -> dict[str, Any]:
        """Parts of the state of training that must be the same on all ranks when they begin."""
        return {
            "loaded state": self.loaded.description if self.loaded else "none",
            "velocities": checksums(self.velocities.state_dict().items()),
            "weights": checksums(self._all_parameters),
        }

    @property
    def loaded(self) -> Loaded | None:
        """What has been loaded since the last step."""
        return self._loaded if self._loaded and self._loaded.step == self.steps else None

    @loaded.setter
    def loaded(self, loaded: Loaded) -> None:
        self._loaded = loaded

    @property
    def name(self) -> str:
        """With which names of collectives begin; the ranks have agreed on it once the first step has ended."""
        return self._name_alone if self.session is None else self.session.name

    @property
    def options(self) -> Options:
        """As the user chose them."""
        return self.selection.options

    @property
    def sessions(self) -> list[Session[Any]]:
        """The session, if there is one."""
        return [] if self.session is None else [self.session]

    @property
    def place(self) -> tuple[int, int]:
        """How many ranks there are, and which one this is."""
        return self.transport.size, self.transport.rank

    @property
    def steps(self) -> int:
        """How many have been taken, since training began."""
        return self._steps_carried_over if self.session is None else self.session.step

    # ---- every step

    def begin_step(self, rates: Mapping[str, float], scale_everywhere: Callable[[float], float] = lambda own: own) -> None:
        """A step begins: errors follow the loss scale and, with `lr_aware`, the learning rate.

        Parameters
        ----------
        rates
            The learning rate of each parameter, by name.
        scale_everywhere
            Makes of this rank's loss scale, 0 where no backward runs, that of all ranks.
        """
        units, own = self.units, 0.0
        if in_backward():  # otherwise this rank has no loss in this step, and all stays as it was
            units.grad_scaler = active_scaler() or units.given
            own = 1.0 if units.grad_scaler is None else float(units.grad_scaler.get_scale())
        if self.loaded is None:
            self._loaded = None  # its errors need not stay in memory
        change = units.begin_step(rates, scale_everywhere(own) or None)
        if change is None:
            return
        if self.session is not None:
            self.session.rescale(change)
        for carried_over in (self._carried_over, self._late):
            for name, error in carried_over.items():  # which a snapshot may hold too
                carried_over[name] = rescaled(error.clone(), change.scale * change.rates.get(name, 1.0))
        self.velocities.rescale(change.scale)

    def clip_alone(self) -> None:
        """On one rank, where no exchange does it: clips the gradients before they are used."""
        if self.session is None and self.options.max_norm is not None:
            clip(self._gradients(), self.options.max_norm * self.units.scale)

    def end_step(self) -> None:
        """All gradients are aggregated: those that no exchange takes get momentum, and one rank what has been carried over.

        Where nothing is due, all stays as it is: the optimizer does not take the step.
        """
        if not self.is_due:
            return
        gradients, session = self._gradients(), self.session
        if session is not None:
            skipped = session.skipped
        else:
            skipped = self.units.may_skip and not all(bool(gradient.isfinite().all()) for _, gradient in gradients)
        if skipped:
            return
        covered = set() if session is None else {name for name, p in self.parameters if session.covers(p)}
        for name, gradient in gradients:
            if name not in covered:
                self.velocities.add(name, gradient)
        self.add_carried_over(gradients)

    def add_carried_over(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Adds to the gradients of the next step, once, what waits for them; on one rank that several ranks have left, too."""
        for name, gradient in gradients if self._carried_over or self._late else ():
            for carried_over in (self._carried_over, self._late):
                if name in carried_over:
                    gradient += carried_over.pop(name).to(gradient.device)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        found = ((name, self.gradient_of(p)) for name, p in self._all_parameters)
        return [(name, gradient) for name, gradient in found if gradient is not None]

    def take_tentative_steps(self, tentative: Tentative) -> None:
        """With staleness: where `attach` has named a model, or `DoubleSqueeze.tentative` is used."""
        if self.session is not None:
            late = self.session.late
            self.tentative = TentativeSteps(tentative, late.estimates, lambda: late.changes)
            if self.options.model is not None:
                self.attach(self.options.model)

    def tentative_steps(self) -> TentativeSteps | None:
        """From now on each step keeps what they need; None where nothing is ever late."""
        if self.tentative is not None and self.session is not None:
            if self.options.momentum and self.transport.host is not None:
                raise ValueError(
                    f"DoubleSqueeze: tentative steps with momentum={self.options.momentum} need one level, and there are two; "
                    "pass hierarchical=False"
                )
            self.session.late.keeps_estimates = True
        return self.tentative

    def attach(self, model: nn.Module) -> None:
        """Takes tentative steps in each forward and backward of a model in training.

        Raises
        ------
        ValueError
            None of its parameters is the optimizer's.
        """
        own = {p for _, p in self.parameters}
        if not any(p in own for p in model.parameters()):
            raise ValueError(f"DoubleSqueeze: model must have parameters of the optimizer; {type(model).__name__} has none")
        steps = self.tentative_steps()
        if steps is not None:
            steps.attach(model)

    # ---- between two steps

    @property
    def is_due(self) -> bool:
        """Whether the step under way, or the last one, gets the gradients of any step."""
        return self.session is None or self.session.due is not None

    def late(self) -> dict[str, Tensor]:
        """What waits for the gradients of parameters that no exchange takes, by name, the same on all ranks."""
        in_flight = {} if self.session is None else self.session.late.uncompressed()
        names = [*self._late, *(name for name in in_flight if name not in self._late)]
        parts = {name: [held[name] for held in (self._late, in_flight) if name in held] for name in names}
        return {name: torch.stack(tensors).sum(0) for name, tensors in parts.items()}

    def load_late(self, late: Mapping[str, Tensor]) -> None:
        """Takes back what `late` gave."""
        self._late = {name: tensor.clone() for name, tensor in late.items()}

    def flush(self) -> None:
        """Moves what late steps will bring to the errors; see `DoubleSqueeze.flush`."""
        if self.session is not None:
            self.session.require_between_steps()
            self._late = self.late()
            self.session.import_residual(self.session.export_residual(), self.session.step)

    def reset(self) -> None:
        """Drops what waits; see `DoubleSqueeze.reset_errors`."""
        session = self.session
        if session is not None:
            session.require_between_steps()
            session.agree_on_name()
            everyones = session.transport.gather_objects({"reset_errors() after step": session.step}, session.name + ".reset")
            require_agreement(everyones)
            session.restore_frozen()
            session.import_residual({}, session.step, alike=True)
        self._carried_over, self._late, self._loaded = {}, {}, None
        self.velocities.load_state_dict({})

    def change(self, options: Options) -> None:
        """Goes on with other compressors, which take over the residuals; see `DoubleSqueeze.change_compressor`."""
        session = self.session
        if session is not None:
            residuals, step = session.export_residual(), session.step
            self._late = self.late()
            if not options.worker_error:
                residuals = averaged(session, residuals)
            session.restart(options)
            session.import_residual(residuals, step)
        self.selection = replace(self.selection, options=options)

    def residuals(self, of_all: bool = False) -> dict[str, Residual]:
        """As `Session.export_residual`; on one rank what has been carried over."""
        if self.session is None:
            return {name: Residual(error, None) for name, error in self._carried_over.items()}
        return self.session.export_residual(of_all)

    def import_all(
        self,
        residuals: Mapping[str, Residual],
        steps: int,
        sparse: Iterable[str],
        velocities: Mapping[str, Tensor],
        late: Mapping[str, Tensor],
        alike: bool = False,
    ) -> None:
        """Replaces all that is held.

        Parameters
        ----------
        residuals
            This rank's, by name of parameter.
        steps
            How many have been taken.
        sparse
            Names of parameters with sparse gradients.
        velocities
            By name, the same on all ranks: of parameters that are not compressed, and of others the mean.
        late
            As `late` gives it.
        alike
            Whether all ranks are given the same residuals. Otherwise all of them must call this.
        """
        residuals, velocities = dict(residuals), dict(velocities)
        self.load_late(late)
        session = self.session
        if session is None:
            self._carried_over = {name: r.error for name, r in residuals.items()}
            self._steps_carried_over = steps
            velocities |= {name: r.velocity for name, r in residuals.items() if r.velocity is not None}
        else:
            self._carried_over = {}
            names = frozenset(sparse)
            session.adopt(names, session.buckets if names == session.sparse else session.fill(names), hold_errors=True)
            if self.options.momentum:
                for name in [n for n, p in session.parameters if session.covers(p) and n in velocities]:
                    own = velocities.pop(name).float() / session.transport.size
                    error, u = residuals.get(name, Residual(torch.zeros_like(own), None))
                    residuals[name] = Residual(error, own if u is None else own.to(u.device) + u)
            session.import_residual(residuals, steps, alike)
        self.velocities.load_state_dict(velocities)


def averaged(session: Session[Any], residuals: Mapping[str, Residual]) -> dict[str, Residual]:
    """Errors that are the same on all ranks, each the equal part of what they hold together; all ranks call it."""
    session.agree_on_name()
    result = {}
    for name, p in [(n, p) for n, p in session.parameters if session.covers(p)]:
        zeros = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        own = residuals[name].error if name in residuals else zeros
        total = session.transport.sum(own, f"{session.name}.{name}.residual")
        result[name] = Residual(total / session.transport.size, None)
    return result
