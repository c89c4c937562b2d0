"""The rooms of the package: which may know which."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "asgd_mpi"
# A room may import from those before it in this list, and from itself.
ORDER = ["errors", "bounded", "plausible", "ending", "signals", "launch", "local", "segments", "inject", "server.pace", "server.rulebook", "limits", "command_line", "config", "topology", "gpus",
         "forecast", "record.disk", "record.rundir", "trust", "record.ranklog", "record.events", "record.metrics", "record.starts", "record.history", "record.audit", "record.timeline",
         "record.readings", "record.validations", "record.pipelines", "record.summary", "record.nvml", "record.board",
         "record.meter", "record.watch", "record.progress", "record.tensors", "record.checkpoint", "data", "model", "stages",
         "server.claims", "server.ledger", "server.losses", "server.versions", "server.slices", "server.rules", "server.finite", "server.schedule", "server.stability", "exchange", "server.saver", "server.serve", "server.fellow", "worker", "images", "task", "preflight",
         "resume", "report", "evaluate", "computation", "simulation", "replay", "supervise", "plan", "simulate", "poc",
         "prepare", "crew", "train", "findings", "doctor", "__main__"]


def place(module: str) -> int | None:
    """The position in ORDER of a module such as `asgd_mpi.server.ledger`."""
    name = module.removeprefix("asgd_mpi.")
    return next((i for i, room in enumerate(ORDER) if name == room or name.startswith(room + ".")), None)


def imports(path: Path):
    """(module, whether for type hints only) for each import."""
    tree = ast.parse(path.read_text())
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    hinted = {id(child) for node in hints for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in hinted) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if place(whole) is not None else node.module, id(node) in hinted


def modules():
    return [(path, ".".join(["asgd_mpi", *path.relative_to(PACKAGE).with_suffix("").parts]))
            for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and path.stem != "local"]


def test_every_module_imports_only_from_rooms_before_it():
    for path, name in modules():
        assert place(name) is not None, f"{name} has no place in ORDER: give it one"
        for module, for_hints in imports(path):
            if module.startswith("asgd_mpi.") and not for_hints:
                assert place(module) is not None and place(module) <= place(name), f"{name} imports {module}"


def test_mpi4py_is_imported_in_the_exchange_only():
    where = {name for path, name in modules() for module, _ in imports(path) if module.split(".")[0] == "mpi4py"}
    assert where and all(name.startswith("asgd_mpi.exchange.") for name in where)


def test_the_decisions_of_the_server_and_the_order_of_the_stages_are_pure():
    for name in ("server/claims", "server/ledger", "server/losses", "server/versions", "server/pace", "server/rulebook", "server/schedule", "stages/balance", "stages/schedule"):
        path = PACKAGE / f"{name}.py"
        assert not {module.split(".")[0] for module, for_hints in imports(path) if not for_hints} & {
            "torch", "time", "mpi4py", "numpy", "random"}, name
