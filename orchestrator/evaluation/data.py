"""A user's files of benchmarks → documents in the form of the data sets that lm-eval's tasks read.

A function a data set, named by `data` in rows/NAME.yaml: from the folder that the user gives to the documents of each
split of each part. A row without parts has one, of the data set's name. docs/evaluation-data.md says which files.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Splits = dict[str, list[Document]]
Parts = dict[str, Splits]
Read = Callable[[Path], Parts]


class NoDataError(Exception):
    """The data of a row is not there, or not in its form: one line that names the file."""


def parts(read: Read, folder: Path) -> Parts:
    """What `read` finds in the user's folder. Raises NoDataError."""
    try:
        return read(folder)
    except (OSError, EOFError, zlib.error) as error:
        raise NoDataError(f"{folder}: {read.__name__} cannot be read: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, csv.Error, SyntaxError) as error:
        told = f"{type(error).__name__}: {error}"
        raise NoDataError(f"{folder}: {read.__name__} is in a form that is not known ({told})") from error


def lines(path: Path) -> Iterator[str]:
    """Of a text file, or of the one beside it whose name goes on with .gz."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    elif packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    else:
        raise NoDataError(f"{path} is not there, nor {packed.name}")


def documents(path: Path) -> Iterator[Document]:
    """A JSON object a line."""
    for number, line in enumerate(lines(path), 1):
        try:
            one = json.loads(line)
        except ValueError as error:
            raise NoDataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(one, dict):
            raise NoDataError(f"{path}: line {number} is not an object")
        yield one


def first(path: Path, count: int) -> list[Document]:
    return list(islice(documents(path), count))


def whole(path: Path) -> Any:
    """A file that is one JSON value."""
    return json.loads("".join(lines(path)))


def table(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(lines(path), delimiter=delimiter))
