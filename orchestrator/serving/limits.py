"""How much each API key may ask for in a minute."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 60.0


@dataclass
class Spent:
    """Of one key, in the last minute: when it asked, and when it was given tokens."""

    asked: deque[float] = field(default_factory=deque)
    given: deque[tuple[float, int]] = field(default_factory=deque)
    tokens: int = 0  # of `given`


def wait_s(spent: Spent, now: float, requests: int | None, tokens: int | None) -> float:
    """Seconds until the key may ask again; 0 where it may now. requests, tokens: a minute; None is without limit."""
    forget(spent, now)
    late = spent.asked[-requests] if requests is not None and len(spent.asked) >= requests else None
    waits = [] if late is None else [late + WINDOW_S - now]
    over = spent.tokens - tokens if tokens is not None else -1
    for at, count in spent.given:
        if over < 0:
            break
        over -= count
        waits.append(at + WINDOW_S - now)
    return max(waits, default=0.0)


def ask(spent: Spent, now: float) -> None:
    spent.asked.append(now)


def give(spent: Spent, now: float, tokens: int) -> None:
    spent.given.append((now, tokens))
    spent.tokens += tokens


def forget(spent: Spent, now: float) -> None:
    while spent.asked and spent.asked[0] <= now - WINDOW_S:
        spent.asked.popleft()
    while spent.given and spent.given[0][0] <= now - WINDOW_S:
        spent.tokens -= spent.given.popleft()[1]
