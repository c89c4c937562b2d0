"""The front door: a training loop of your own, on every rank, with the same script.

    run = asgd_mpi.init(model, optimizer)
    for batch in run.batches(train_set, batch_size=64, epochs=12):
        loss = criterion(model(batch["x"]), batch["y"])
        loss.backward()
        run.step(loss)

Started with `mpirun -np 8 python train.py` rank 0 serves the weights within `run.batches`, which yields nothing there, and every
other rank is a worker. Started with `python train.py` it trains in this process, as one worker would.
"""

from __future__ import annotations

import atexit
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from asgd_mpi import report
from asgd_mpi.config.parse import long_names, ours
from asgd_mpi.errors import ConfigError, UserError
from asgd_mpi.offline.trainer import finished
from asgd_mpi.process import interpreter, launchers, signals
from asgd_mpi.process.ending import DEGRADED, FAULT, WRONG
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import Logged
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.task import Task
from asgd_mpi.task.loop import Loop, options_of, settings_of
from asgd_mpi.vector.flat import trained

SUSPENDED = inspect.GEN_SUSPENDED

_run: Any = None  # the Run of this process, or what trains a task in it
replays: Any = None  # what drives the loop of a script that is run again (see replay)


def init(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    schedule: Callable[[float], float] | None = None,
    options: Mapping[str, Any] | None = None,
    **short: Any,
) -> Run:
    """Begin a run; every rank calls it, with the same arguments.

    Args:
        model: the network, with its first weights; those of rank 0 count. Parameters with requires_grad=False stay as they are.
        optimizer: a torch.optim optimizer of its parameters; its class, settings and parameter groups (lr, weight_decay, betas)
            are read, its step() is not used. None for what the options say.
        schedule: a factor of the optimizer's rate for the share of the run that is done, 0..1; None for the options'.
        options: defaults of options by dotted names, such as {"exchange.n_push": 4, "run.dir": "runs/first"}; a YAML file
            (--config) overrides them, and the command line overrides both. Other words of the command line are left alone.
        **short: options by their short names: lr, seed, servers, rule, n_sync, resume, ...

    Raises:
        ConfigError: an optimizer or option that cannot be used.

    Example:
        >>> import torch, asgd_mpi
        >>> model = torch.nn.Linear(2, 1)
        >>> run = asgd_mpi.init(model, torch.optim.SGD(model.parameters(), lr=0.1), arguments=[])  # doctest: +SKIP
    """
    global _run
    demand_first()
    arguments = ours(short.pop("arguments", sys.argv[1:]))
    given = {**(options_of(optimizer) if optimizer else {}), **(options or {}), **long_names(short)}
    name = Path(sys.argv[0]).name or "script"
    given |= {"data.source": "script", "model.name": name}
    given.setdefault("model.batchnorm", "server_ema")
    settings = settings_of(model, optimizer) if optimizer else {}
    loop = Loop(model, given, schedule, settings)
    _run = Run(loop, optimizer, arguments)
    return _run


class Run:
    """A run that `init` has begun.

    Attributes:
        device: where this rank computes; batches are there, and so is the network.
        rank_is_worker: whether this rank computes gradients.
        rank: its number.
        directory: the run directory, once `batches` has begun.
    """

    def __init__(self, loop: Loop, optimizer: torch.optim.Optimizer | None, arguments: list[str]):
        self._loop, self._arguments = loop, arguments
        self._hold = ExitStack()  # the lock of the run directory
        self._turns: Any = None
        self._inputs: Any = None
        self._is_entered = self._is_over = self._has_stepped = False
        self._had_gradient = False
        self._parameters = [id(parameter) for parameter in trained(loop.model)]
        self.directory: Path | None = None
        self._engine = _engine(loop, arguments)
        self.device, self.rank = self._engine.device, self._engine.rank
        self.rank_is_worker = self._engine.is_worker
        if optimizer is not None:
            _disarm(loop.model, optimizer)
        if replays is None:
            signals.install()
            self._excepthook, sys.excepthook = sys.excepthook, self._on_exception
            atexit.register(self._at_exit)

    @property
    def is_alone(self) -> bool:
        """Return whether this process is the whole run."""
        return self._engine.is_alone

    def batches(
        self,
        dataset: Any,
        batch_size: int | None = None,
        epochs: float | None = None,
        collate_fn: Callable[[list], Any] | None = None,
    ) -> Iterator[Any]:
        """Yield the batches that this rank is to train, on `device`: together the workers get every sample of an epoch once.

        Args:
            dataset: anything with len() and [index]; the same on every rank.
            batch_size: samples that a gradient is averaged over; None for --batch-size.
            epochs: passes over the dataset; None for --epochs.
            collate_fn: makes a batch of a list of samples; None for torch's default_collate.

        When the training is finished the model holds its final weights, on every rank, and the loop ends. If it is asked to end
        sooner (a signal), or if it failed, the process ends here.
        """
        if self._is_entered:
            raise ConfigError("run.batches was called before: a run has one loop.")
        self._is_entered = True
        loop = self._loop
        if [id(parameter) for parameter in trained(loop.model)] != self._parameters:
            raise ConfigError(
                f"the network has {len(trained(loop.model))} trained parameters, and had {len(self._parameters)} at asgd_mpi.init, or "
                "others: what came later has no settings of the optimizer's. Build and freeze all of it before asgd_mpi.init."
            )
        loop.data, loop.collate_fn = dataset, collate_fn
        if batch_size is not None:
            loop.options.setdefault("data.batch_size", batch_size)
        if epochs is not None:
            loop.options.setdefault("run.epochs", epochs)
        self._turns = self._engine.begin(self._hold)
        self._advance(None)
        while not self._is_over:
            self._has_stepped = False
            yield self._inputs
            if not self._has_stepped:
                raise ConfigError(
                    "a batch was not ended with run.step(loss): its gradient would be lost. Call it once for every batch, after "
                    "loss.backward()."
                )

    def step(self, loss: torch.Tensor | float) -> None:
        """End a batch: its gradient, which backward() has left in the network, is pushed when it is due, and newer weights come.

        loss: the mean over the batch; it is recorded, and compared by a replay.
        """
        if self._turns is None or self._is_over:
            raise ConfigError("run.step was called outside of `for batch in run.batches(...)`.")
        if self._has_stepped:
            raise ConfigError(
                "run.step was called twice for one batch: a batch is one gradient. To sum up several, let backward() add them up "
                "before one step."
            )
        self._demand_gradient()
        self._has_stepped = True
        # sync: the push carries it
        self._advance(float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss))

    def validate(
        self, dataset: Any, maximize: bool = False
    ) -> Callable[[Callable[[Any], Mapping[str, Any]]], Callable[[Any], Mapping[str, Any]]]:
        """Decorate what a validation measures on a batch of `dataset`; call it before `batches`.

        The function returns metrics by name: means over the batch, or pairs (sum, weight). The first decides which version is
        the best; maximize: it is to be high. The network is in evaluation mode then, without gradients.
        """
        if self._is_entered:
            raise ConfigError(
                "run.validate was called after run.batches: say before what is measured."
            )
        self._loop.validation, self._loop.maximize = dataset, maximize

        def take(measure: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], Mapping[str, Any]]:
            self._loop.measure = measure
            return measure

        return take

    def on_event(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """Call this with every event that this rank records (asgd_mpi.record.events): validations, pushes, checkpoints on rank 0.

        One that fails is told once, and called no more.
        """

        def listen(event: Any) -> None:
            if callback not in failed:
                try:
                    callback(event)
                except Exception:
                    failed.append(callback)
                    print(
                        "run.on_event: the callback fails, and is called no more:", file=sys.stderr
                    )
                    traceback.print_exc()

        failed: list[Callable[[Any], None]] = []
        self._loop.listeners.append(listen)
        return callback

    def log(self, **values: float) -> None:
        """Record numbers of your own, by name, with the time."""
        if self._loop.rank is not None:
            self._loop.rank.books.log.write(
                Logged.now({name: float(value) for name, value in values.items()})
            )

    @property
    def should_stop(self) -> bool:
        """Return whether the run was asked to end: it does by itself, after this batch."""
        return bool(signals.asked_to_leave())

    # ---- within

    def _advance(self, loss: float | None) -> None:
        """Let the engine go on to the next batch, or to the end."""
        try:
            self._inputs = next(self._turns) if loss is None else self._turns.send(loss)
        except StopIteration as end:
            self._end(end.value)
        rank = self._loop.rank
        self.directory = rank.files.run.path if rank is not None else self._engine.directory

    def _end(self, status: int) -> None:
        self._is_over, self._has_stepped = True, True
        self._hold.close()
        directory = self.directory = self._engine.directory
        if directory is None or not (directory / "finished.json").exists():
            raise SystemExit(status)
        newest, _ = next(checkpoint.resumable(RunDir(directory)))
        self._loop.model.load_state_dict(checkpoint.load(newest)[0])

    def _demand_gradient(self) -> None:
        """Raise ConfigError unless backward() has put a gradient where it is read."""
        flat = self._loop.flat
        if flat is None:
            return
        parameters = trained(self._loop.model)
        if len(parameters) != flat.num_parameters:
            raise ConfigError(
                f"the network has {len(parameters)} trained parameters, and had {flat.num_parameters} when the run began: what was "
                "added, frozen or released since is not part of what travels. Do it before asgd_mpi.init."
            )
        if not flat.shows_gradient():
            raise ConfigError(
                "the network's gradients are no longer where they are read (something has replaced parameter.grad, such as "
                "set_to_none=True or another optimizer's zero_grad). Leave them alone: run.step begins the next one anew."
            )
        if not self._had_gradient:
            self._had_gradient = bool(flat.gradient.any())
            if not self._had_gradient:
                raise ConfigError(
                    "the first batch left a gradient of zero: loss.backward() was not called, or the loss does not depend on the "
                    "network. Call it before run.step(loss)."
                )

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Retire this worker with what ended its loop, and wait for the end of the run, so that the others go on."""
        if self._is_waiting and not isinstance(error, KeyboardInterrupt):
            self._leave_with(error)
        if isinstance(error, UserError):
            _tell_first(error)
        else:
            launchers.let_first_speak()
            self._excepthook(kind, error, trace)
        interpreter.leave(self._engine.give_up(WRONG if isinstance(error, UserError) else FAULT))

    @property
    def _is_waiting(self) -> bool:
        """Return whether the engine waits for a batch of this loop to be ended."""
        return self._turns is not None and inspect.getgeneratorstate(self._turns) == SUSPENDED

    def _leave_with(self, error: BaseException) -> None:
        """Let the engine go on without this loop, to the end of the run, and end the process."""
        try:
            self._turns.throw(error)
        except StopIteration as end:
            interpreter.leave(end.value or DEGRADED)
        except UserError as wrong:
            _tell_first(wrong)
            interpreter.leave(self._engine.give_up(WRONG))
        except BaseException:
            traceback.print_exc()
            interpreter.leave(FAULT)

    def _at_exit(self) -> None:
        """Tell the others if this loop was left before its end, or not entered at all."""
        if not self._is_entered and not self.is_alone:
            _tell_first(
                ConfigError(
                    f"rank {self.rank} has ended without run.batches, in which the other ranks wait for it. Call it on every rank, "
                    "rank 0 included: what it yields there is nothing."
                )
            )
            interpreter.leave(self._engine.give_up(WRONG))
        if self._is_waiting:
            self._leave_with(
                ConfigError(
                    "the loop over run.batches was left before its end (break, return or exit), so this worker takes no further "
                    "part. Let it run until the batches end."
                )
            )


def _tell_first(error: UserError) -> None:
    """Say in one line what was wrong, and let the first process be the one that does if all are wrong."""
    launchers.let_first_speak()
    print(f"error: {error}", file=sys.stderr, flush=True)


def _in_one_line(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called for an exception that ends the script: wrong use is one line and status 2, the rest is for `hook`."""

    def on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not isinstance(error, UserError):
            launchers.let_first_speak()
            return hook(kind, error, trace)
        _tell_first(error)
        interpreter.leave(WRONG)

    return on_exception


def _disarm(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the habits of a plain loop do no harm: zero_grad() does nothing, step() says what to call."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError(
            "optimizer.step() would move this worker's copy of the weights, which the server's replace: call run.step(loss) in "
            "its place."
        )

    def leave(*_: Any, **__: Any) -> None:
        pass

    def refuse_group(*_: Any, **__: Any) -> None:
        raise ConfigError(
            "optimizer.add_param_group() after asgd_mpi.init: its groups were read there. Add it before."
        )

    optimizer.step = refuse  # type: ignore[method-assign]
    optimizer.add_param_group = refuse_group  # type: ignore[method-assign]
    optimizer.zero_grad = model.zero_grad = leave  # type: ignore[method-assign]


def demand_first() -> None:
    """Raise ConfigError if this process has begun a run; wrong use of the next one is told in a line."""
    if _run is not None:
        raise ConfigError(
            "asgd_mpi.init or asgd_mpi.train was called before in this process: a process is one rank. Call one of them, once, and "
            "start a script for each run."
        )
    if replays is None:
        sys.excepthook = _in_one_line(sys.excepthook)


def train(own: Task, arguments: list[str]) -> tuple[int, Path | None]:
    """Take part in the training of a task, to its end; returns the status of this rank, and the run directory."""
    global _run
    signals.install()
    _run = _engine(own, arguments)
    with ExitStack() as hold:
        status = finished(_run.begin(hold))
    return status, _run.directory


def _engine(own: Task, arguments: list[str]) -> Any:
    """Return what trains a loop or a task of the user's: MPI's ranks, or this process alone. Raises ConfigError."""
    if replays is not None:
        replays.take(own)
        return replays
    launchers.demand_mpi()
    if launchers.starts_several():
        from asgd_mpi.runtime.engine import Ranks  # loads MPI

        return Ranks(own, arguments, report.make)
    from asgd_mpi.runtime.alone import Alone

    return Alone(own, arguments, report.make)
