"""How long single calls took: their number, and their distribution in little space (pure).

A distribution is None (no calls), a number (one call), or {bucket: [calls, sum]}. Buckets keep five significant bits,
so a median or a percentile is off by at most 3 %, and is exact where the calls of its bucket took equally long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Calls", "Spread", "added", "copied", "merged", "spread_of"]

Calls = int | dict[int, list[int]] | None


@dataclass
class Spread:
    """Of single calls, in ns. middle: the median; most: the 99th percentile."""

    count: int
    low: int
    middle: int
    most: int
    high: int


def added(calls: Calls, value: int) -> Calls:
    """The distribution with one more call; may change the one given."""
    if calls is None:
        return value
    if type(calls) is int:
        calls = {_bucket(calls): [1, calls]}
    assert type(calls) is dict
    entry = calls.get(_bucket(value))
    if entry is None:
        calls[_bucket(value)] = [1, value]
    else:
        entry[0] += 1
        entry[1] += value
    return calls


def merged(into: Calls, other: Calls) -> Calls:
    """Both together; may change the first, never the second."""
    if other is None:
        return into
    if type(other) is int:
        return added(into, other)
    assert type(other) is dict
    if into is None:
        return copied(other)
    if type(into) is int:
        return added(copied(other), into)
    assert type(into) is dict
    for bucket, (count, total) in other.items():
        entry = into.get(bucket)
        if entry is None:
            into[bucket] = [count, total]
        else:
            entry[0] += count
            entry[1] += total
    return into


def copied(calls: Calls) -> Calls:
    return {bucket: list(entry) for bucket, entry in calls.items()} if type(calls) is dict else calls


def spread_of(calls: Calls, low: int | None = None, high: int | None = None) -> Spread | None:
    """The figures of a distribution; `low` and `high` where they are known exactly."""
    if calls is None:
        return None
    if type(calls) is int:
        return Spread(1, calls, calls, calls, calls)
    assert type(calls) is dict
    entries = [calls[bucket] for bucket in sorted(calls)]
    count = sum(number for number, _ in entries)
    least, greatest = _mean(entries[0]), _mean(entries[-1])
    return Spread(
        count,
        least if low is None else low,
        (_at(entries, (count - 1) // 2) + _at(entries, count // 2)) // 2,
        _at(entries, -(-count * 99 // 100) - 1),
        greatest if high is None else high,
    )


def _bucket(value: int) -> int:
    """Rises with the value."""
    shift = value.bit_length() - 5
    return value if shift <= 0 else (shift << 5) + (value >> shift)


def _mean(entry: Iterable[int]) -> int:
    count, total = entry
    return total // count


def _at(entries: list[list[int]], place: int) -> int:
    for entry in entries:
        if place < entry[0]:
            return _mean(entry)
        place -= entry[0]
    return _mean(entries[-1])
