"""The colours of the pages: those of Okabe and Ito (2008), which people with any common colour vision tell apart.

`tests/pure/test_page.py` computes their distances as seen without long, middle or short cones, and the contrast of all text.
"""

from __future__ import annotations

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
    "#8a8f98",
)
# of lines and marks: 3:1 or more on a light page and on a dark one
LINES = (BLUE, RED, GREEN, PURPLE)
PHASE_COLOURS = {
    "data": ORANGE,
    "compute": GREEN,
    "push": RED,
    "fetch": PURPLE,
    "validate": SKY,
    "apply": BLUE,
    "servers": YELLOW,
    "checkpoint": "#5b3a1a",
    "idle": "#c3c7cd",
}
BLACK, WHITE = "#000000", "#ffffff"


def _linear(channel: float) -> float:
    """Return the light of a channel of sRGB, 0..1 as it is."""
    if channel <= 0.04045:
        return channel / 12.92
    return ((channel + 0.055) / 1.055) ** 2.4


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, 0..1 (WCAG 2.2)."""
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1..21 (WCAG 2.2); text wants 4.5, a line 3."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour: str) -> str:
    """Return black or white, whichever is read more easily on `colour`."""
    return max(BLACK, WHITE, key=lambda ink: contrast(ink, colour))
