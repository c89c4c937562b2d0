"""Where a run goes on: its newest whole checkpoint, and whether the command asks for the same run.

No MPI. `find` reads the run directory, `demand_same` compares settings, `describe` says what comes back and what is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from asgd_mpi.config.options import Config, options, settings
from asgd_mpi.config.topology import SERVER
from asgd_mpi.errors import ConfigError, RunDirError, few
from asgd_mpi.optim.local_state import INNER_STEPS
from asgd_mpi.optim.momentum import STEPS
from asgd_mpi.protocol.ledger import Ledger, LedgerError, Plan
from asgd_mpi.record import checkpoint, history
from asgd_mpi.record.checkpoint import Manifest, software
from asgd_mpi.record.events import FLUSHED_S, End, Push, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.unit import counted
from asgd_mpi.vector.flat import num_floats


_ANOTHER = (
    "It is not what this run has saved: remove that checkpoint to go on from the one before it."
)


@dataclass(frozen=True)
class Point:
    """What a run goes on from; no `directory`: from its beginning."""

    restart: int  # the number of the new start
    directory: Path | None
    manifest: Manifest | None
    damaged: tuple[str, ...] = ()  # newer checkpoints that cannot be used, and why

    @property
    def version(self) -> int:
        return self.manifest.version if self.manifest else 0

    @property
    def ledger(self) -> dict | None:
        if self.directory:
            return checkpoint.read_ledger(self.directory)
        return None

    @property
    def parent(self) -> int:
        if self.manifest:
            return self.manifest.restart
        return max(0, self.restart - 1)


def find(run: RunDir, demand_record: bool = False) -> Point:
    """Return the newest checkpoint that is whole, read to its last byte, and with `demand_record` all its pushes are on record.

    Raises RunDirError if there are checkpoints, and none of them will do.
    """
    restart, damaged, has_gaps = run.next_restart, [], False
    for directory, _ in checkpoint.resumable(run):
        try:
            manifest = checkpoint.verify(directory)
            checkpoint.read_ledger(directory)
            gap = ""
            if demand_record:
                gap = history.gap(
                    run, manifest.restart, manifest.version, manifest.momenta.values()
                )
            if gap:
                has_gaps = True
                damaged.append(
                    f"{directory} is whole, but the record of how it was made is not ({gap}): neither a replay nor "
                    "an audit could show it"
                )
            else:
                return Point(restart, directory, manifest, tuple(damaged))
        except RunDirError as error:
            damaged.append(str(error))
    if damaged:
        if has_gaps:
            remedy = (
                "Go on without that record by --run.accept_gaps true: audit and replay of this run then fail for good. Or "
                "begin a new run from the weights, --model.weights FILE."
            )
        else:
            remedy = "Begin again in another run directory."
        raise RunDirError("\n".join([f"{run.path} holds no whole checkpoint:", *damaged, remedy]))
    return Point(restart, None, None)


def demand_same(old: Config, new: Config) -> list[str]:
    """Return what differs and may; raises ConfigError naming both values of what may not."""
    before, after = settings(old), settings(new)
    free, fixed = options("free"), options("fixed")
    override = [name.strip() for name in new.run.override.split(",") if name.strip()]
    unknown = [name for name in override if name not in after]
    if unknown:
        raise ConfigError(
            f"--run.override {','.join(unknown)}: there is no such setting; give names such as schedule.lr."
        )
    changed = [name for name in after if before.get(name) != after[name] and name not in free]
    refused = [name for name in changed if name in fixed or name not in override]
    if refused:
        raise ConfigError(
            "\n".join(
                [
                    "the run to be resumed was started with other settings:",
                    *(
                        f"  --{name} was {before.get(name)!r}, is {after[name]!r}"
                        + (f": {fixed[name]}" if name in fixed else "")
                        for name in refused
                    ),
                    "Leave them out to go on as before; name those that are meant: --override "
                    + (
                        ",".join(name for name in refused if name not in fixed)
                        or "cannot help here"
                    )
                    + ".",
                ]
            )
        )
    return [f"{name}: {before.get(name)!r} -> {after[name]!r}" for name in changed]


def kept_from_before(given: Mapping[str, object], config: Config) -> list[str]:
    """Return which options a script or a task gives in vain: `config` is that of a run that goes on, and has others."""
    own, defines = settings(config), options("defines")
    return [
        f"{name} stays {own[name]!r}, as the run was started; the script says {value!r} (to change it: --{name} {value} --override {name})"
        for name, value in given.items()
        if name in defines and own[name] != value
    ]


def demand_same_data(manifest: Manifest, fingerprint: str, num_classes: int, path: str) -> None:
    """Raises ConfigError if the data set is not the one that the checkpoint was trained on."""
    if num_classes != manifest.num_classes:
        raise ConfigError(
            f"the checkpoint was trained on {manifest.num_classes} classes, {path} has {num_classes}: its last "
            "layer does not fit. Give the data set of the run with --data.path."
        )
    if fingerprint != manifest.data:
        raise ConfigError(
            f"the checkpoint was trained on the data set with fingerprint {manifest.data}, {path} has "
            f"{fingerprint}: which images were used is no longer known. Give the data set of the run with "
            "--data.path, or begin a new run with --model.weights for these weights."
        )


def demand_samples_left(point: Point, plan: Plan) -> None:
    """Raise ConfigError if more has been trained, or lent, than the run is now to have; RunDirError if the ledger cannot be."""
    state, num_samples = point.ledger, plan.num_samples
    if (lent := state["lent"]) > plan.total_samples:
        raise ConfigError(
            f"--run.epochs {plan.total_samples / num_samples:g} is less than has been done: at version {point.version} "
            f"{point.manifest.samples} images are trained and {lent} are given out, {lent / num_samples:.3g} epochs. What is "
            f"trained cannot be taken back: ask for {-(-lent // num_samples)} epochs or more, or begin a new run."
        )
    try:
        ledger = Ledger(plan, lambda samples, staleness: 0.0, state)
    except LedgerError as error:
        raise RunDirError(f"{point.directory / checkpoint.LEDGER}: {error}. {_ANOTHER}") from error
    manifest = point.manifest
    if (ledger.version, ledger.samples) != (manifest.version, manifest.samples):
        raise RunDirError(
            f"{point.directory / checkpoint.LEDGER} is of version {ledger.version} after {ledger.samples} images, and the manifest "
            f"beside it of version {manifest.version} after {manifest.samples}. {_ANOTHER}"
        )


def other_software(manifest: Manifest) -> str:
    """Return which versions differ from those that wrote a checkpoint, and what it means; empty if none does."""
    here = software()
    differ = [
        f"{name} {then} then, {here[name]} now"
        for name, then in manifest.software.items()
        if name in here and then != here[name]
    ]
    return (
        differ
        and (
            f"another version than that which wrote the checkpoint ({'; '.join(differ)}): training goes on, but the "
            "arithmetic of two versions may differ in the last bits, so that one replay of the whole run may not give "
            "the same weights to the bit"
        )
        or ""
    )


def demand_same_trained(point: Point, module: nn.Module, carried: Collection[str]) -> None:
    """Raises ConfigError unless the checkpoint has vectors of what `module` trains, and the frozen parameters that it has.

    carried: the names of what the forward pass moves.
    """
    again = f"Begin a new run with --model.weights {point.directory}."
    _demand_state_of(point, module)
    own = dict([*module.named_parameters(), *module.named_buffers()])
    others = {checkpoint.MODEL, checkpoint.EMA_MODEL, checkpoint.LEDGER}
    for name in sorted(point.manifest.files.keys() - others):
        path = point.directory / name
        for key, vector in checkpoint.read_tensors(path, is_mapped=True).items():
            if key in carried:
                _demand_like(path, key, vector, own[key])
                continue
            if key in (INNER_STEPS, STEPS):
                _demand_like(path, key, vector, torch.zeros(1, dtype=torch.int64))
                continue
            size = num_floats(module)
            if isinstance(vector, torch.Tensor) and vector.ndim == 1 and len(vector) != size:
                raise ConfigError(
                    f"{path} holds {len(vector)} numbers of {key}, but the network trains "
                    f"{size}: other parameters are frozen (requires_grad=False) than before. {again}"
                )
            _demand_like(path, key, vector, torch.empty(size, device="meta"))
            _demand_finite(path, key, vector)
    frozen = {
        name: p
        for name, p in module.named_parameters()
        if not p.requires_grad and name not in carried
    }
    if frozen:
        state = checkpoint.read_tensors(point.directory / checkpoint.MODEL, is_mapped=True)
    else:
        state = {}
    if others := [
        name for name, p in frozen.items() if name not in state or not torch.equal(state[name], p)
    ]:
        raise ConfigError(
            f"{point.directory} holds other values of {few(others)}, which the network keeps frozen (requires_grad=False): "
            f"--model.weights, the seed or the network's code, which give them, have changed. {again}"
        )


def _demand_state_of(point: Point, module: nn.Module) -> None:
    """Raise RunDirError unless a checkpoint holds all that a network has, in its shapes, and nothing else."""
    path, own = point.directory / checkpoint.MODEL, module.state_dict()
    state = checkpoint.read_tensors(path, is_mapped=True)
    if state.keys() != own.keys():
        raise RunDirError(
            f"{path} lacks {few(sorted(own.keys() - state.keys())) or 'nothing'} of the network and holds "
            f"{few(sorted(map(str, state.keys() - own.keys()))) or 'nothing'} besides. {_ANOTHER}"
        )
    for name, tensor in own.items():
        if isinstance(tensor, torch.Tensor):  # a module's extra state is what it likes
            _demand_like(path, name, state[name], tensor)
    for name, _ in module.named_parameters():  # a buffer may be a mask of infinities
        _demand_finite(path, name, state[name])


def _demand_like(path: Path, name: object, found: object, due: torch.Tensor) -> None:
    """Raise RunDirError unless something is a tensor of the shape and the type of another one."""
    if not isinstance(found, torch.Tensor):
        raise RunDirError(
            f"{path} holds a {type(found).__name__} as {name}, where a tensor is due. {_ANOTHER}"
        )
    if found.shape != due.shape or found.dtype != due.dtype:
        raise RunDirError(
            f"{path} holds {name} as {found.dtype} of shape {tuple(found.shape)}, where {due.dtype} of shape "
            f"{tuple(due.shape)} is due. {_ANOTHER}"
        )


def _demand_finite(path: Path, name: str, found: torch.Tensor) -> None:
    """Raise RunDirError for numbers that no run saves: whatever is trained on them is not finite either."""
    if not torch.isfinite(found).all():
        raise RunDirError(f"{path} holds numbers in {name} that are not finite. {_ANOTHER}")


def lost_pushes(run: RunDir, point: Point) -> list[Push]:
    """Return what was applied after the checkpoint, as far as it was written down."""
    return [push for push in history.pushes(run) if push and push.version >= point.version]


def describe(
    run: RunDir, point: Point, num_workers: int | None, total_samples: int
) -> Iterator[str]:
    """Yield what will be restored, and what is lost, line by line."""
    for text in point.damaged:
        yield f"warning: {text}"
    lost = lost_pushes(run, point)
    if point.manifest is None:
        yield f"{run.path} has no checkpoint yet: it begins again at version 0 (start {point.restart})"
    else:
        manifest, ledger = point.manifest, point.ledger
        yield (
            f"{run.path} goes on at version {manifest.version}, {manifest.samples} of {total_samples} samples "
            f"({100 * manifest.samples / total_samples:.1f} %), from {point.directory} (start {point.restart})"
        )
        if other := other_software(manifest):
            yield f"warning: {other}"
        again = sum(stop - start for work, _, start, stop in ledger["todo"] if work == 1)
        yield f"restored: weights, {_what(manifest)}, sample clock; {again} samples that were lent are lent again"
        kept = set(manifest.momenta)
        if kept and num_workers is not None and num_workers != manifest.num_workers:
            yield (
                f"{counted(num_workers, 'workers')} in place of {manifest.num_workers}: the momentum of "
                f"{len([w for w in kept if int(w) >= num_workers])} is dropped, "
                f"{max(0, num_workers - len(kept))} begin without"
            )
    samples = sum(push.positions for push in lost)
    if _has_closed_books(run, point.restart - 1):
        unwritten = ""
    else:
        unwritten = f", those of the last {FLUSHED_S:g} s or so, which were not yet written down when that start was killed,"
    yield (
        f"lost: {counted(len(lost), 'pushes')} ({counted(samples, 'samples')}) that are on record after that{unwritten} and those in flight; their samples "
        "are trained again"
    )


def _has_closed_books(run: RunDir, restart: int) -> bool:
    """Return whether rank 0 came to its end in a start, so that all that it applied is on record."""
    try:
        return any(isinstance(event, End) for event in read_events(run.metrics_of(SERVER, restart)))
    except OSError:
        return False


def _what(manifest: Manifest) -> str:
    parts = (
        [f"the momentum of {counted(len(manifest.momenta), 'workers')}"] if manifest.momenta else []
    )
    parts += ["the rule's state"] if checkpoint.SERVER in manifest.files else []
    return ", ".join(parts) or "no momentum (none was kept)"
