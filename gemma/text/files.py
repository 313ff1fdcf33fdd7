"""Which files a data config names, and which beside them are left out, and why. Plain Python."""

import glob
import itertools
import os
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gemma.config import ConfigError, Data, naming

WHOLE = (".txt", ".md", ".rst", ".py")  # a document a file
LINES = (".jsonl", ".ndjson")  # a document a line
SUFFIXES = tuple(suffix + packed for suffix in (*WHOLE, *LINES) for packed in ("", ".gz"))
READ = f"{', '.join((*WHOLE, *LINES))}, each also with .gz"
MOST_NAMES = 1_000_000  # files and folders that are looked at
TOO_MANY = f"more than {MOST_NAMES:,} files and folders; put many documents into one .jsonl file, one a line"
NOT_A_CORPUS = ("/", "/proc", "/sys", "/dev")
# Of the standard library alone: what is no library code, and what was installed beside it.
SKIPPED_IN_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class LeftOut:
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    files: list[Path]  # that are read, sorted
    left_out: list[LeftOut]  # in the same place and not read, sorted

    def reasons(self) -> dict[str, int]:
        """How many were left out for each reason, the most frequent first."""
        return dict(Counter(one.reason for one in self.left_out).most_common())


def listing(data: Data, setting: str = "data.path") -> Listing:
    """What `data` reads. setting: the key that the user gave the path by.

    Raises ConfigError where there is nothing to read, or far too much.
    """
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = walk(root, (".py",), SKIPPED_IN_STDLIB)
        if not found.files:
            raise ConfigError(f"data=stdlib: no Python source below {root}; use data=text data.path=PATH")
        return Listing(found.files, [])  # what is left out there is no text of the user's
    with naming(f"{setting}={data.path}"):
        return of_path(str(data.path), setting)


def of_path(path: str, setting: str) -> Listing:
    """Of a file, a directory or a glob."""
    named = Path(path).expanduser()
    if named.is_file():
        if not is_read(named):
            raise ConfigError(
                f"{setting}={path}: {named.suffix or 'a name without suffix'} is not read; read are {READ}"
            )
        return Listing([named], [])
    if named.is_dir():
        if str(named.resolve()) in NOT_A_CORPUS:
            raise ConfigError(f"{setting}={path}: is no directory of text; give the one that holds the text")
        found = walk(named, SUFFIXES)
        what = "no text in this directory"
    else:
        matched = sorted(map(Path, itertools.islice(glob.iglob(str(named), recursive=True), MOST_NAMES + 1)))
        if len(matched) > MOST_NAMES:
            raise ValueError(TOO_MANY)
        if not matched:
            raise ConfigError(f"{setting}={path}: no such file or directory")
        chosen = [one for one in matched if one.is_file() and is_read(one)]
        others = [LeftOut(str(one), kind_of(one)) for one in matched if one.is_file() and not is_read(one)]
        folders = [LeftOut(str(one), "folder that a glob names") for one in matched if one.is_dir()]
        # A folder whose files the glob names as well (**) is not left out.
        parents = {parent for one in matched for parent in one.parents}
        found = Listing(chosen, others + [one for one in folders if Path(one.path) not in parents])
        what = "no text among what it names"
    if not found.files:
        shown = summary(found)
        raise ConfigError(f"{setting}={path}: {what}; read are {READ}{f' (there: {shown})' if shown else ''}")
    return found


def is_read(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def kind_of(path: Path) -> str:
    """The reason that a file is left out for."""
    if path.name.startswith("."):
        return "hidden file"
    return f"{path.suffix.lower()} file" if path.suffix else "file without suffix"


def walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> Listing:
    """All files below root. Not entered: hidden folders, links to folders (so that no loop can be), `skipped`."""
    found: list[Path] = []
    left_out: list[LeftOut] = []
    names_seen = 0

    def unreadable(error: OSError) -> None:
        left_out.append(LeftOut(str(error.filename), "folder that cannot be read"))

    for folder, dirs, names in os.walk(root, onerror=unreadable):
        names_seen += len(dirs) + len(names)
        if names_seen > MOST_NAMES:
            raise ValueError(TOO_MANY)  # `naming` puts the setting in front
        entered = []
        for name in sorted(dirs):
            path = Path(folder, name)
            if name in skipped:
                continue
            if name.startswith("."):
                left_out.append(LeftOut(str(path), "hidden folder"))
            elif path.is_symlink():
                left_out.append(LeftOut(str(path), "link to a folder"))
            else:
                entered.append(name)
        dirs[:] = entered
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not name.lower().endswith(suffixes):
                left_out.append(LeftOut(str(path), kind_of(path)))
            elif path.is_file():
                found.append(path)
            else:
                left_out.append(LeftOut(str(path), "link to nothing" if path.is_symlink() else "not a plain file"))
    return Listing(sorted(found), sorted(left_out, key=lambda one: one.path))


def summary(found: Listing) -> str:
    """In a few words: `.parquet file (3), hidden folder (1)`. Empty where all was read."""
    shown = [f"{reason} ({count})" for reason, count in found.reasons().items()]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more kinds" if len(shown) > 6 else "")
