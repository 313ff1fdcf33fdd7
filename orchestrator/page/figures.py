"""Numbers and times as people read them."""

import math
import time


def short(value: float) -> str:
    """12500 as 12.5k; a dash where there is no value."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.1e}"
    unit, letter = next(
        ((u, s) for u, s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= u), (1.0, "")
    )
    shown = f"{value / unit:.{0 if abs(value) / unit >= 100 else 1}f}"
    return (shown.removesuffix(".0") if letter else shown) + letter


def figure(value: float) -> str:
    """A measured value with four digits behind the point."""
    return f"{value:.4f}" if abs(value) < 1e4 else short(value)


def duration(seconds: float) -> str:
    """Two units at most: 2 min 15 s, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    left = round(seconds)
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    index = next(i for i, (size, _) in enumerate(units) if left >= size)
    (large, name), (small, other) = units[index], units[index + 1]
    rest = left % large // small
    return f"{left // large} {name}" + (f" {rest} {other}" if rest else "")


def clock(when: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time.time() in this machine's time zone; a dash where it is none."""
    try:
        return time.strftime(form, time.localtime(when))
    except (OverflowError, ValueError, OSError):
        return "–"
