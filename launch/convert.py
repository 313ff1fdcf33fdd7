"""python -m launch.convert from=PATH to=PATH [key=value ...]: weights from one stored form into another."""

import contextlib
import ctypes
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from gemma.config import ConfigError, Model
from launch.command import CONF, arguments, main

USAGE = """Convert weights, a tensor at a time: Hugging Face folders, checkpoints of this project, released Flax ones.

  python -m launch.convert from=gemma-2-2b to=weights/2b                  Hugging Face folder -> checkpoint
  python -m launch.convert from=weights/2b to=export                      checkpoint -> Hugging Face folder
  python -m launch.convert from=runs/ID to=export dtype=bfloat16          a run's newest checkpoint, likewise
  python -m launch.convert from=flax/2b-it to=weights/2b model=gemma2_2b  released Flax/Orbax -> checkpoint
  python -m launch.convert from=weights/2b to=flax format=released        and back

  from       a folder of weights, or a run directory (required)
  to         the folder to be made; it must not exist (required)
  format     checkpoint | hf | released (default: checkpoint from what is none, hf from what is one)
  step       of a run: the checkpoint to take (default: the newest)
  model      of a released checkpoint: a file of conf/model, gemma2_2b or another
  gating     DF | FD: how a released MLP's first matrices lie; asked for only where their shape does not tell
  vocab      embedding rows to write: more are zeros, of fewer the last are left out (default: as they are).
             Hugging Face's weights have 256000, the released Flax ones 256128
  dtype      float32 | bfloat16 | float16 (default: as stored; then import -> export -> import is bitwise)
  tokenizer  a folder whose tokenizer files go into a Hugging Face folder (default: those that came with the import)
  shard_gb   the size of a safetensors file, at most (default: 5)

`train.init_from=PATH` starts a run from a checkpoint made here, or from a Hugging Face folder as it is."""

DEFAULTS = dict.fromkeys(
    ("from", "to", "format", "step", "model", "gating", "vocab", "dtype", "tokenizer", "shard_gb"), ""
)
FORMATS = ("checkpoint", "hf", "released")


def choice(own: dict[str, str], key: str, allowed: tuple[str, ...]) -> str | None:
    if own[key] and own[key] not in allowed:
        raise ConfigError(f"{key}={own[key]}: allowed are {', '.join(allowed)}")
    return own[key] or None


def above_0(own: dict[str, str], key: str, kind: type[int] | type[float]) -> Any:
    """The value of a key; None where it was not given."""
    try:
        value = kind(own[key]) if own[key] else None
    except ValueError:
        value = 0
    if value is not None and not 0 < value < 1e12:
        raise ConfigError(f"{key}={own[key]}: must be a {'whole ' if kind is int else ''}number above 0")
    return value


def named_model(name: str) -> Model | None:
    """A file of conf/model, as it stands there."""
    if not name:
        return None
    known = sorted(path.stem for path in Path(CONF, "model").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"model={name}: no such choice; allowed: {', '.join(known)}")
    return Model(**yaml.safe_load(Path(CONF, "model", f"{name}.yaml").read_text())["model"])


def work() -> int:
    own, rest = arguments(DEFAULTS, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: {', '.join(DEFAULTS)}")
    for key in ("from", "to"):
        if not own[key]:
            raise ConfigError(f"{key}: missing; give from=PATH and to=PATH")
    target = choice(own, "format", FORMATS)
    choice(own, "gating", ("DF", "FD"))
    choice(own, "dtype", ("float32", "bfloat16", "float16"))
    vocab, step = above_0(own, "vocab", int), above_0(own, "step", int)
    shard_gb = above_0(own, "shard_gb", float)
    tokenizer = Path(own["tokenizer"]).expanduser() if own["tokenizer"] else None
    if tokenizer and not tokenizer.is_dir():
        raise ConfigError(f"tokenizer={own['tokenizer']}: no such folder")
    one_heap()
    for stop in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # a stop leaves by the way that cleans up, from a shell's background too
        signal.signal(stop, signal.default_int_handler)
    try:
        return convert(own, named_model(own["model"]), target, step, vocab, int((shard_gb or 5) * 1e9), tokenizer)
    except KeyboardInterrupt:
        raise ConfigError(f"to={own['to']}: stopped; nothing is left there") from None


def convert(
    own: dict[str, str],
    model: Model | None,
    target: str | None,
    step: int | None,
    vocab: int | None,
    shard_bytes: int,
    tokenizer: Path | None,
) -> int:
    from gemma.weights import convert, folders, sources  # TensorStore: not before the arguments are known to be good

    started = time.monotonic()
    path, out = Path(own["from"]).expanduser(), Path(own["to"]).expanduser()
    try:
        kind = folders.find(path, step).kind
        source = sources.open_source(path, model=model, step=step, gating=own["gating"] or None)
        if isinstance(source, sources.Own):
            source.check_sums()
    except folders.WeightsError as error:
        raise ConfigError(f"from={own['from']}: {error}") from error
    if vocab is not None and vocab != source.model.vocab:
        print(f"convert: {vocab} embedding rows of {source.model.vocab}, {fate(source.model.vocab, vocab)}")
        source = sources.Resized(source, vocab)
    target = target or ("checkpoint" if kind in ("hf", "released") else "hf")
    dtype = sources.DTYPES[own["dtype"]] if own["dtype"] else None
    size = convert.check_room(out, source, dtype)
    with convert.whole(out) as partial:
        sidecars = tokenizer or (path / folders.SIDECARS if kind == "checkpoint" else path)
        if target == "hf":
            convert.write_hf(source, partial, shard_bytes, dtype)
            convert.copy_sidecars(sidecars, partial)
        elif target == "released":
            convert.write_released(source, partial, own["gating"] or convert.released_gating(source.model), dtype)
        else:
            convert.write_checkpoint(source, partial, dtype)
            convert.copy_sidecars(sidecars, partial / folders.SIDECARS)
    print(f"convert: {out} ({target}): {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s")
    return 0


def one_heap() -> None:
    """glibc gives TensorStore's threads a heap each, and each keeps what it has freed: together more than the largest
    tensor. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, bytes: large blocks go back at once


def fate(old: int, new: int) -> str:
    return f"the last {new - old} are zeros" if new > old else f"its last {old - new} are left out"


if __name__ == "__main__":
    main("convert", work)
