"""The audit of a run as plain text: which samples of each epoch were due, used, repeated, missing, and whether all is well.

In: a `Summary`. Out: an `Account`, one line an epoch, also for epochs that were due and never begun. Violated is what
`record.audit` calls so, and besides: nothing on record, the log of a start lost, samples used beyond those due and, of a finished run, samples never
used and lines of `pushes.log` that cannot be read. In a run that did not finish, missing samples are those still to come.
"""

from __future__ import annotations

from dataclasses import dataclass

from asgd_mpi.errors import one_line
from asgd_mpi.record.summary import Summary
from asgd_mpi.report import units

CLAIMS = (
    "every version was made by exactly one push, in one order",
    "no gradient was computed on weights newer than itself or, without overlap, older than its worker's last push",
    "no sample was used twice in an epoch",
    "no sample was left out",
)


@dataclass(frozen=True)
class EpochAccount:
    """Samples of one epoch: used counts each once, repeated the uses beyond the first; used + missing == due + beyond."""

    epoch: int
    due: int
    used: int
    repeated: int
    missing: int
    beyond: int  # used, and not due: past the end of the epoch or of the run


@dataclass(frozen=True)
class Account:
    name: str
    epochs: list[EpochAccount]
    claims: tuple[str, ...]  # those that were checked
    violations: list[str]
    is_over: bool  # the run finished: every sample is due
    text: str


def account(summary: Summary, gap: str = "") -> Account:
    """Check one run; `gap`: where its log has a hole (`history.gap`)."""
    is_over = summary.status == "finished"
    epochs = _epochs(summary)
    violations = [*summary.audit.violations, *(one.removesuffix(".") for one in summary.lost_logs)]
    missing = sum(epoch.missing for epoch in epochs)
    violations += [
        f"epoch {row.epoch}: {row.beyond:,} samples used that were not due"
        for row in epochs
        if row.beyond
    ]
    # a start that was killed may have cut its last line; that it is not missed shows in the versions
    unreadable = 0
    if len(summary.restarts) < 2:
        unreadable = summary.unreadable_lines.get("pushes.log", 0)
    if not summary.audit.num_pushes:
        violations.append("there is no applied push on record, so nothing can be shown")
    elif is_over and missing > summary.given_up:
        violations.append(
            f"the run finished, and {missing:,} samples that were due were never used"
        )
    if is_over and unreadable:
        violations.append(
            f"{unreadable} unreadable line{'s' * (unreadable > 1)} in pushes.log of a finished run"
        )
    elif is_over and gap:
        violations.append(gap)
    claims = CLAIMS if is_over else CLAIMS[:-1]
    return Account(
        summary.name,
        epochs,
        claims,
        violations,
        is_over,
        _text(summary, epochs, claims, violations, is_over),
    )


def _epochs(summary: Summary) -> list[EpochAccount]:
    seen = {epoch.epoch: epoch for epoch in summary.audit.epochs}
    length, total = summary.num_samples, summary.total_samples
    found = []
    num_due = 0
    if length:
        num_due = -(-total // length)
    for number in sorted({*seen, *range(num_due)}):
        due = max(0, min(length, total - number * length))
        if number not in seen:
            found.append(EpochAccount(number, due, 0, 0, due, 0))
            continue
        used, missing = seen[number].covered, seen[number].missing
        # of a record that does not say: up to the largest seen
        if not length:
            due = used + missing
        found.append(
            EpochAccount(number, due, used, seen[number].repeated, missing, used + missing - due)
        )
    return found


def _text(
    summary: Summary,
    epochs: list[EpochAccount],
    claims: tuple[str, ...],
    violations: list[str],
    is_over: bool,
) -> str:
    lines = [
        f"{summary.name}: {summary.outcome}; {units.workers(summary.crews)}, {units.count(summary.audit.num_pushes, 'push', 'pushes')}",
        "",
        f"{'epoch':>8}{'due':>12}{'used':>12}{'repeated':>12}{'missing':>12}",
    ]
    total = [
        sum(column)
        for column in zip(*((row.due, row.used, row.repeated, row.missing) for row in epochs))
    ] or [0] * 4
    rows = [(f"{row.epoch}", (row.due, row.used, row.repeated, row.missing)) for row in epochs]
    lines += [
        f"{name:>8}" + "".join(f"{number:>12,}" for number in numbers)
        for name, numbers in [*rows, ("all", total)]
    ]
    if summary.skipped_images:
        lines.append(
            f"of those used, {summary.skipped_images:,} were damaged {summary.unit}, left out and counted"
        )
    if summary.given_up:
        lines.append(
            f"of those missing, {summary.given_up:,} were given up: their gradient was never finite"
        )
    if not is_over:
        lines.append(
            "the run is not finished: missing samples are still to come, or were lent and not applied"
        )
    lines += ["", "checked:", *(f"  {claim}" for claim in claims)]
    if violations:
        lines.append("VIOLATED: do not trust the weights of this run before the cause is known")
        lines += [f"  {one}" for one in violations]
    else:
        lines.append("all of it holds")
    return "".join(f"{one_line(line)}\n" for line in lines)
