"""What manifests of data sets and checkpoints can say of images and classes. Pure; far above what the largest sets have.

Memory is taken by these numbers: a network's last layer by the classes, a batch by the side of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_CLASSES = 1 << 20  # ImageNet-21k has 21,841
MAX_SIDE = 1 << 16  # pixels; shards keep it in 16 bits
MAX_CHANNELS = 1 << 10
MAX_WORKERS = 1 << 16
MAX_EPOCHS = 10**6  # each is a line of an audit


def out_of_range(ranges: Iterable[tuple[str, float, float, float]]) -> str:
    """Return the first of (name, value, least, most) whose value is out of its range, in words; empty if none is."""
    return next(
        (
            f"its {name} is {value}, and can be {least} to {most}"
            for name, value, least, most in ranges
            if not least <= value <= most
        ),
        "",
    )


def impossible_moments(mean: Sequence[float], std: Sequence[float], channels: int) -> str:
    """Return what is wrong with the mean and the deviation of each channel, of images in 0..1; empty if nothing is.

    A deviation of 0 is that of a channel which does not vary (see data.channels).
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            return f"its {name} has {len(values)} numbers for {channels} channels"
        for value in values:
            if not 0 <= value <= 1:  # so is no NaN
                return f"its {name} holds {value}, and of pixels in 0..1 it is 0 to 1"
    return ""
