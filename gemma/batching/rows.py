"""What is to be scored, as rows of tokens in blocks: what requests have in common is computed once. Touches no device.

A request is a text of tokens and where its targets begin. A *row* is all requests of one document: what they have in
common, then each one's own tokens behind it, a *branch* that sees what is common and itself. A *prefix* is what all
rows of a task have in common, as examples: it lies in no row. A *block* is what a device computes at a time: rows of
one width, and one prefix. Blocks are a function of all requests and never of those still missing: so a block has the
same bits whenever and wherever it is computed.
"""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

Ids = Sequence[int]

SHORTEST_PREFIX = 32  # one that is shorter is left in the rows
WIDEST = 8192
MOST_WIDTHS = 8  # of rows: each is a program for every size of prefix
WIDTH_STEP = 16
PREFIX_WIDTHS = (0, 128, 256, 512, 1024, 2048, 4096, 8192)
LOGITS = 256  # targets whose logits are there at a time
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
    shapes: np.ndarray  # by block: prefix, width of a row, rows, targets of all rows

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
        wide = len(make_row(document, 0).tokens) > WIDEST
        found += [[request] for request in document] if wide else [document]
    return found


def make_plan(tasks: Sequence[Sequence[Sequence[Request]]], block_tokens: int) -> Plan:
    """Requests by task and document, in order. block_tokens: of a block, about; at least one row.

    Rows are put in blocks by task and width, those of one width in order.
    """
    rows: list[Row] = []
    prefixes: list[Ids] = []
    of_prefix: dict[int, list[int]] = {}  # rows by prefix; -1: none
    for task in tasks:
        documents = documents_of(task)
        length = prefix_of(documents)
        prefix = len(prefixes) if length else -1
        if length:
            prefixes.append(documents[0][0].tokens[:length])
        for document in documents:
            of_prefix.setdefault(prefix, []).append(len(rows))
            rows.append(make_row(document, length))
    widths = widths_for([len(row.tokens) for row in rows])
    blocks: list[list[int]] = []
    sizes: list[tuple[int, int, int]] = []
    for prefix, its_rows in of_prefix.items():
        by_width: dict[int, list[int]] = {}
        for row in its_rows:
            by_width.setdefault(at_least(widths, len(rows[row].tokens)), []).append(row)
        for width, those in folded(by_width, block_tokens).items():
            size = max(1, block_tokens // width)
            for first in range(0, len(those), size):
                blocks.append(those[first : first + size])
                sizes.append((prefix, width, size))
    # Blocks of like shape follow one another, so that several devices find enough of them.
    order = sorted(range(len(blocks)), key=lambda block: (sizes[block][1], sizes[block][0]))
    blocks, sizes = [blocks[block] for block in order], [sizes[block] for block in order]
    most: dict[int, int] = {}  # targets of a block, by width
    for block, (_, width, _) in zip(blocks, sizes, strict=True):
        most[width] = max(most.get(width, 0), sum(len(rows[row].target) for row in block))
    shapes = [(*one, padded(most[one[1]])) for one in sizes]
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


def padded(count: int) -> int:
    """Targets of a block: a power of two, or whole parts of LOGITS."""
    return -(-count // LOGITS) * LOGITS if count > LOGITS else 1 << max(4, (count - 1).bit_length())


def widths_for(lengths: Sequence[int]) -> list[int]:
    """At most MOST_WIDTHS widths, for which rows of these lengths are padded least."""
    counts = Counter(-(-max(1, length) // WIDTH_STEP) * WIDTH_STEP for length in lengths)
    known = sorted(counts)
    before = [0, *itertools.accumulate(counts[width] for width in known)]  # rows that are narrower
    least = [before[n + 1] * width for n, width in enumerate(known)]  # places, where all up to n have one width
    chosen: list[list[int]] = [[width] for width in known]
    for _ in range(MOST_WIDTHS - 1):
        step = [
            min((least[m] + (before[n + 1] - before[m + 1]) * width, m) for m in range(n)) if n else (least[0], -1)
            for n, width in enumerate(known)
        ]
        better = [n for n, (places, _) in enumerate(step) if places < least[n]]
        made = {n: [*chosen[step[n][1]], known[n]] for n in better}
        for n in better:
            chosen[n], least[n] = made[n], step[n][0]
    return chosen[-1] if chosen else []


def folded(by_width: Mapping[int, list[int]], block_tokens: int) -> dict[int, list[int]]:
    """What would leave the last block of a width partly empty goes among wider rows, where all of it fits in one block:
    fewer shapes, and fewer empty places.
    """
    found: dict[int, list[int]] = {}
    held: list[int] = []
    widths = sorted(by_width)
    for width, wider in zip(widths, [*widths[1:], None], strict=True):
        those = sorted(held + by_width[width])
        over = len(those) % max(1, block_tokens // width)
        kept = len(those) - over if wider is not None and over * wider <= block_tokens else len(those)
        those, held = those[:kept], those[kept:]
        if those:
            found[width] = those
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
