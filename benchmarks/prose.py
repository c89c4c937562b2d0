"""How the package reads, in figures: `python -m benchmarks.prose`.

One line a folder: functions with a docstring, the share of them that begin with What, Whether, Where, As or Of (3 % at most are
asked; an imperative line says what a function does), lines that are not blank, and conditional expressions (`a if b else c`)
per 1000 of them (20 are asked).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import run

PACKAGE = Path(__file__).parent.parent / "asgd_mpi"
NO_VERBS = ("What", "Whether", "Where", "As", "Of")


@dataclass
class Prose:
    """Counts over the modules of a folder."""

    docstrings: int = 0  # of functions
    without_verb: int = 0  # ... that begin with one of NO_VERBS
    lines: int = 0  # not blank
    conditionals: int = 0  # expressions

    @property
    def share_without_verb(self) -> float:
        return self.without_verb / max(1, self.docstrings)

    @property
    def conditionals_per_1000(self) -> float:
        return 1000 * self.conditionals / max(1, self.lines)

    def add(self, other: Prose) -> None:
        self.docstrings += other.docstrings
        self.without_verb += other.without_verb
        self.lines += other.lines
        self.conditionals += other.conditionals


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Yield (function, its docstring) of all that have one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield node, text


def measure(source: str) -> Prose:
    """Return the figures of one module."""
    tree = ast.parse(source)
    openings = [text.split()[0] for _, text in functions(tree)]
    return Prose(
        len(openings),
        sum(opening in NO_VERBS for opening in openings),
        sum(bool(line.strip()) for line in source.splitlines()),
        sum(isinstance(node, ast.IfExp) for node in ast.walk(tree)),
    )


def by_folder(package: Path = PACKAGE) -> dict[str, Prose]:
    """Return the figures of each folder of the package, "" for its root."""
    found: dict[str, Prose] = defaultdict(Prose)
    for path in sorted(package.rglob("*.py")):
        folder = path.relative_to(package).parts[0] if path.parent != package else ""
        found[folder].add(measure(path.read_text()))
    return dict(found)


def main() -> None:
    folders, total = by_folder(), Prose()
    print(
        f"{'folder':12}{'docstrings':>12}{'no verb':>9}{'lines':>8}{'a if b else c per 1000':>25}"
    )
    for prose in folders.values():
        total.add(prose)
    for name, prose in [*folders.items(), ("all", total)]:
        print(
            f"{name or '(root)':12}{prose.docstrings:12}{prose.share_without_verb:9.1%}{prose.lines:8}"
            f"{prose.conditionals_per_1000:25.1f}"
        )


if __name__ == "__main__":
    run(main)
