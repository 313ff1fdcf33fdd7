"""Plain SVG: scales, ticks, and numbers as people read them. No text enters a page but through `text`."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 960.0  # of every drawing, in its own units
TIME_STEPS_S = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000),
)


@dataclass(frozen=True)
class Scale:
    """Values from low to high lie between two places on the paper."""

    low: float
    high: float
    at_low: float
    at_high: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.at_low + min(max(share, 0.0), 1.0) * (self.at_high - self.at_low)


def text(value: object) -> str:
    """Escaped; what XML cannot carry is replaced."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(shown)


def titled(title: str) -> str:
    """What is shown while the pointer rests on it."""
    return f"<title>{text(title)}</title>"


def label(x: float, y: float, shown: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(shown)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inside = titled(title) if title else ""
    size = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {size}>{inside}</rect>'


def drawing(height: float, parts: Sequence[str], described: str) -> str:
    size = f'viewBox="0 0 {WIDTH:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{text(described)}">'
    return f"{head}{''.join(parts)}</svg>"


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round values between low and high, 1, 2 or 5 times a power of ten apart, at least `least`."""
    raw = (high - low) / max(about, 1)
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    apart = max(least, next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999))
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    return [number * apart for number in range(first, last + 1)]


def time_ticks(length_s: float, about: int = 8) -> list[float]:
    """Round times from 0 on."""
    if length_s < about:
        return ticks(0.0, length_s, about)
    apart = next((step for step in TIME_STEPS_S if length_s / step <= about), TIME_STEPS_S[-1])
    return [float(number * apart) for number in range(int(length_s / apart) + 1)]


def short(value: float, apart: float = 0.0) -> str:
    """12500 as 12.5k. apart: from one tick to the next, which says how many digits tell them apart."""
    if not value:
        return "0"
    size = max(abs(value), apart)
    unit, letter = next(((u, s) for u, s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= u), (1.0, ""))
    if size >= 1e15:
        return f"{value:.1e}"
    step = (apart or size or 1.0) / unit
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if apart else (0 if size / unit >= 100 else 1)
    shown = f"{value / unit:.{min(digits, 6)}f}"
    return (shown.rstrip("0").rstrip(".") if letter and "." in shown else shown) + letter


def figure(value: float, digits: int = 4) -> str:
    """A measured value; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else short(value)


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


def elapsed(seconds: float) -> str:
    """A tick of a time axis."""
    return f"{seconds:g} s" if seconds < 60 else duration(seconds)
