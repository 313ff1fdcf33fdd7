"""The small JSON files beside weights, which others have written: bounded before they are read."""

import json
from pathlib import Path
from typing import Any

from gemma.weights.layout import WeightsError

MOST_SHOWN = 200  # characters
MOST_BYTES = 64 << 20  # the index of a model of any size has some hundred kilobytes


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Raises WeightsError naming the file where it is too large, nested too deeply, or no JSON."""
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise WeightsError(f"{path.name}: {size:,} bytes; allowed are {most_bytes:,}")
        return json.loads(path.read_text())
    except RecursionError as error:
        raise WeightsError(f"{path.name} cannot be read: nested too deeply") from error
    except WeightsError:
        raise
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}") from error


def shown(value: Any) -> str:
    """A foreign value, cut to a part of one line. Python itself refuses to write integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() >= 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(str(value).split())
    except ValueError:  # such an integer within a list
        return f"a {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
