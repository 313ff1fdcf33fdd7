"""Stored forms of weights: Hugging Face folders, checkpoints, the released Flax layout. No JAX when imported."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma.model.transformer import Gemma


def load_hf(folder: str | Path, dtype: str = "float32") -> "Gemma":
    """Gemma 2 from a Hugging Face folder: see `gemma.model.load.load_hf`. Raises ConfigError."""
    from gemma.model import load  # JAX, which the rest of this room does without

    return load.load_hf(folder, dtype)
