"""What kind of weights a path holds, and of which model. Plain: looks at small files only.

`hf`: a Hugging Face folder. `checkpoint`: what `launch.convert` imports, `model.json` beside `checkpoint/`. `run`: a
run directory. `released`: an Orbax checkpoint as Google releases it, which does not say of which model it is.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import dacite

from gemma import hf_config
from gemma.config import ConfigError, Model
from gemma.layout import WeightsError

Kind = Literal["hf", "checkpoint", "run", "released"]
KINDS = "a Hugging Face folder, an imported checkpoint, a run directory or a released Orbax checkpoint"
SIDECARS = "hf"  # in an imported folder: the tokenizer's files, for the way back
FREE = {"name", "vocab", "context"}  # of Model: what weights do not fix; rows of the embedding may be added


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
        return Found("checkpoint", path, as_model(read_json(path / "model.json")), path / "checkpoint")
    if (path / "_METADATA").is_file():
        return Found("released", path, None, path)
    raise WeightsError(f"holds no weights; allowed is {KINDS}")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path.name} cannot be read: {error}") from error


def as_model(values: Any) -> Model:
    try:
        return dacite.from_dict(Model, values, dacite.Config(strict=True))
    except (dacite.DaciteError, ConfigError, TypeError, AttributeError) as error:
        raise WeightsError(f"its model cannot be read: {error}") from error


def model_json(model: Model) -> str:
    return json.dumps(asdict(model), indent=1) + "\n"


def run_model(path: Path) -> Model:
    manifest = read_json(path / "manifest.json")
    try:
        return as_model(manifest["config"]["model"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"manifest.json names no model ({error!r})") from error


def run_step(path: Path, step: int | None) -> Path:
    """A committed checkpoint of a run: Orbax renames it to its step when it is whole."""
    there = path / "checkpoints"
    steps = sorted(int(p.name) for p in there.iterdir() if p.name.isdigit()) if there.is_dir() else []
    if not steps:
        raise WeightsError("a run without a checkpoint yet")
    if step is not None and step not in steps:
        raise WeightsError(f"step={step}: has no checkpoint; allowed: {', '.join(map(str, steps))}")
    return there / str(steps[-1] if step is None else step)


def check_model(key: str, path: str, wanted: Model) -> None:
    """The weights at a path, named by a config key, are of `wanted`, but that it may have more embedding rows.

    Not only the shapes: weights under another window, cap or query scale are another model. Raises ConfigError.
    """
    try:
        found = find(Path(path).expanduser()).model
        if found is None:
            raise WeightsError("released weights do not say of which model they are; import them with launch.convert")
    except WeightsError as error:
        raise ConfigError(f"{key}={path}: {error}") from error
    for field in (f.name for f in fields(Model) if f.name not in FREE):
        ours, theirs = getattr(wanted, field), getattr(found, field)
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ConfigError(f"model.{field}={ours}: {key}={path} has model.{field}={theirs}")
    if wanted.vocab < found.vocab:
        raise ConfigError(f"model.vocab={wanted.vocab}: {key}={path} has {found.vocab} rows; allowed: at least as many")
