"""Tokens to text as they come: characters are held until they are whole, and what may become a stop string until it
cannot any more.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma.text.tokenizer import Tokenizer


@dataclass
class TextStream:
    """Of one answer. The texts that `add` and `end` return, joined, are the answer's text."""

    coder: Tokenizer
    stops: tuple[str, ...] = ()
    held: str = ""  # decoded, and not returned yet
    stopped: str | None = None  # the stop string that was met
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )


def add(stream: TextStream, tokens: Sequence[int]) -> str:
    """What is known for sure of the text after these tokens and was not before. Nothing after a stop string."""
    if stream.stopped is not None:
        return ""
    stream.held += stream.decoder.decode(b"".join(stream.coder.piece(token) for token in tokens))
    return taken(stream, uncertain(stream.held, stream.stops))


def end(stream: TextStream) -> str:
    """What was held back: nothing comes any more."""
    if stream.stopped is not None:
        return ""
    stream.held += stream.decoder.decode(b"", final=True)
    return taken(stream, 0)


def taken(stream: TextStream, keep: int) -> str:
    """The text but for its last `keep` characters, or all before the first stop string."""
    found = [(at, stop) for stop in stream.stops if (at := stream.held.find(stop)) >= 0]
    if found:
        at, stream.stopped = min(found)
        text, stream.held = stream.held[:at], ""
        return text
    cut = len(stream.held) - keep
    text, stream.held = stream.held[:cut], stream.held[cut:]
    return text


def uncertain(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
