"""Text to token ids. Both tokenizers share Gemma's special ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma.config import ConfigError, naming

PAD, EOS, BOS, UNK = 0, 1, 2, 3
BYTE_OFFSET = 4  # byte b is token b + 4


class Tokenizer(Protocol):
    vocab: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids a text, without BOS or EOS."""
        ...

    def piece(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8: maybe a part of a character. Nothing for control tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, 260 ids. Needs no file."""

    vocab = 256 + BYTE_OFFSET

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        utf8 = [text.encode("utf-8") for text in texts]
        return [np.frombuffer(raw, np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET) for raw in utf8]

    def piece(self, token: int) -> bytes:
        return bytes([token - BYTE_OFFSET]) if BYTE_OFFSET <= token < self.vocab else b""


class SentencePiece:
    """A SentencePiece model file, such as Gemma 2's of 256000 pieces."""

    def __init__(self, path: Path):
        import sentencepiece  # a third of a second that byte-level runs do not pay

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab = self.model.vocab_size()
        found = (self.model.pad_id(), self.model.eos_id(), self.model.bos_id())
        if found != (PAD, EOS, BOS):
            raise ValueError(f"its pad, eos and bos are {found}, Gemma's are {(PAD, EOS, BOS)}")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        dtype = np.uint16 if self.vocab <= 2**16 else np.uint32
        return [np.array(ids, dtype) for ids in self.model.encode(list(texts))]

    def piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab or self.model.is_control(token):
            return b""
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xNN>
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def load(name: str) -> Tokenizer:
    """The tokenizer `data.tokenizer` names. Raises ConfigError where the file cannot be used."""
    if name == "byte":
        return ByteTokenizer()
    with naming(f"data.tokenizer={name}"):
        path = Path(name).expanduser()
        found = path.is_file()
    if not found:
        raise ConfigError(f'data.tokenizer={name}: no such file; allowed: "byte" or the path of a SentencePiece model')
    try:
        return SentencePiece(path)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split()) or "unreadable"
        raise ConfigError(f"data.tokenizer={name}: not a SentencePiece model for Gemma ({why})") from error
