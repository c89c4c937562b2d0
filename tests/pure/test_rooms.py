"""The rooms of the package: what each may import, in one line a room; type hints are imports like others."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "asgd_mpi"
VERBS = [
    "train",
    "evaluate",
    "export",
    "replay",
    "simulate",
    "plan",
    "poc",
    "doctor",
    "launch",
    "local",
    "segments",
    "stop",
    "slurm_scripts",
    "completion",
]

# From the ground up: a room may import from those named beside it, which stand above it in this list, and from itself.
MAY_IMPORT = {
    "errors": "",
    "process": "errors",
    "untrusted": "",
    "local": "process",
    "segments": "process",
    "slurm_scripts": "errors process",
    "protocol": "",
    "config": "errors untrusted protocol",
    "record": "errors process untrusted protocol config",
    "stop": "errors process config record",
    "completion": "process config",
    "model": "errors config record",
    "data": "errors untrusted config model",
    "vector": "errors model",
    "pipeline": "errors model",
    "optim": "errors protocol config record model data vector pipeline",
    "comm": "errors process protocol config vector",
    "task": "errors protocol config model data vector pipeline optim",
    "runtime": "errors process untrusted protocol config record model data vector pipeline optim comm task",
    "offline": "errors protocol config record model data vector optim task",
    "report": "errors process untrusted config record offline",
    "api": "errors process config record vector task runtime offline report",
    "launched": "errors process config record task api",
    "launch": "errors process launched",
    "evaluate": "errors process config record model data vector optim task runtime report",
    "export": "errors process config record model task runtime",
    "plan": "errors process config record model runtime offline report",
    "replay": "errors api process untrusted protocol config record vector optim task runtime offline",
    "simulate": "errors process config record task runtime offline report plan",
    "poc": "errors process untrusted config record task runtime report",
    "train": "errors process comm runtime offline report launched",
    "doctor": "errors process config model vector optim comm task runtime",
}
PURE = {
    "protocol": "torch numpy mpi4py time random os socket threading",
    "config": "torch numpy mpi4py time random",
}
ONLY_IN = {"mpi4py": {"comm"}}


def room_of(name: str) -> str:
    """Return the room of a dotted name such as `asgd_mpi.protocol.ledger.Plan`; '' for the package itself."""
    first = name.removeprefix("asgd_mpi").lstrip(".").split(".")[0]
    return first if first in MAY_IMPORT else ""


def modules() -> list[tuple[Path, str]]:
    """Return (file, room) of every module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((path, "" if parts[0].startswith("__") else parts[0]))
    return found


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_a_line_and_stands_above_what_it_may_not_import():
    assert {room for _, room in modules()} - {""} == set(MAY_IMPORT)
    for number, (room, others) in enumerate(MAY_IMPORT.items()):
        assert set(others.split()) <= set(list(MAY_IMPORT)[:number]), (
            f"{room} may import a room that stands below it: a circle"
        )


def test_every_room_imports_only_from_the_rooms_of_its_line():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in modules()
        if room
        for name in imports(path)
        if name.startswith("asgd_mpi.")
        and room_of(name) not in {"", room, *MAY_IMPORT[room].split()}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_line_names_a_room_that_is_not_imported():
    used = {
        room: {
            room_of(name)
            for path, here in modules()
            if here == room
            for name in imports(path)
            if name.startswith("asgd_mpi.")
        }
        for room in MAY_IMPORT
    }
    assert {room: set(others.split()) - used[room] for room, others in MAY_IMPORT.items()} == {
        room: set() for room in MAY_IMPORT
    }


def test_at_the_root_lie_the_verbs_and_the_public_face_only():
    at_root = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    assert at_root == {*VERBS, "errors", "api"}


def test_the_rooms_of_decisions_are_pure_and_mpi_is_in_one_room():
    for path, room in modules():
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & set(PURE.get(room, "").split()), (
            f"{path.relative_to(PACKAGE)} is to be pure"
        )
        for package, rooms in ONLY_IN.items():
            assert package not in top or room in rooms, (
                f"{path.relative_to(PACKAGE)} imports {package}"
            )
