"""What is to be scored, as rows of tokens in blocks: what requests have in common is computed once. Touches no device.

A request is a text of tokens and where its targets begin. A *row* is all requests of one document: what they have in
common, then each one's own tokens behind it, a *branch* that sees what is common and itself. A *prefix* is what all
rows of a task have in common, as examples: it lies in no row. A *block* is what a device computes at a time: rows of
one width, and one prefix. Blocks are a function of all requests and never of those still missing: so a block has the
same bits whenever and wherever it is computed.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

Ids = Sequence[int]

SHORTEST_PREFIX = 32  # one that is shorter is left in the rows
WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
PREFIX_WIDTHS = (0, 128, 256, 512, 1024, 2048, 4096, 8192)
TARGET_COUNTS = (4, 16, 64, 256, 1024, 8192)
FILE = "requests.npz"


@dataclass(frozen=True)
class Request:
    tokens: tuple[int, ...]
    cut: int  # tokens[cut:] are its targets; at least one token stands before them


@dataclass(frozen=True)
class Row:
    tokens: tuple[int, ...]  # behind the prefix
    position: tuple[int, ...]
    branch: tuple[int, ...]  # 0: what all requests have in common
    place: tuple[int, ...]  # of each target: where in the row its logits are
    target: tuple[int, ...]
    counts: tuple[int, ...]  # targets of each request, in order


@dataclass(frozen=True)
class Plan:
    """All rows and blocks, as arrays that lie one behind another: entry i of `*_at` is where i begins."""

    tokens: np.ndarray
    position: np.ndarray
    branch: np.ndarray
    row_at: np.ndarray
    place: np.ndarray
    target: np.ndarray
    target_at: np.ndarray
    counts: np.ndarray  # targets of each request
    request_at: np.ndarray  # by row
    prefix: np.ndarray
    prefix_at: np.ndarray
    rows: np.ndarray  # of all blocks
    rows_at: np.ndarray  # by block
    shapes: np.ndarray  # by block: prefix, width, rows, targets

    @property
    def blocks(self) -> int:
        return len(self.shapes)

    def requests_of(self, block: int) -> list[int]:
        """The requests that a block answers, in the order of its answers."""
        found: list[int] = []
        for row in self.rows[self.rows_at[block] : self.rows_at[block + 1]]:
            found += range(self.request_at[row], self.request_at[row + 1])
        return found

    def digest(self) -> str:
        made = hashlib.sha256()
        for field in fields(self):
            made.update(np.ascontiguousarray(getattr(self, field.name)).tobytes())
        return made.hexdigest()[:32]


def common(texts: Sequence[Ids]) -> int:
    """How many tokens all begin with."""
    first, last = min(texts, key=tuple), max(texts, key=tuple)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def make_row(requests: Sequence[Request], prefix: int) -> Row:
    """Of one document. prefix: how many tokens are left out of it; all targets come later."""
    texts = [request.tokens[:-1] for request in requests]  # the last one is only a target
    shared = common(texts)
    tokens, position, branch = list(texts[0][prefix:shared]), list(range(prefix, shared)), [0] * (shared - prefix)
    place: list[int] = []
    target: list[int] = []
    counts: list[int] = []
    for number, (request, text) in enumerate(zip(requests, texts, strict=True), 1):
        behind = len(tokens)
        tokens += text[shared:]
        position += range(shared, len(text))
        branch += [number] * (len(text) - shared)
        before = range(request.cut - 1, len(request.tokens) - 1)  # the token before each target
        place += [at - prefix if at < shared else behind + at - shared for at in before]
        target += request.tokens[request.cut :]
        counts.append(len(before))
    return Row(*(tuple(part) for part in (tokens, position, branch, place, target, counts)))


def prefix_of(documents: Sequence[Sequence[Request]]) -> int:
    """How many tokens all requests of a task begin with, before any target; 0 where it is not worth it."""
    if len(documents) < 2:
        return 0
    requests = [request for document in documents for request in document]
    shared = min(common([request.tokens for request in requests]), min(request.cut for request in requests) - 1)
    return shared if shared >= SHORTEST_PREFIX else 0


def at_least(sizes: Sequence[int], count: int) -> int:
    """The smallest of the sizes that is not less."""
    return next(size for size in sizes if size >= count)


def documents_of(documents: Sequence[Sequence[Request]]) -> list[Sequence[Request]]:
    """The same, one whose row would be too wide request by request."""
    found: list[Sequence[Request]] = []
    for document in documents:
        wide = len(make_row(document, 0).tokens) > WIDTHS[-1]
        found += [[request] for request in document] if wide else [document]
    return found


def make_plan(tasks: Sequence[Sequence[Sequence[Request]]], block_tokens: int) -> Plan:
    """Requests by task and document, in order. block_tokens: of a block, about; at least one row.

    Rows are put in blocks by task and width, those of one width in order.
    """
    rows: list[Row] = []
    prefixes: list[Ids] = []
    of_width: dict[tuple[int, int], list[int]] = {}  # rows by prefix (-1: none) and width
    for task in tasks:
        documents = documents_of(task)
        length = prefix_of(documents)
        prefix = len(prefixes) if length else -1
        if length:
            prefixes.append(documents[0][0].tokens[:length])
        for document in documents:
            row = make_row(document, length)
            of_width.setdefault((prefix, at_least(WIDTHS, len(row.tokens))), []).append(len(rows))
            rows.append(row)
    of_width = folded(of_width, block_tokens)
    blocks: list[list[int]] = []
    shapes = []
    most: dict[int, int] = {}  # targets of a row, by width
    for (_, width), those in of_width.items():
        most[width] = max(most.get(width, 0), *(len(rows[row].target) for row in those))
    # Blocks of like shape follow one another, so that several devices find enough of them.
    for (prefix, width), those in sorted(of_width.items(), key=lambda item: (item[0][1], item[0][0])):
        size = max(1, block_tokens // width)
        for first in range(0, len(those), size):
            blocks.append(those[first : first + size])
            shapes.append((prefix, width, size, at_least(TARGET_COUNTS, most[width])))
    tokens, row_at = flat(row.tokens for row in rows)
    target, target_at = flat(row.target for row in rows)
    counts, request_at = flat(row.counts for row in rows)
    before, prefix_at = flat(prefixes)
    members, rows_at = flat(blocks)
    return Plan(
        tokens=tokens,
        position=flat(row.position for row in rows)[0],
        branch=flat(row.branch for row in rows)[0],
        row_at=row_at,
        place=flat(row.place for row in rows)[0],
        target=target,
        target_at=target_at,
        counts=counts,
        request_at=request_at,
        prefix=before,
        prefix_at=prefix_at,
        rows=members,
        rows_at=rows_at,
        shapes=np.array(shapes, np.int32).reshape(-1, 4),
    )


def folded(of_width: dict[tuple[int, int], list[int]], block_tokens: int) -> dict[tuple[int, int], list[int]]:
    """Rows that would not fill a block go among those of their prefix that are wider, where all fit in one: fewer
    shapes, and fewer blocks that are mostly empty.
    """
    found: dict[tuple[int, int], list[int]] = {}
    held: dict[int, list[int]] = {}  # by prefix
    wider: dict[int, list[int]] = {}
    for prefix, width in sorted(of_width):
        wider.setdefault(prefix, []).append(width)
    for prefix, widths in wider.items():
        for width, after in zip(widths, [*widths[1:], None], strict=True):
            those = held.pop(prefix, []) + of_width[prefix, width]
            if after is not None and len(those) * after <= block_tokens:
                held[prefix] = those
            else:
                found[prefix, width] = sorted(those)
    return found


def flat(parts: Iterable[Ids]) -> tuple[np.ndarray, np.ndarray]:
    """All parts one behind another, and where each begins."""
    lengths, joined = [0], list[int]()
    for part in parts:
        joined += part
        lengths.append(len(joined))
    return np.array(joined, np.int32), np.array(lengths, np.int64)


def save(plan: Plan, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(file, **{field.name: getattr(plan, field.name) for field in fields(plan)})
    partial.rename(path)


def load(path: Path) -> Plan:
    """Raises OSError and ValueError where it is not one."""
    with np.load(path, allow_pickle=False) as file:
        return Plan(**{field.name: file[field.name] for field in fields(Plan)})


def steps(plan: Plan, missing: Iterable[int], devices: int) -> list[tuple[int, ...]]:
    """The blocks that are computed together, a device each: of one shape and prefix; -1 is none."""
    found: list[tuple[int, ...]] = []
    together: list[int] = []

    def close() -> None:
        if together:
            found.append((*together, *[-1] * (devices - len(together))))
            together.clear()

    for block in missing:
        if together and (len(together) == devices or tuple(plan.shapes[block]) != tuple(plan.shapes[together[0]])):
            close()
        together.append(block)
    close()
    return found
