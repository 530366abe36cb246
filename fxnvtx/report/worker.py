"""`python -m fxnvtx.report.worker`: read the capture that stdin names, give its trees to the process that asked."""

from __future__ import annotations

import os
import pickle
import sys

from ..errors import FxnvtxError
from .gather import read_one


def main() -> None:
    # whatever else is printed must not get between the reader and the pickle
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        answer = ("parts", read_one(pickle.load(sys.stdin.buffer)))
    except FxnvtxError as error:
        answer = (type(error).__name__, str(error))  # type: ignore[assignment]
    with out:
        pickle.dump(answer, out)


if __name__ == "__main__":
    main()
