"""What the documents show of what a command prints: each line's form is compared with what the program prints."""

import re
from pathlib import Path

# what differs from run to run: where the run lies, how long is left, the name of a GPU, any number
VARIES = r"\S+_digits_cnn|(?:\d+ min )?\d+ s left|\(NVIDIA [^)]*\)|\d[\d.,]*"
PUT_IN = r"(?:\S+ min \S+ s left|\S+ s left|\(\w+, \S+\)|\S+)"


def blocks(page: Path) -> list[str]:
    """Return the blocks of a page that are in no language: what a program prints."""
    parts = re.split(r"^ *```(\w*)\n", page.read_text(), flags=re.MULTILINE)
    # text, then language, block, "", text, ...: a fence that closes has no language
    return [block for language, block in zip(parts[1::4], parts[2::4]) if not language]


def not_printed(block: str, printed: str, names: str = VARIES) -> list[str]:
    """Return the lines of a block that have not the form of any line that was printed; what matches `names` may be any word."""
    lines = [line for line in block.splitlines() if line.strip() not in ("", "...")]
    return [line for line in lines if not re.search(pattern(line, names), printed, re.MULTILINE)]


def pattern(line: str, names: str = VARIES) -> str:
    """Return an expression for lines of the form of one."""
    fixed = re.split(f"{names}|{VARIES}", line.strip())
    # columns are as wide as what stands in them, so any spaces will do for some
    return "^ *" + PUT_IN.join(r"\s+".join(map(re.escape, re.split(" +", part))) for part in fixed)
