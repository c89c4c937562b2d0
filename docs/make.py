"""Write what is made from the code: `python docs/make.py` writes options.md, messages.md, api.md and picture.svg beside this file.

tests/pure/test_documents.py fails when one of them is not what this would write.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import runpy
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import asgd_mpi  # noqa: E402
from asgd_mpi import launched  # noqa: E402
from asgd_mpi.__main__ import PREPARE, VERBS  # noqa: E402
from asgd_mpi.config import help_text  # noqa: E402
from asgd_mpi.config import parse  # noqa: E402

MADE = "<!-- made by docs/make.py -->\n\n"
# where an error is raised -> the part of the page that it belongs to; the first that fits
PARTS = (
    (
        "Launchers, ranks and GPUs",
        r"asgd_mpi/(launch|doctor|comm/|config/topology|runtime/supervise)",
    ),
    ("Packing images", r"data_prep/"),
    ("Data sets", r"asgd_mpi/data/"),
    ("Networks, weights and stages", r"asgd_mpi/(model|pipeline|vector|task|runtime/preflight)"),
    ("Run directories, checkpoints and resume", r"asgd_mpi/(record|runtime/(resume|trust)|stop)"),
    ("Options", r"asgd_mpi/(config|__main__|process|runtime/(prepare|fault))|asgd_mpi/slurm"),
    ("While a training runs", r"asgd_mpi/(runtime|optim)"),
    ("Reports, plans, replays and simulations", r"asgd_mpi/"),
)


def options() -> str:
    """Return the page of all options: those of a training as tables, the other commands as their --help."""
    lines = [
        "# Options\n",
        MADE
        + "`python -m asgd_mpi.train --help` shows the options that people set, `--help all` all of them. On the command line they "
        "are `--section.name value`; in a file for `--config`:\n",
        "```yaml\nrun:\n  epochs: 30\nschedule:\n  lr: 0.05\n```\n",
        "## train\n",
    ]
    for group in help_text.groups(parse.make_parser(), parse.SHORTHANDS):
        title = "In general" if group.title == "options" else group.title
        lines += [f"### {title}\n", *(_item(one) for one in group.options), ""]
    for module in [f"asgd_mpi.{verb}" for verb in VERBS if verb != "train"] + [
        f"data_prep.{name}" for name in PREPARE
    ]:
        name = module.removeprefix("asgd_mpi.")
        lines += [f"## {name}\n", f"```text\n{_help_of(module)}\n```\n"]
    return "\n".join(lines)


# a clause that begins with one of them says what to do
DOING = frozenset(
    """add ask begin build calibrate call check choose copy delete do end enlarge fetch free freeze get give go install
    leave let load look lower make mend merge move name pack pip prepare put raise rehearse remove rename replace replay
    restore run save say see seed send sort ssh start take train try unpack unset use write""".split()
)


def messages() -> str:
    """Return the page of all messages that a user can act on: errors by where they come from, warnings, what the doctor finds."""
    parts: dict[str, list[str]] = {title: [] for title, _ in PARTS}
    for file, message in sorted(set(raised()), key=lambda one: one[1].lower().lstrip("…`- ")):
        title = next(title for title, where in PARTS if re.match(where, file))
        parts[title].append(message)
    lines = [
        "# All messages\n",
        MADE
        + "Every error that you can do something about is one line, `error: ...`, with status 2. Here they all are, with … for names "
        "and numbers: what is wrong first, then what to do. [When something goes wrong](troubleshooting.md) says more of some.\n",
    ]
    for title, found in parts.items():
        lines += [f"## {title}\n", *(f"- {_in_bold(message)}" for message in found), ""]
    lines += [
        "## Problems that the doctor finds\n",
        "Each stops a training, or makes it many times slower.\n",
        "| what | found | do |\n|---|---|---|",
        *(
            f"| {' | '.join(_escaped(cell).replace('|', '/') for cell in row)} |"
            for row in sorted(set(found_by_doctor()))
        ),
        "",
        "## Warnings\n",
        "On stderr, while the command goes on.\n",
        *(f"- {_escaped(text)}" for text in sorted(set(warned()), key=str.lower)),
        "",
    ]
    return "\n".join(lines)


def says_what_to_do(message: str) -> bool:
    """Return whether a message has a clause that tells somebody what to do, or what must be; one that is put in (…) counts."""
    clauses = re.split(
        r"[.;:,…] +(?:or |and |so |then |elsewhere |otherwise |if need be )?|\(|\bor ", message
    )
    verbs = {found[1].lower() for one in clauses if (found := re.match(r"([A-Za-z]+)", one))}
    return bool(
        verbs & DOING
        or re.search(r"\bmust\b|[.;:…] ?…\.?$", message)
        or re.search(r"(?:`|: )(?:python|pip|mpirun|srun|export) ", message)
    )


def found_by_doctor() -> Iterator[tuple[str, str, str]]:
    """Yield (topic, fact, remedy) of every problem that the doctor knows; … for what is put in."""
    tree = ast.parse((ROOT / "asgd_mpi/runtime/findings.py").read_text())
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        texts = {
            node.targets[0].id: " ".join(_text(node.value).split())
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(function):
            is_row = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Row"
            if is_row and len(node.args) == 4 and "PROBLEM" in ast.dump(node.args[1]):
                topic, _, fact, remedy = (
                    texts.get(getattr(arg, "id", ""), " ".join(_text(arg).split()))
                    for arg in node.args
                )
                if remedy != "…":
                    yield topic, fact, remedy
        if function.name == "_remedy":
            for node in ast.walk(function):
                if isinstance(node, ast.Return):
                    yield "a step that fails", "…", " ".join(_text(node.value).split())


def warned() -> Iterator[str]:
    """Yield the words of everything that is said on stderr and is no error; … for what is put in."""
    for path in sorted((ROOT / "asgd_mpi").rglob("*.py")) + sorted(
        (ROOT / "data_prep").glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "tell"):
                is_err = any("stderr" in ast.dump(word.value) for word in node.keywords)
                text = " ".join(" ".join(map(_text, node.args)).split())
                if is_err and len(re.findall("[a-z]{3,}", text)) > 2:
                    yield text


def raised() -> Iterator[tuple[str, str]]:
    """Yield (file, message) of every UserError that is raised with words of its own; … for what is put in."""
    classes = {"UserError"}
    trees = {
        path: ast.parse(path.read_text())
        for room in ("asgd_mpi", "data_prep")
        for path in sorted((ROOT / room).rglob("*.py"))
    }
    for _ in range(3):  # classes of classes
        classes |= {
            node.name
            for tree in trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and classes & {base.id for base in node.bases if isinstance(base, ast.Name)}
        }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_error and node.func.id in classes and node.args:
                message = " ".join(_text(node.args[0]).split())
                if len(re.findall("[a-z]{3,}", message)) > 2:
                    yield str(path.relative_to(ROOT)), message


def api() -> str:
    """Return the page of the public names, from their docstrings."""
    lines = [
        "# Python API\n",
        MADE
        + "What `import asgd_mpi` offers, from its docstrings. [Bring your own training](own-training.md) shows it in use.\n",
    ]
    for name in asgd_mpi.PUBLIC:
        thing = getattr(asgd_mpi, name)
        if inspect.ismodule(thing):  # a verb, which can be called
            thing = getattr(launched, name)
        lines += [f"## {name}\n", *_documented(thing, f"asgd_mpi.{name}")]
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if not method.startswith("_") and (
                callable(function) or isinstance(function, property)
            ):
                lines += [f"### {name}.{method}\n", *_documented(function, method)]
    return "\n".join(lines)


def picture() -> str:
    """Return the picture of the server, its window and the workers, as SVG."""
    ink, quiet, paper = "#1b1f24", "#57606a", "#ffffff"
    blue, orange, pale = "#0072b2", "#b84e00", "#eef3f8"

    def box(x, y, w, h, fill, stroke=quiet):
        return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{stroke}"/>'

    def words(x, y, text, size=14, colour=ink, anchor="middle", weight="normal"):
        return (
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{text}</text>'
        )

    def arrow(x1, y1, x2, y2, colour):
        return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{colour}" stroke-width="2.5" marker-end="url(#{colour[1:]})"/>'

    def head(colour):
        return (
            f'<marker id="{colour[1:]}" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            f'<path d="M0 0 L7 3 L0 6 z" fill="{colour}"/></marker>'
        )

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 400" font-family="sans-serif" role="img" '
        'aria-label="Rank 0 serves the weights in a window; workers push gradients and fetch snapshots">',
        f"<defs>{head(blue)}{head(orange)}</defs>",
        f'<rect width="760" height="400" fill="{paper}"/>',
        box(40, 24, 680, 156, pale),
        words(60, 50, "rank 0: the server", 16, ink, "start", "bold"),
        words(
            60,
            72,
            "applies each gradient when it arrives, lends out the images, saves checkpoints",
            13,
            quiet,
            "start",
        ),
        box(60, 88, 640, 78, paper, blue),
        words(380, 108, "the window: memory that workers read by themselves", 13, blue),
    ]
    for number, version in enumerate(("version 41", "version 42", "next")):
        x = 175 + 140 * number
        parts += [box(x, 118, 130, 38, pale if number < 2 else paper), words(x + 65, 142, version)]
    for worker in range(3):
        x = 40 + 240 * worker
        parts += [
            box(x, 270, 200, 106, pale),
            words(x + 100, 296, f"rank {worker + 1}: a worker", 15, ink, "middle", "bold"),
            words(x + 100, 318, "its own GPU", 13, quiet),
            words(x + 100, 336, "its own images, from shards", 13, quiet),
            words(x + 100, 360, "waits for nobody", 13, quiet),
            arrow(x + 70, 268, x + 70, 188, orange),
            arrow(x + 130, 168, x + 130, 264, blue),
        ]
    parts += [
        words(182, 216, "push: a gradient", 13, orange, "start"),
        words(182, 236, "fetch: a whole snapshot", 13, blue, "start"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def made() -> dict[Path, str]:
    """Return what belongs into each file."""
    return {
        DOCS / "options.md": options(),
        DOCS / "messages.md": messages(),
        DOCS / "api.md": api(),
        DOCS / "picture.svg": picture(),
    }


def _documented(thing: object, name: str) -> list[str]:
    """Return the signature and the docstring of a function or a class; of a class without arguments its name."""
    try:
        signature = str(inspect.signature(thing)).replace("'", "")
    except TypeError:  # a property
        signature = ""
    text = inspect.getdoc(thing) or ""
    about, mark, example = text.partition("Example:\n")
    lines = [f"```python\n{name}{signature}\n```\n"]
    for part in about.strip().split("\n\n"):
        title, colon, rest = part.partition(":\n")
        if colon and re.fullmatch("[A-Z][a-z]+", title):  # Args, Returns, Raises, Attributes
            items = re.sub(r"\n {5,}", " ", rest).splitlines()
            lines += [f"**{title}**\n", *(f"- {_escaped(item.strip())}" for item in items), ""]
        else:
            lines += [_escaped(" ".join(part.split())), ""]
    if mark:
        lines += [f"```python\n{textwrap.dedent(example).strip()}\n```\n"]
    return lines


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


def _help_of(module: str) -> str:
    """Return what `python -m MODULE --help` prints at 100 columns."""
    out, before = io.StringIO(), (sys.argv[:], os.environ.get("COLUMNS"))
    os.environ["COLUMNS"] = "100"
    sys.argv[1:] = ["--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
                runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv[:] = before[0]
        if before[1] is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before[1]
    return out.getvalue().strip()


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _item(option: help_text.Option) -> str:
    """Return an option as a line of a list."""
    *short, name = option.names
    also = f" (short: {', '.join(f'`{one}`' for one in short)})" if short else ""
    default = f" Default: `{option.default}`." if option.default else ""
    about = _escaped(option.about).rstrip(".")
    return f"- **`{f'{name} {option.takes}'.strip()}`**{also}: {about}.{default}"


def _in_bold(message: str) -> str:
    """Return a message for Markdown, what is wrong in bold."""
    safe = _escaped(message).replace("[", "\\[")
    cut = re.search(r"(?<=[a-z…)`]{3})[.;:] ", safe[12:])
    if cut is None or "`" in safe[: 12 + cut.start()]:
        return safe
    return f"**{safe[: 12 + cut.start()]}**{safe[12 + cut.start() :]}"


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)
        print(path)
