"""Print what completes `asgd-mpi VERB --option VALUE` in bash or zsh: `asgd-mpi completion > FILE`, and `source FILE` in ~/.bashrc or ~/.zshrc.

The script is complete in itself, so that a Tab starts no Python: write it again after an update. Commands under mpirun, and
`python -m`, are not completed.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Mapping

from asgd_mpi.config import help_text, parse
from asgd_mpi.process import ending

HOME = {"report": "asgd_mpi.report.command"}  # where a verb's parser is, unless in its module
TAKE_TRAINING = ("simulate",)  # verbs that take the options of a training beside their own
SCRIPT = """\
_asgd_mpi() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words=%VERBS%
    else
        case "$verb $before" in
%VALUES%
        *) case "$word" in -*) case "$verb" in
%OPTIONS%
        esac ;; esac ;;
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}
if [ -n "$ZSH_VERSION" ]; then    # it takes what bash does once these are loaded
    whence compdef > /dev/null || { autoload -U compinit && compinit; }
    autoload -U bashcompinit && bashcompinit
fi
# where nothing of ours fits: names of files
complete -o default -F _asgd_mpi asgd-mpi
"""


def of_verbs(verbs: list[str]) -> dict[str, list[help_text.Option]]:
    """Return the options of each verb; none of one that has no parser."""
    training = _listed(parse.make_parser(), parse.SHORTHANDS)
    found = {}
    for verb in verbs:
        module = importlib.import_module(HOME.get(verb, f"asgd_mpi.{verb}"))
        if verb == "train":
            found[verb] = training
        elif hasattr(module, "make_parser"):
            found[verb] = _listed(module.make_parser(), {})
        else:
            found[verb] = []
        if verb in TAKE_TRAINING:
            found[verb] += training
    return found


def script(found: Mapping[str, list[help_text.Option]], others: tuple[str, ...] = ()) -> str:
    """Return the script, for verbs with their options and for others without."""
    values, listed = [], []
    for verb, own in found.items():
        names = {name for option in own for name in option.names} | {"--help"}
        listed.append(f"        {verb}) words={shlex.quote(' '.join(sorted(names)))} ;;")
        for option in own:
            if option.choices:
                cases = "|".join(f"'{verb} {name}'" for name in option.names)
                values.append(f"        {cases}) words={shlex.quote(' '.join(option.choices))} ;;")
    return (
        SCRIPT.replace("%VERBS%", shlex.quote(" ".join((*found, *others))))
        .replace("%VALUES%", "\n".join(values))
        .replace("%OPTIONS%", "\n".join(listed))
    )


def _listed(parser, short: Mapping[str, str]) -> list[help_text.Option]:
    every = (one for group in help_text.groups(parser, short) for one in group.options)
    return [one for one in every if one.names[0].startswith("-")]


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    ending.demand_no_options(ending.words(arguments), __doc__)
    overview = importlib.import_module("asgd_mpi.__main__")
    print(
        script(
            of_verbs(list(overview.VERBS)), tuple(f"data_prep.{name}" for name in overview.PREPARE)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
