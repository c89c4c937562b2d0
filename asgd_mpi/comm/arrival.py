"""What a server takes out of its inbox, and tells the servers of further slices: plain records, without MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from asgd_mpi.protocol.messages import Header, Verdict
from asgd_mpi.vector.codec import Vector

WEIGHTS = "weights"  # the name of a vector, beside those of the rule's state


@dataclass(frozen=True)
class Arrival:
    """A received packet. Its payload is valid until the arrival is released, and one of the two."""

    worker: int
    header: Header | None  # None if it could not be read: then `fault` says why
    gradient: Vector  # (P,)
    statistics: torch.Tensor  # float32
    fault: str = ""


class Applied(msgspec.Struct):
    """A gradient that is to be applied."""

    packet: int
    verdict: Verdict


class Command(msgspec.Struct, omit_defaults=True):
    """What a slice server is to do, in the order in which rank 0 does it."""

    # stay: nothing is to be done, and rank 0 lives
    kind: Literal["publish", "apply", "read", "give", "stay", "end", "leave"]
    # publish, apply: of the next snapshot; read: of one in the ring
    version: int = 0
    samples: int = 0  # publish, apply: its sample clock
    applied: list[Applied] = []  # apply: one after the other; with none nothing is published
    refused: list[int] = []  # apply: workers whose gradients are not applied
    worker: int = 0  # read: it computes on that snapshot
    names: list[str] = []  # give: vectors
