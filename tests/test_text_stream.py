"""The parts of a stream, joined, are the answer's text: whatever the cuts, no character split, no stop string shown."""

import random
from pathlib import Path

import pytest

from gemma.text import stream as streams
from gemma.text.stream import TextStream
from gemma.text.tokenizer import BYTE_OFFSET, ByteTokenizer

BYTES = ByteTokenizer()
TEXT = "naïve 😀 日本語 end. Stop here: STOP and on"


def cuts(tokens: list[int], rng: random.Random) -> list[list[int]]:
    found, at = [], 0
    while at < len(tokens):
        size = rng.randint(1, 5)
        found.append(tokens[at : at + size])
        at += size
    return found


def joined(tokens: list[int], stops: tuple[str, ...], seed: int) -> tuple[list[str], TextStream]:
    stream = TextStream(BYTES, stops)
    parts = [streams.add(stream, part) for part in cuts(tokens, random.Random(seed))]
    return [*parts, streams.end(stream)], stream


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_whole_characters_and_make_the_text(seed: int) -> None:
    tokens = [byte + BYTE_OFFSET for byte in TEXT.encode()]
    parts, _ = joined(tokens, (), seed)
    assert "".join(parts) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("seed", range(200))
def test_any_bytes_make_what_decoding_them_at_once_makes(seed: int) -> None:
    raw = random.Random(seed).randbytes(40)
    parts, _ = joined([byte + BYTE_OFFSET for byte in raw], (), seed)
    assert "".join(parts) == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("stops", [("STOP",), ("日本",), ("STOP", "here: ST"), (" and on",), ("n", "TOP"), ("absent",)])
def test_nothing_of_a_stop_string_is_shown_and_nothing_before_it_is_lost(seed: int, stops: tuple[str, ...]) -> None:
    parts, stream = joined([byte + BYTE_OFFSET for byte in TEXT.encode()], stops, seed)
    ends = [TEXT.find(stop) + len(stop) for stop in stops if stop in TEXT]
    met = min((stop for stop in stops if stop in TEXT), key=lambda stop: TEXT.find(stop) + len(stop), default=None)
    text = "".join(parts)
    if met is None:
        assert text == TEXT
        assert stream.stopped is None
        return
    assert stream.stopped is not None
    assert TEXT.startswith(text)
    assert not any(stop in text for stop in stops)
    assert len(text) <= min(ends)
    assert text + stream.stopped == TEXT[: len(text) + len(stream.stopped)]


def test_what_may_become_a_stop_is_held_and_given_at_the_end() -> None:
    stream = TextStream(BYTES, ("STOP",))
    assert streams.add(stream, [byte + BYTE_OFFSET for byte in b"a STO"]) == "a "
    assert streams.add(stream, [byte + BYTE_OFFSET for byte in b"R"]) == "STOR"
    assert streams.add(stream, [byte + BYTE_OFFSET for byte in b"S"]) == ""
    assert streams.end(stream) == "S"


def test_control_tokens_are_no_text() -> None:
    assert [BYTES.piece(token) for token in (0, 1, 2, 3, 260, 261, 10**6)] == [b""] * 7


SENTENCEPIECE = Path(__file__).parents[2] / "shared" / "data" / "tokenizer" / "gemma2.model"


@pytest.mark.skipif(not SENTENCEPIECE.is_file(), reason="needs Gemma's tokenizer")
def test_pieces_of_gemma_s_tokenizer_join_to_what_it_decodes() -> None:
    from gemma.text.tokenizer import SentencePiece

    coder = SentencePiece(SENTENCEPIECE)
    for text in (TEXT, "  two  spaces\n\ttab", "\u200bzero width", "a" * 50, "🏳️‍🌈 flags"):
        (ids,) = coder.encode([text])
        assert b"".join(coder.piece(int(token)) for token in ids).decode() == text == coder.model.decode(ids.tolist())
