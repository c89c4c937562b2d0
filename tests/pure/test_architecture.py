"""docs/architecture.md speaks of the code as it is: every name in it exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`([a-z_/]+\.py):([A-Za-z_.]+)`", PAGE)))


def defined_in(path: Path) -> set[str]:
    """Return the names that a module defines, and its classes' as Class.name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {
                f"{node.name}.{inner.name}"
                for inner in getattr(node, "body", [])
                if isinstance(inner, ast.FunctionDef)
            }
    return found


def test_the_page_names_code():
    assert len(NAMES) > 25


@pytest.mark.parametrize("file, name", NAMES)
def test_every_name_on_the_page_exists(file, name):
    assert name in defined_in(ROOT / "asgd_mpi" / file)


def test_every_room_is_on_the_page():
    rooms = {
        path.name
        for path in (ROOT / "asgd_mpi").iterdir()
        if not path.name.startswith("__") and any(path.glob("*.py"))
    }
    assert rooms == set(re.findall(r"^\| `([a-z]+)/`", PAGE, re.MULTILINE))
