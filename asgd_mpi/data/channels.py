"""The channels of a data set: which of them hold nothing that could be scaled to unit variance.

In: deviations per channel, of images in 0..1. A blue channel that is zero throughout has the deviation 0, and what is
divided by that is no number.
"""

from collections.abc import Sequence

LEAST_DEVIATION = 1e-3  # a quarter of one of 255 levels


def flat_channels(std: Sequence[float]) -> list[int]:
    """Return the numbers of the channels that do not vary, from their deviations."""
    return [number for number, deviation in enumerate(std) if not deviation >= LEAST_DEVIATION]


def note_flat_channels(std: Sequence[float]) -> list[str]:
    """Say which channels do not vary, and what becomes of them."""
    if len(std) == 1:
        names = ["grey"]
    else:
        names = ["red", "green", "blue", *map(str, range(3, len(std)))]
    return [
        f"the channel {names[number]} does not vary (deviation {std[number]:.2g} of 1): it is centred and not scaled"
        for number in flat_channels(std)
    ]
