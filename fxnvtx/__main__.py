"""`python -m fxnvtx` with the options and the program of `fxnvtx run`, or with any command of `fxnvtx`."""

import sys

from .cli import main

_OF_THE_GROUP = ("--help", "-h", "--version", "--debug")


def words(given: list[str]) -> list[str]:
    """What `fxnvtx` would have been given: `run` is the command where an option or a script comes first."""
    first = given[0] if given else "--help"
    runs = first.startswith("-") and first not in _OF_THE_GROUP
    return ["run", *given] if runs or first.endswith(".py") or "/" in first else given


if __name__ == "__main__":
    main(words(sys.argv[1:]))
