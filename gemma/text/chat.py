"""Gemma 2's chat format: turns between control tokens, as the instruction-tuned weights were trained on.

    <bos><start_of_turn>user
    What is 2+2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

Source: the model card's formatting page (ai.google.dev/gemma/docs/formatting) and the chat template released with
gemma-2-2b-it. There is no system turn: a system message goes in front of the first user turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma.config import ConfigError
from gemma.text.tokenizer import BOS, EOS, PAD, ByteTokenizer, SentencePiece, Tokenizer

START_OF_TURN, END_OF_TURN = 106, 107
CONTROL = {"<start_of_turn>": START_OF_TURN, "<end_of_turn>": END_OF_TURN, "<bos>": BOS, "<eos>": EOS, "<pad>": 0}
ROLES = {"user": "user", "assistant": "model", "model": "model"}

Message = Mapping[str, str]  # role: system, user, assistant or model; content


@dataclass(frozen=True)
class Turn:
    role: str  # user or model
    content: str  # without white space around it, as in the released template


def turns(messages: Sequence[Message]) -> list[Turn]:
    """User and model in turn, the user first; a system message in front is folded into the first user turn.

    Raises ConfigError naming the message.
    """
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ConfigError(f"messages[{index}].{key}={message.get(key)}: must be text")
    system = messages[0]["content"].strip() if messages and messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not rest:
        raise ConfigError("messages: none; the first is the user's")
    found: list[Turn] = []
    for index, message in enumerate(rest, len(messages) - len(rest)):
        wanted = ("user", "model")[len(found) % 2]
        if ROLES.get(message["role"]) != wanted:
            allowed = "user" if wanted == "user" else "assistant or model"
            raise ConfigError(f"messages[{index}].role={message['role']}: must be {allowed} (user and model alternate)")
        found.append(Turn(wanted, message["content"].strip()))
    if system:
        found[0] = Turn("user", f"{system}\n\n{found[0].content}")
    return found


def text(messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The conversation as the released template writes it; prompt: the model's next turn is opened. To be read:
    a content that spells a control token cannot be told from one here, so encode with `tokens`.
    """
    shown = "".join(f"<start_of_turn>{t.role}\n{t.content}<end_of_turn>\n" for t in turns(messages))
    return "<bos>" + shown + ("<start_of_turn>model\n" if prompt else "")


def tokens(messages: Sequence[Message], coder: Tokenizer, *, prompt: bool = False) -> np.ndarray:
    """The conversation's ids, int32. prompt: it ends with the model's turn opened; else, for training, with one EOS.

    Control tokens come from here alone: a content that spells one becomes ordinary pieces. Raises ConfigError for a
    tokenizer without Gemma's.
    """
    start, end = turn_ids(coder)
    ids: list[int] = [BOS]
    for turn in turns(messages):
        ids += [start, *plain(f"{turn.role}\n{turn.content}", coder), end, *plain("\n", coder)]
    ids += [start, *plain("model\n", coder)] if prompt else [EOS]
    return np.array(ids, np.int32)


def turn_ids(coder: Tokenizer) -> tuple[int, int]:
    """<start_of_turn> and <end_of_turn>. Bytes have none of their own: they take the two ids after theirs, which no
    text makes. Raises ConfigError.
    """
    if isinstance(coder, ByteTokenizer):
        return coder.vocab, coder.vocab + 1
    check(coder)
    return START_OF_TURN, END_OF_TURN


def check(coder: Tokenizer) -> None:
    found = coder.model.piece_to_id(["<start_of_turn>", "<end_of_turn>"]) if isinstance(coder, SentencePiece) else None
    if found != [START_OF_TURN, END_OF_TURN]:
        raise ConfigError(
            f"data.tokenizer: its <start_of_turn> and <end_of_turn> are {found}; chat needs Gemma's,"
            f" where they are {[START_OF_TURN, END_OF_TURN]}"
        )


def plain(content: str, coder: Tokenizer) -> list[int]:
    """Ids of a text, none of them a control token: one that is spelt out is taken apart after its first letter."""
    pieces = [content]
    for name in CONTROL:
        pieces = [part for piece in pieces for part in apart(piece, name)]
    ids = [int(i) for row in coder.encode(pieces) for i in row]
    forged = {PAD, BOS, EOS, *turn_ids(coder)} & set(ids)
    if forged:
        raise ConfigError(f"data.tokenizer: makes the control ids {sorted(forged)} of plain text")
    return ids


def apart(piece: str, name: str) -> list[str]:
    """ "a<eos>b" as "a<", "eos>b"."""
    first, *others = piece.split(name)
    parts = [first]
    for other in others:
        parts[-1] += name[0]
        parts.append(name[1:] + other)
    return parts
