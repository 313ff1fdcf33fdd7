"""Which documents of a benchmark stand in a run's training text, by the words that they share with it.

A document counts as contaminated where GRAM words in a row of its question are in the text, whatever case and marks
they are written in. A shorter question counts by all its words, one of fewer than FEWEST never: they are anywhere.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma.config import Data
from gemma.text import documents, files
from gemma.text.documents import Repaired

GRAM, FEWEST = 13, 8
MOST_BYTES = 4e9  # of text that is searched: minutes
WORD = re.compile(r"\w+")

Key = tuple[str, int]  # a part's name and a document's number
Index = dict[int, dict[int, list[Key]]]  # by length in words, and by hash


def index_of(questions: Mapping[Key, str]) -> Index:
    found: Index = {}
    for key, question in questions.items():
        words = words_of(question)
        length = min(GRAM, len(words))
        if length >= FEWEST:
            of_length = found.setdefault(length, {})
            for gram in grams(words, length):
                of_length.setdefault(gram, []).append(key)
    return found


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def grams(words: list[str], length: int) -> Iterator[int]:
    return (hash(tuple(words[at : at + length])) for at in range(len(words) - length + 1))


def found_in(index: Index, texts: Iterable[str]) -> set[Key]:
    """The documents that stand in these texts."""
    found: set[Key] = set()
    for text in texts:
        words = words_of(text)
        for length, of_length in index.items():
            for gram in grams(words, length):
                if gram in of_length:
                    found.update(of_length[gram])
    return found


def texts_of(data: Data) -> Iterator[str]:
    """A run's training text, MOST_BYTES of it at most."""
    how, repaired, size = documents.reading(data), Repaired(), 0
    for path in files.listing(data).files:
        for text in documents.read(path, how, repaired):
            yield text
            size += len(text)
            if size > MOST_BYTES:
                return


def question_of(task: Any, instance: Any) -> str:
    """What a document asks, without examples before it."""
    asked = task.doc_to_text(instance.doc)
    return asked if isinstance(asked, str) and asked else "".join(str(part) for part in instance.args[:2])
