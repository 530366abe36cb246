"""`python -m fxnvtx script.py ...` runs a script with its models instrumented; any other first word is a command."""

import sys

from .cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    plain = bool(words) and not words[0].startswith("-") and (words[0].endswith(".py") or "/" in words[0])
    main(["run", *words] if plain else words)
