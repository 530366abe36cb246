"""Rows in the order that was asked for (pure)."""

from __future__ import annotations

from collections.abc import Callable

from .rows import Row

__all__ = ["ORDERS", "ordered"]

ORDERS: dict[str, Callable[[Row], int]] = {
    "calls": lambda row: row.calls,
    "total": lambda row: row.cpu,
    "self": lambda row: row.cpu_self,
    "gpu": lambda row: row.gpu,
    "gpu-self": lambda row: row.gpu_self,
    "kernels": lambda row: row.kernels + row.copies,
    "gap": lambda row: row.gap,
    "exposed": lambda row: row.exposed,
    "wait": lambda row: row.waited,
    "queue": lambda row: row.queued // row.launches if row.launches else 0,
    "memory": lambda row: row.peak or 0,
    "median": lambda row: row.each.middle if row.each is not None else row.gpu or row.cpu,
    "flops": lambda row: row.flops,
    "headroom": lambda row: row.headroom or 0,
    "max": lambda row: row.each.high if row.each is not None else row.gpu or row.cpu,
}


def ordered(rows: list[Row], by: str | None) -> list[Row]:
    """Largest first; in a tree the siblings of each row. What cannot be attributed, and sums, stay last."""
    if by is None:
        return rows
    measure = ORDERS[by]
    below: dict[int | None, list[Row]] = {}
    shown = {id(row) for row in rows}
    for row in rows:
        above = row.above
        below.setdefault(id(above) if above is not None and id(above) in shown else None, []).append(row)
    for siblings in below.values():
        siblings.sort(key=lambda row: (row.kind in ("unknown", "outside", "summary", "side"), -measure(row)))
    found: list[Row] = []
    todo = list(reversed(below.get(None, [])))
    while todo:
        row = todo.pop()
        found.append(row)
        todo.extend(reversed(below.get(id(row), [])))
    return found
