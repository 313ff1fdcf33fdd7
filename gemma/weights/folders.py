"""What kind of weights a path holds, and of which model. Plain: looks at small files only.

`hf`: a Hugging Face folder. `checkpoint`: what `launch.convert` imports, `model.json` beside `checkpoint/`. `run`: a
run directory. `released`: an Orbax checkpoint as Google releases it, which does not say of which model it is.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dacite

from gemma.config import ConfigError, Model
from gemma.digest import seal, unseal
from gemma.weights import hf_config
from gemma.weights.layout import WeightsError
from gemma.weights.small_json import read_json

Kind = Literal["hf", "checkpoint", "run", "released"]
KINDS = "a Hugging Face folder, an imported checkpoint, a run directory or a released Orbax checkpoint"
SIDECARS = "hf"  # in an imported folder: the tokenizer's files, for the way back


@dataclass(frozen=True)
class Found:
    kind: Kind
    folder: Path
    model: Model | None  # None: released
    arrays: Path  # of kinds other than hf: the Orbax checkpoint


def find(path: Path, step: int | None = None) -> Found:
    """Raises WeightsError: what is there instead. step: of a run, the newest where None."""
    if not path.exists():
        raise WeightsError("no such file or directory")
    if (path / "manifest.json").is_file():
        return Found("run", path, run_model(path), run_step(path, step) / "default")
    if step is not None:
        raise WeightsError(f"step={step}: only a run directory has steps")
    if (path / "config.json").is_file():
        return Found("hf", path, hf_config.read(path), path)
    if (path / "model.json").is_file():
        return Found("checkpoint", path, as_model(unsealed(path / "model.json", "")), path / "checkpoint")
    if (path / "_METADATA").is_file():
        return Found("released", path, None, path)
    raise WeightsError(f"holds no weights; allowed is {KINDS}")


def as_model(values: Any) -> Model:
    try:
        return dacite.from_dict(Model, values, dacite.Config(strict=True))
    except (dacite.DaciteError, ConfigError, TypeError, AttributeError) as error:
        raise WeightsError(f"its model cannot be read: {error}") from error


def model_json(model: Model) -> str:
    return json.dumps(seal(asdict(model)), indent=1) + "\n"


def unsealed(path: Path, key: str) -> dict[str, Any]:
    """What a file says under a key (all of it: ""), if it is as it was written. Raises WeightsError."""
    found = read_json(path)
    try:
        return unseal(found[key] if key else found)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path.name}: {error}") from error


def run_model(path: Path) -> Model:
    config = unsealed(path / "manifest.json", "config")
    if "model" not in config:
        raise WeightsError("manifest.json names no model")
    return as_model(config["model"])


def run_step(path: Path, step: int | None) -> Path:
    """A committed checkpoint of a run: Orbax renames it to its step when it is whole."""
    there = path / "checkpoints"
    steps = sorted(int(p.name) for p in there.iterdir() if p.name.isdigit()) if there.is_dir() else []
    if not steps:
        raise WeightsError("a run without a checkpoint yet")
    if step is not None and step not in steps:
        raise WeightsError(f"step={step}: has no checkpoint; allowed: {', '.join(map(str, steps))}")
    return there / str(steps[-1] if step is None else step)
