"""What --run.inject asks for, failures on purpose: `--inject "kill@t=30s:rank1,slow:3x@rank4"`.

slow:3x@rank4          every step of rank 4 takes 3 times as long
raise@step200:rank2    rank 2 raises at its 200th step (worker: a batch; server, rank 0: a pass of applying)
nan@step50:rank3       a gradient that is not finite; nan:5@... five in a row
kill@t=30s:rank1       SIGKILL, 30 s after the start of training, wherever the rank is then
term@..., stop:10s@... SIGTERM; SIGSTOP, and SIGCONT after 10 s
stall:60s@step9:rank1  the step takes 60 s longer
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from asgd_mpi.errors import ConfigError

NUMBER = r"[0-9]{1,9}(?:\.[0-9]{0,9})?"
ENTRY = re.compile(
    rf"(?P<kind>[a-z]+)(?::(?P<amount>{NUMBER})(?:s|x)?)?"
    rf"@(?:(?:step(?P<step>[0-9]{{1,9}})|t=(?P<t>{NUMBER})s?):)?rank(?P<rank>[0-9]{{1,9}})"
)
# default amounts
KINDS = {
    "slow": 3.0,
    "raise": 0.0,
    "nan": 1.0,
    "kill": 0.0,
    "term": 0.0,
    "stop": 10.0,
    "stall": 60.0,
}


@dataclass(frozen=True)
class Failure:
    """One entry; either `step` or `t`, or neither: then from the start on."""

    kind: str
    rank: int
    amount: float  # times, seconds or steps
    step: int | None = None
    t: float | None = None  # seconds


def parse(text: str) -> list[Failure]:
    """Read the value of --inject. Raises ConfigError."""
    return [_parse(entry.strip()) for entry in text.split(",") if entry.strip()]


def _parse(entry: str) -> Failure:
    found = ENTRY.fullmatch(entry)
    if not found or found["kind"] not in KINDS:
        raise ConfigError(
            f"--run.inject {entry}: give KIND@stepN:rankR, KIND@t=SECONDSs:rankR or slow:FACTORx@rankR, with one "
            f"of {', '.join(KINDS)}; several with commas between them."
        )
    kind = found["kind"]
    if (
        kind == "slow"
        and (found["step"] or found["t"])
        or kind in ("nan", "stall", "raise")
        and not found["step"]
    ):
        why = "slow is from the start on" if kind == "slow" else f"{kind} needs a step"
        raise ConfigError(f"--run.inject {entry}: {why}.")
    amount = float(found["amount"] or KINDS[kind])
    if kind == "slow" and amount < 1:
        raise ConfigError(
            f"--run.inject {entry}: a step can be made slower only; give a factor of 1 or more."
        )
    return Failure(
        kind,
        int(found["rank"]),
        amount,
        int(found["step"]) if found["step"] else None,
        float(found["t"]) if found["t"] else None,
    )
