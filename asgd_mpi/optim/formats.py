"""In which formats the vectors of a network travel under the options of a run. Pure."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch import nn

from asgd_mpi.config.options import ExchangeConfig
from asgd_mpi.vector.flat import num_floats, ranges_below
from asgd_mpi.vector.largest import CHUNK
from asgd_mpi.vector.vector_format import VectorFormat

# of a chunk, where the density warms up: 25 %, 6.25 %, 1.6 %, ... (Lin et al. 2018, section 3.3)
FIRST_KEPT = CHUNK // 4


def push_format(exchange: ExchangeConfig, module: nn.Module) -> VectorFormat:
    """Return how a network's gradient is pushed."""
    form = VectorFormat(num_floats(module), exchange.wire)
    if not form.is_compressed:
        return form
    most = 0
    if exchange.wire == "topk":
        most = kept_of(exchange.density)
        if exchange.density_warmup_epochs:
            most = max(most, FIRST_KEPT)
    return VectorFormat(form.num_floats, exchange.wire, ranges_below(module, CHUNK), most)


def fetch_format(wire: str, module: nn.Module) -> VectorFormat:
    """Return how a network's weights are fetched, of `--exchange.fetch_wire`."""
    form = VectorFormat(num_floats(module), wire)
    return replace(form, small=ranges_below(module, CHUNK)) if form.is_compressed else form


def kept_of(density: float) -> int:
    """Return how many numbers of a chunk are sent of a share of them: 1 at least."""
    return max(1, -int(-Fraction(density) * CHUNK // 1))


def kept_at(exchange: ExchangeConfig, samples: int, samples_per_epoch: int) -> int:
    """Return how many numbers of a chunk a push on a snapshot of this sample clock sends; 0 if not topk.

    While the density warms up it is divided by 4 again and again, for equal times.
    """
    if exchange.wire != "topk":
        return 0
    kept, warmup = (
        kept_of(exchange.density),
        round(exchange.density_warmup_epochs * samples_per_epoch),
    )
    if samples >= warmup:
        return kept
    steps = [FIRST_KEPT >> 2 * step for step in range(6) if FIRST_KEPT >> 2 * step > kept] or [kept]
    return steps[samples * len(steps) // warmup]
