"""Pages of a cache: who has them, and which hold a prefix that others may share. Integers only."""

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass
class Pool:
    """Page 0 is nobody's. A page that nobody has any more is kept, by its key, until its place is needed."""

    size: int
    free: list[int] = field(default_factory=list)
    users: dict[int, int] = field(default_factory=dict)  # by page: how many sequences have it
    by_key: dict[bytes, int] = field(default_factory=dict)  # page, by what it holds and all that goes before
    keys: dict[int, bytes] = field(default_factory=dict)  # the reverse
    unused: OrderedDict[int, None] = field(default_factory=OrderedDict)  # kept pages, the longest unused first

    def __post_init__(self) -> None:
        self.free = list(range(self.size - 1, 0, -1))


def available(pool: Pool) -> int:
    return len(pool.free) + len(pool.unused)


def used(pool: Pool) -> int:
    return len(pool.users)


def take(pool: Pool) -> int:
    """A page that holds nothing of interest. Raises IndexError where there is none."""
    if pool.free:
        page = pool.free.pop()
    elif pool.unused:
        page, _ = pool.unused.popitem(last=False)
        del pool.by_key[pool.keys.pop(page)]
    else:
        raise IndexError("no page is left")
    pool.users[page] = 1
    return page


def find(pool: Pool, key: bytes) -> int | None:
    return pool.by_key.get(key)


def share(pool: Pool, page: int) -> None:
    """One more sequence has a page that is kept."""
    pool.unused.pop(page, None)
    pool.users[page] = pool.users.get(page, 0) + 1


def keep(pool: Pool, page: int, key: bytes) -> None:
    """From now on the page is found by its key: it is full, and nobody writes to it again."""
    if key not in pool.by_key and page not in pool.keys:
        pool.by_key[key], pool.keys[page] = page, key


def release(pool: Pool, page: int) -> None:
    pool.users[page] -= 1
    if pool.users[page]:
        return
    del pool.users[page]
    if page in pool.keys:
        pool.unused[page] = None
    else:
        pool.free.append(page)
