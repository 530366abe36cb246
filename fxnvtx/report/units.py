"""Numbers as people read them (pure)."""

from __future__ import annotations

__all__ = ["middle", "readable_bytes", "readable_ns", "readable_share"]


def readable_ns(value: float) -> str:
    """Nanoseconds with three or four significant digits and a unit."""
    size = abs(value)
    for limit, divisor, unit in ((1e3, 1, "ns"), (1e6, 1e3, "us"), (1e9, 1e6, "ms"), (float("inf"), 1e9, "s")):
        if size < limit:
            scaled = value / divisor
            if unit == "ns":
                return f"{scaled:.0f} ns"
            return f"{scaled:.2f} {unit}" if abs(scaled) < 100 else f"{scaled:.1f} {unit}"
    raise AssertionError("unreachable")


def readable_bytes(value: float) -> str:
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def readable_share(value: float) -> str:
    return f"{value * 100:.1f}%"


def middle(text: str, width: int) -> str:
    """The text cut in its middle, so that beginning and end stay readable."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[: max(width, 1)]
    keep = width - 1
    head = keep // 3
    return text[:head] + "…" + text[len(text) - (keep - head) :]
