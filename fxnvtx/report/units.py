"""Numbers as people read them (pure)."""

from __future__ import annotations

__all__ = ["middle", "readable_bytes", "readable_count", "readable_ns", "readable_share", "shortened"]


def readable_ns(value: float) -> str:
    """Nanoseconds with three or four significant digits and a unit."""
    size = abs(value)
    if size < 999.5:
        return f"{value:.0f} ns"
    # limits at which rounding would give 100.00 or 1000.0
    for divisor, unit in ((1e3, "us"), (1e6, "ms"), (1e9, "s")):
        if size < 999.95 * divisor or unit == "s":
            return f"{value / divisor:.2f} {unit}" if size < 99.995 * divisor else f"{value / divisor:.1f} {unit}"
    raise AssertionError("unreachable")


def readable_bytes(value: float) -> str:
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def readable_count(value: float) -> str:
    """A count with three significant digits and a decimal prefix: 1.50 T."""
    size = abs(value)
    if size < 999.5:
        return f"{value:.0f}"
    for divisor, unit in ((1e3, "K"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P")):
        if size < 999.5 * divisor or unit == "P":
            digits = 2 if size < 9.995 * divisor else 1 if size < 99.95 * divisor else 0
            return f"{value / divisor:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def readable_share(value: float) -> str:
    return f"{value * 100:.1f}%"


def shortened(text: str, above: str, width: int) -> str:
    """A range's name that fits: whole, or without what the range around it says already, or cut in its middle."""
    if len(text) > width and above and text.startswith(f"{above}."):
        text = "…" + text[len(above) :]
    return middle(text, width)


def middle(text: str, width: int) -> str:
    """The text cut in its middle, so that beginning and end stay readable."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[: max(width, 1)]
    keep = width - 1
    head = keep // 3
    return text[:head] + "…" + text[len(text) - (keep - head) :]
