"""What small JSON files say of their own content, so that a flipped digit is no other model."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and beside them their digest."""
    return {**values, KEY: digest(values)}


def unseal(values: Any) -> dict[str, Any]:
    """What `seal` was given. Raises ValueError where it is not that."""
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    inner = {key: value for key, value in values.items() if key != KEY}
    if values.get(KEY) != digest(inner):
        raise ValueError(f"its content is not what was written, by its {KEY}")
    return inner


def digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()  # a lone surrogate is read back as "?"
