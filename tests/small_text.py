"""Small texts on disk, and the data config that reads them."""

import json
from dataclasses import replace
from pathlib import Path

from gemma.config import Data

SEQUENCE, BATCH, VOCAB = 16, 8, 300
TEXTS = [f"document {number:03d}" for number in range(200)]


def config(path: Path, **changes: object) -> Data:
    base = Data(
        source="text",
        path=str(path),
        text_key="text",
        tokenizer="byte",
        sequence=SEQUENCE,
        eval_fraction=0.1,
        max_document_mb=1,
    )
    return replace(base, **changes)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
