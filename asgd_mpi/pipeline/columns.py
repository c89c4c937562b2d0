"""A network in two columns (see model.columns), each on a rank of its own: both work on the same images at the same time.

    images (b, C, S, S) -> column 0 | column 1 -> maps of both -> column 0 | column 1 -> ... -> head -> scores (b, classes)

Krizhevsky et al. 2012, figure 2. At a cross-over each column gives the other its maps, and goes on with those of both; on
the way back it gives the other the gradient that it has of the other's maps, and adds what it gets to what it has of its
own. The head is the second column's. The gradient is that of the uncut network, to the bit: the operations and their shapes
are the same, a sum of two does not depend on their order, and both columns draw the same dropout of all maps, each for
itself, from the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from asgd_mpi.errors import ConfigError
from asgd_mpi.model.columns import TwoColumns
from asgd_mpi.pipeline.graph import on_meta
from asgd_mpi.pipeline.pipeline import Link, LocalChannel, TwoWays, Work, run_in_turn_
from asgd_mpi.pipeline.plan import Row
from asgd_mpi.pipeline.schedule import Step, by_segments
from asgd_mpi.model.trained import trained


class Segments(nn.Module):
    """What one rank computes of each segment: dropout of all maps, then what is its own."""

    def __init__(self, drops: Sequence[nn.Module], own: Sequence[nn.Module]):
        super().__init__()
        self.drops, self.own = nn.ModuleList(drops), nn.ModuleList(own)


@dataclass(frozen=True)
class Column:
    """What rank `number`, 0 or 1, of a replica computes; the second one has a segment more than num_pairs, the head."""

    module: Segments
    number: int
    num_pairs: int

    def crossed(self, segment: int, own: torch.Tensor | None, theirs: torch.Tensor) -> torch.Tensor:
        """Return what both columns take in a segment: the maps of both, or in the first one the images."""
        if own is not None and own.shape != theirs.shape:
            raise RuntimeError(
                f"column {self.number} gives {tuple(own.shape)}, and the other one {tuple(theirs.shape)}"
            )
        if own is None:
            maps = theirs
        else:
            columns = [theirs, own] if self.number else [own, theirs]
            maps = torch.cat(columns, 1)
        return self.module.drops[segment](maps)


def columns_of(module: nn.Module) -> list[Column]:
    """Its two columns. Raises ConfigError if it is not drawn so."""
    if not isinstance(module, TwoColumns):
        raise ConfigError(
            "--stages.cut columns: the network is not drawn in columns. alexnet2 is, and so is a network of "
            "yours that is an asgd_mpi.model.columns.TwoColumns. Take --stages.cut chain for any other one."
        )
    segments, pairs, drops = list(module.segments), [], [nn.Sequential()]
    last = max(
        (place for place, segment in enumerate(segments) if isinstance(segment, tuple)), default=-1
    )
    for segment in segments[: last + 1]:
        if isinstance(segment, tuple):
            pairs.append(segment)
            drops.append(nn.Sequential())  # the last one stays empty: the head has its own
        else:
            drops[-1].append(segment)
    own = [[pair[number] for pair in pairs if len(pair) == 2] for number in range(2)]
    own[1].append(nn.Sequential(*segments[last + 1 :]))
    _demand(module, pairs, [drop for each in drops for drop in each], own)
    return [Column(Segments(drops, parts), number, len(pairs)) for number, parts in enumerate(own)]


def _demand(
    module: TwoColumns,
    pairs: list[tuple[nn.Module, ...]],
    drops: list[nn.Module],
    own: list[list[nn.Module]],
) -> None:
    """Raise ConfigError unless the columns can be computed apart; `own`: what each rank computes."""
    names = {part: name for name, part in module.named_modules()}

    def demand(holds: bool, reason: str) -> None:
        if not holds:
            raise ConfigError(
                f"--stages.cut columns: of the network's `segments` {reason}. Mend "
                "that, or take --stages.cut chain."
            )

    demand(bool(pairs), "none is a pair of columns: give one as a tuple of two modules")
    for pair in pairs:
        demand(len(pair) == 2, f"one is a tuple of {len(pair)} modules: a pair of columns has 2")
        for part in (part for column in pair for part in column.modules()):
            demand(
                not isinstance(part, _DropoutNd),
                f"{names.get(part, part)} is dropout within a column, whose random "
                "numbers would depend on the other column: put one for the maps of both between two pairs",
            )
    for drop in drops:
        demand(
            isinstance(drop, _DropoutNd),
            f"{names.get(drop, drop)} lies before a pair and is no dropout, so both ranks "
            "would compute it: make it a part of each column",
        )
    first, second = (
        {id(parameter) for part in parts for parameter in part.parameters()} for parts in own
    )
    for name, parameter in module.named_parameters():
        demand(
            id(parameter) not in first & second, f"{name} is used by both ranks: give each its own"
        )


class ColumnAtWork:
    """One column on the parts of one batch; gradients are added to those of its parameters.

    before, after: the link to the other column, which is before the second and after the first one. Steps come in the order
    of schedule.by_segments, so it holds one micro-batch at a time.
    """

    def __init__(self, column: Column, before: Link | None, after: Link | None, work: Work):
        self._column, self._other, self._work = column, before or after, work
        self._taken: list[torch.Tensor] = []  # by each segment so far,
        # ... and what became of it until the next one took it
        self._given: list[torch.Tensor] = []
        # of the last of these, as far as this column knows it
        self._gradient: torch.Tensor | None = None
        self.losses: dict[int, torch.Tensor] = {}  # of the second column

    def can(self, step: Step) -> bool:
        """Return whether what a step needs from the other column is there."""
        if step.is_forward:
            return self._has_images(step) or self._other.activations.has(self._crossing(step))
        return not self._is_shared(step) or self._other.gradients.has(self._crossing(step) + 1)

    def do(self, step: Step) -> None:
        if step.is_forward:
            self._forward(step)
        else:
            self._backward(step)

    def _forward(self, step: Step) -> None:
        column, work, link, segment = self._column, self._work, self._other, step.segment
        if segment == 0:
            work.seed(step.part)
        if self._has_images(step):
            theirs = work.taken(step.part)
            link.activations.put(self._crossing(step), (theirs,))
        else:
            [theirs] = link.activations.take(self._crossing(step))
        with work.autocast():
            own = self._given.pop() if segment else None
            maps = column.crossed(segment, own, theirs)
            taken = maps.detach().requires_grad_(segment > 0)
            given = column.module.own[segment](taken)
            if segment == column.num_pairs:
                given = work.loss(step.part, given)
                self.losses[step.part] = given.detach()
        self._taken.append(taken)
        if segment:
            self._given.append(maps)
        self._given.append(given)
        if self._is_shared(step):
            link.activations.put(self._crossing(step) + 1, (given.detach(),))

    def _backward(self, step: Step) -> None:
        given, taken, gradient, link = (
            self._given.pop(),
            self._taken.pop(),
            self._gradient,
            self._other,
        )
        if self._is_shared(step):
            [theirs] = link.gradients.take(self._crossing(step) + 1)
            # of the head: all of it is the second column's
            if gradient is None:
                gradient = theirs
            else:
                gradient.chunk(2, 1)[self._column.number].add_(theirs)
        if given.requires_grad:
            torch.autograd.backward(given, gradient)
        self._gradient = taken.grad
        if step.segment > 0:
            link.gradients.put(
                self._crossing(step), (taken.grad.chunk(2, 1)[1 - self._column.number],)
            )

    def _has_images(self, step: Step) -> bool:
        return step.segment == 0 and self._column.number == 0

    def _is_shared(self, step: Step) -> bool:
        """Return whether the other column, too, goes on with what this one gives: not so before the head, and there."""
        return step.segment < self._column.num_pairs - self._column.number

    def _crossing(self, step: Step) -> int:
        """Return the number of the cross-over before a segment, the images' included; the one after it has the next."""
        return step.part * (self._column.num_pairs + 1) + step.segment


def put_to_work(
    both: Sequence[Column], work: Work, kind: type[ColumnAtWork] = ColumnAtWork
) -> list[ColumnAtWork]:
    """Both columns in this process."""
    there, back = ([LocalChannel(), LocalChannel()] for _ in range(2))
    first, second = (Link(*map(TwoWays, *ways)) for ways in ((there, back), (back, there)))
    return [kind(both[0], None, first, work), kind(both[1], second, None, work)]


class _Weighed(ColumnAtWork):
    """Notes what backward needs: {id: storage}."""

    def __init__(self, *about: object):
        super().__init__(*about)
        self.saved: dict[int, torch.UntypedStorage] = {}

    @property
    def sent_bytes(self) -> int:
        return sum(ways.sent_bytes for ways in self._other)

    def do(self, step: Step) -> None:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            self.saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            super().do(step)


def rows(module: nn.Module, sample: torch.Tensor, vectors: int) -> list[Row]:
    """Return what each column holds and sends. Raises ConfigError if they cannot be computed apart.

    sample: what the network takes, of which shape and type count, such as images (b, C, S, S). vectors: copies of a column's
    trained parameters that a rank keeps: weights, gradient, and those of the update rule.
    """
    outline = on_meta(module)
    names = {part: name for name, part in outline.named_modules()}
    both = columns_of(outline)
    work = Work(
        lambda part: torch.empty_like(sample, device="meta"),
        lambda part: None,
        lambda part, scores: scores.sum(),
        torch.Generator(),
    )
    at_work = put_to_work(both, work, _Weighed)
    try:
        run_in_turn_(at_work, by_segments(both[0].num_pairs), num_parts=1)
    except RuntimeError as error:
        raise ConfigError(
            f"--stages.cut columns: the columns cannot be computed apart: {error}. Both must give as many "
            "maps of one shape, and neither may write into what it takes (inplace=True)."
        ) from error
    return [_row(column, one, names, vectors) for column, one in zip(both, at_work)]


def _row(column: Column, at_work: _Weighed, names: dict[nn.Module, str], vectors: int) -> Row:
    leaves = [
        part for part in column.module.own.modules() if part in names and not list(part.children())
    ]
    parameters = list(column.module.parameters())
    constant = {
        parameter.untyped_storage()._cdata for parameter in (*parameters, *column.module.buffers())
    }
    held = sum(storage.nbytes() for key, storage in at_work.saved.items() if key not in constant)
    number, num_trained = (
        sum(parameter.numel() for parameter in each)
        for each in (parameters, trained(column.module))
    )
    return Row(
        names[leaves[0]],
        names[leaves[-1]],
        len(leaves),
        number,
        held,
        4 * (number + (vectors - 1) * num_trained) + held,
        at_work.sent_bytes,
        seconds=None,
    )
