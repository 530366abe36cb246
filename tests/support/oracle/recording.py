"""Recordings through the same loop."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from fxnvtx.report.labels import Span
from fxnvtx.report.tree import Tree

from .overlap import Compute
from .sweep import Sweep


def fill(tree: Tree, spans: Iterable[Span]) -> None:
    """What `fxnvtx.report.attribution.fill` does."""
    connection = sqlite3.connect("")
    compute = Compute(connection)
    Sweep(tree, lambda node, both, what: None, compute.watch).run(spans, ())
    compute.settle(None)
    connection.close()
