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


MOST_PARAMETERS = 8
# dataclasses of plain data: they are made by the names of their fields, or all from defaults, and do nothing
PLAIN_DATA = {
    "config/options.py": "a field is an option, or a setting of a recipe",
    "config/resolved.py": "a field is an option that has been filled in",
    "config/rulebook.py:Entry": "a field is a property of a rule",
    "offline/forecast.py:Costs": "a field is a measured cost",
    "offline/simulation.py:_Worker": "the state of a simulated worker, nearly all from defaults",
    "protocol/ledger.py": "a field is a number of the plan, or of an account, which is all from defaults",
    "protocol/messages.py": "a field is a number that travels",
    "record/timeline.py:_Bin": "sums, all from defaults",
    "runtime/findings.py": "a field is an answer to the doctor",
}


def takes_parameter(field: ast.stmt) -> bool:
    """Return whether a statement in the body of a dataclass is a field that its constructor takes."""
    if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
        return False
    return "init=False" not in ast.unparse(field)


def num_parameters(cls: ast.ClassDef) -> int:
    """Return how many parameters the constructor of a class takes, that it defines or that its fields make."""
    for inner in cls.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            asked = inner.args
            return len(asked.posonlyargs + asked.args + asked.kwonlyargs) - 1
    if any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list) or any(
        ast.unparse(base) == "NamedTuple" for base in cls.bases
    ):
        return sum(takes_parameter(field) for field in cls.body)
    return 0


def constructors() -> dict[str, int]:
    """Return the number of parameters of every constructor, by "room/module.py:Class"."""
    package = ROOT / "asgd_mpi"
    return {
        f"{path.relative_to(package).as_posix()}:{node.name}": num_parameters(node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def test_no_constructor_takes_more_than_8_parameters_but_of_plain_data():
    many = {name: number for name, number in constructors().items() if number > MOST_PARAMETERS}
    plain = {name for name in many if {name, name.partition(":")[0]} & PLAIN_DATA.keys()}
    assert not {name: number for name, number in many.items() if name not in plain}
    excused = {name for name in PLAIN_DATA if any(one.startswith(name) for one in plain)}
    assert excused == PLAIN_DATA.keys()  # none without need
