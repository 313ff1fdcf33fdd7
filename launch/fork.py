"""launch.train from=ID@STEP: a new run that begins with the weights, optimizer and data position of another."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gemma.config import ConfigError, require_local
from gemma.text import order as orders
from launch.command import apply
from orchestrator import change
from orchestrator import config as configs
from orchestrator.exit import Exit
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import manifest, rundir
from orchestrator.record.rundir import Manifest

OWN = ("run.id", "run.root", "run.cache", "resume.allow_data_change")  # of a run, never its parent's


def value_of(arguments: Sequence[str], key: str) -> str:
    return next((text.partition("=")[2] for text in reversed(arguments) if text.startswith(f"{key}=")), "")


def parent_of(text: str, root: str) -> tuple[Path, int]:
    """The folder and the step of from=ID@STEP or from=PATH@STEP; the step may be latest. Raises ConfigError."""
    name, _, step = text.rpartition("@") if "@" in text else (text, "", "latest")
    path = Path(name)
    folder = rundir.find(str(path.parent) if "/" in name else root, path.name)
    committed = rundir.committed(folder)
    if step == "latest" and committed:
        return folder, committed[-1]
    if not step.isdigit() or int(step) not in committed:
        there = ", ".join(map(str, committed)) or "none"
        raise ConfigError(
            f"from={text}: no such checkpoint; allowed is from=ID@STEP, of run {folder.name} steps {there}"
        )
    return folder, int(step)


def fork(arguments: Sequence[str], commanded: float) -> Exit:
    """The parent's config with overrides laid over it. Raises ConfigError, and then leaves nothing behind."""
    overrides = [text for text in arguments if not text.startswith("from=")]
    root = value_of(arguments, "run.root") or "runs"
    require_local("run.root", root)
    require_local("from", value_of(arguments, "from"))
    parent, step = parent_of(value_of(arguments, "from"), root)
    found = rundir.read_manifest(parent)
    old = found.config | {"run": found.config["run"] | {"id": None, "root": "runs"}}
    old |= {"resume": {"allow_data_change": False}, "detach": False}
    new = apply(old, overrides)
    config = configs.from_container(new)
    changed = [one for one in change.changes(configs.flatten(old), configs.flatten(new)) if one.key not in OWN]
    change.refuse(changed, allow_data_change=True, whose="a fork")
    if config.detach:
        raise ConfigError("detach=true: a fork begins where its parent lies; allowed is detach=false")
    if config.train.steps <= step:
        raise ConfigError(
            f"train.steps={config.train.steps}: the fork begins at step {step}; allowed: more than {step}"
        )
    preflight.check(config)
    preflight.check_fits(config)
    config = configs.with_id(config, config.run.id or rundir.new_id(config.model.name), config.run.root)
    made = replace(manifest.new(config, list(arguments)), parent={"id": found.id, "step": step})
    for one in changed:
        print(f"train: {one}")
    with Interrupt() as interrupt:
        folder = rundir.create(config.run.root, made.id)
        try:
            lock = rundir.lock(folder)
            begin(folder, parent, step, made)
            print(f"train: run {made.id} from step {step} of run {found.id} to {config.train.steps}", flush=True)

            from orchestrator.run import run  # Ray: not before the input is known to be good

            return run(config, folder, lock, interrupt, commanded)
        except ConfigError:
            if not rundir.metrics(folder):
                shutil.rmtree(folder)
            raise


def begin(folder: Path, parent: Path, step: int, made: Manifest) -> None:
    """The state in a new run's directory, as if the run had committed it. Nothing of the parent is linked: it stays as
    it is, whatever becomes of the copy. Raises ConfigError.
    """
    place = folder / "checkpoints"
    partial = place / f".{step}.partial"
    try:
        shutil.copytree(parent / "checkpoints" / str(step), partial)
        partial.rename(place / str(step))
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"from={parent}@{step}: cannot be copied to {place} ({error})") from error
    events = rundir.Appender(folder / "events.jsonl")
    told = rundir.events(parent)
    for event in told:
        if event.get("event") == "skip_batch" and event.get("step", 0) <= step:  # the data goes on without them
            events.write(event | {"attempt": 0})
    order = orders.recorded(told, step, orders.batch_of(told, step) or int(made.config["train"]["batch"]))
    committed = {"event": "commit", "attempt": 0, "step": step, "parent": asdict(made)["parent"]}
    events.write({"time": time.time(), **committed, "batches": order.batches})
    rundir.write_manifest(folder, made)
