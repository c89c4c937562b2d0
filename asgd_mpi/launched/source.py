"""Places where ranks import a function or a class of their caller's: a module, the script, or a file, for a notebook's cell.

Nothing is pickled: a rank imports code by its name. What a notebook has defined is written down as source, with what it uses:
modules are imported, functions and classes of the notebook come along, plain values (numbers, texts, and lists, tuples and
dicts of them) are written out. Anything else, such as a tensor, is refused by its name.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from asgd_mpi.errors import ConfigError

WRITTEN = Path("runs/functions")  # for the sources of cells: a replay runs them again
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")


class Place(NamedTuple):
    """The place of an import: `name` in `module`, with `directory` on the path."""

    directory: str
    module: str
    name: str


def located(what: Any) -> Place:
    """Return where ranks import a function or a class. Raises ConfigError."""
    if isinstance(what, str):
        module, _, name = what.partition(":")
        if not name:
            raise ConfigError(f"{what!r} is no name of a function: give module:function.")
        return Place("", module, name)
    name = getattr(what, "__qualname__", "")
    if not name or "<" in name:
        raise ConfigError(
            f"{name or repr(what)} cannot be found by other processes: give a function or a class that a module, a script or a cell "
            "defines at its outermost level, without arguments."
        )
    home = sys.modules.get(what.__module__)
    if what.__module__ != "__main__":
        return Place("", what.__module__, name)
    file = getattr(home, "__file__", None)
    if file:
        script = Path(file).resolve()
        return Place(str(script.parent), script.stem, name)
    return _written(what, vars(home))


def class_of(what: Any) -> type:
    """Return a class itself, or that of an object."""
    if inspect.isclass(what):
        return what
    return type(what)


def demand_made_alike(what: Any) -> None:
    """Raise ConfigError for an object of a class that takes arguments: others make one of the class alone."""
    kind = type(what)
    if not inspect.isclass(what) and inspect.signature(kind).parameters:
        raise ConfigError(
            f"every rank makes a {kind.__name__} of its own, and so do a resume and a replay, and would not know the arguments of this "
            "one: give a class that is made without any."
        )


def _written(what: Any, namespace: dict[str, Any]) -> Place:
    """Write the source of something that a cell defines, and of what it uses, to a file."""
    parts = dict(_parts(what.__name__, namespace, set()))
    call = ""
    if inspect.isfunction(what):
        call = f"if __name__ == '__main__':\n    {what.__name__}()\n"
    imports = [text for text in parts.values() if text.startswith("import ")]
    others = [text for text in parts.values() if not text.startswith("import ")]
    text = "\n\n".join(["\n".join(imports), *others, call]).strip() + "\n"
    directory = WRITTEN / hashlib.sha256(text.encode()).hexdigest()[:12]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{what.__name__}.py").write_text(text, encoding="utf-8")
    return Place(str(directory.resolve()), what.__name__, what.__name__)


def _parts(name: str, namespace: dict[str, Any], done: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of what a name of the notebook stands for, after all that it uses."""
    if name in done or name not in namespace or name.startswith("__"):
        return  # a builtin, a module's own, or something that is not there: the rank says so
    done.add(name)
    value = namespace[name]
    if isinstance(value, ModuleType):
        yield name, f"import {value.__name__} as {name}"
    elif getattr(value, "__module__", "__main__") != "__main__" and _is_found(value):
        yield name, _import_of(name, value)
    elif inspect.isfunction(value) or inspect.isclass(value):
        text = _source(name, value)
        for used in sorted(_names(compile(text, name, "exec"))):
            yield from _parts(used, namespace, done)
        yield name, text
    elif _is_plain(value):
        yield name, f"{name} = {value!r}"
    else:
        raise ConfigError(
            f"{name} is a {type(value).__name__} of this notebook, and ranks are other processes: nothing but functions, classes, "
            f"modules and plain values is taken there. Make {name} within the function that uses it."
        )


def _import_of(name: str, value: Any) -> str:
    outer, _, own = value.__qualname__.rpartition(".")
    assert not outer, value
    return f"import {value.__module__}; {name} = {value.__module__}.{own}"


def _is_found(value: Any) -> bool:
    """Return whether a module has something by its own name."""
    home = sys.modules.get(getattr(value, "__module__", None) or "")
    return home is not None and getattr(home, getattr(value, "__qualname__", ""), None) is value


def _source(name: str, value: Callable | type) -> str:
    """Return the source of a function or a class of the notebook, with its decorators. Raises ConfigError."""
    # a class of a cell has no file; its methods have
    functions = vars(value).values() if inspect.isclass(value) else [inspect.unwrap(value)]
    for code in filter(None, (getattr(one, "__code__", None) for one in functions)):
        lines = linecache.getlines(code.co_filename)
        for node in reversed(ast.parse("".join(lines)).body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                first = min(one.lineno for one in [node, *node.decorator_list])
                return "".join(lines[first - 1 : node.end_lineno]).strip()
    raise ConfigError(
        f"the source of {name} is not known here, and ranks are to import it: write it into a cell of a notebook, a script or a module."
    )


def _names(code: CodeType) -> set[str]:
    """Return the names that code, and what is nested in it, looks up outside of itself."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in LOADS}
    return found.union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _is_plain(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
