"""How the package reads: its functions say what they do, and `benchmarks.prose` counts right."""

from benchmarks import prose

MOST = 0.03  # share of the docstrings of functions


def test_docstrings_of_functions_begin_with_what_the_function_does_in_every_folder():
    shares = {folder: found.share_without_verb for folder, found in prose.by_folder().items()}
    assert {folder: share for folder, share in shares.items() if share >= MOST} == {}


def test_docstrings_lines_of_code_and_conditional_expressions_are_counted():
    found = prose.measure(
        '"""Whether modules count: no."""\n\n'
        "def of(x):\n"
        '    """Whether it holds.\n\n    Two lines more."""\n'
        "    # a comment\n"
        "    return (1 if x else\n"
        "            2 if x is None else 3)\n\n"
        "def nothing():\n"
        '    """Return nothing."""\n'
    )
    assert found == prose.Prose(docstrings=2, without_verb=1, lines=9, conditionals=2)
