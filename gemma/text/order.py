"""Which rows a step trains on, when the batch has changed and batches were left out. Pure, plain Python.

Training takes rows of an endless shuffled order (`gemma.train.data`) one after the other. A row's number in that order
is its place. The order is counted in rows and not in batches: after a change of `train.batch` the next step goes on
with the next row, and each row is still used once an epoch.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # places first..end-1


@dataclass(frozen=True)
class Order:
    """What, beside config and seed, decides the rows of a step."""

    batches: tuple[tuple[int, int], ...]  # (steps done, rows a step from there on), ascending, the first at 0
    skipped: tuple[Span, ...] = ()  # never trained on; ascending, no two overlap


def rows_before(order: Order, step: int) -> int:
    """How many rows the first `step` steps train on."""
    ends = [first for first, _ in order.batches[1:]] + [step]
    return sum(max(0, min(end, step) - first) * batch for (first, batch), end in zip(order.batches, ends, strict=True))


def batch_at(order: Order, step: int) -> int:
    """How many rows the step after `step` steps trains on."""
    return [batch for first, batch in order.batches if first <= step][-1]


def spans(order: Order, step: int) -> tuple[Span, ...]:
    """The places that the step after `step` steps trains on, around those that are skipped."""
    first, left = rows_before(order, step), batch_at(order, step)
    found: list[Span] = []
    for start, end in order.skipped:
        if start <= first:
            first += end - start
        elif start < first + left:
            found.append((first, start))
            first, left = end, left - (start - first)
    return (*found, (first, first + left))


def places(order: Order, step: int) -> list[int]:
    """The same, one by one."""
    return list(itertools.chain.from_iterable(range(*span) for span in spans(order, step)))


def batch_of(events: Iterable[Mapping[str, Any]], step: int) -> int | None:
    """How many rows the last of the first `step` steps trained on, by a run's events; None where they do not tell."""
    known = [rows for event in events if event.get("batches") for first, rows in event["batches"] if first < step]
    return known[-1] if known else None


def recorded(events: Iterable[Mapping[str, Any]], step: int, batch: int) -> Order:
    """The order of a run that goes on after `step` steps with `batch` rows a step.

    events: the run's own. Those with `batches` hold what batches it has trained with up to then; what lies beyond
    `step` is done again, with this batch.
    """
    batches: list[tuple[int, int]] = []
    skipped: set[Span] = set()
    for event in events:
        if event.get("batches"):
            batches = [(first, rows) for first, rows in event["batches"] if first < step]
        if event.get("event") == "skip_batch":
            skipped |= {(first, end) for first, end in event["places"]}
    if not batches:
        batches = [(0, batch)]
    if batches[-1][1] != batch:
        batches.append((step, batch))
    return Order(tuple(batches), tuple(sorted(skipped)))
