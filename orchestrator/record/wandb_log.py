"""wandb: one run, one writer, in a thread of its own. Nothing that happens to wandb stops or slows training.

Steps lie on the axes `step` and `eval/step`, not on wandb's own counter, which drops whatever goes backwards. Offline,
each controller writes the whole history again, from metrics.jsonl and events.jsonl, and then removes the files of
earlier controllers: whatever was resumed, there is one file to send, and it is complete. Online, what the server holds
already is not sent again, and the offline files of earlier controllers are renamed, so that `wandb sync` leaves them
out. (Resumed with another learning rate, steps done twice differ: online wandb keeps the first, offline the last.)
"""

import contextlib
import math
import os
import queue
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.record import rundir

FINISH_TIMEOUT_S = 30.0
AXES = {"loss": "step", "eval/loss": "eval/step"}  # what tells the two kinds of rows, each written once a step
REPLAYED = "replayed-"  # before the name of an offline folder whose rows an online run has taken over
QUEUE_ROWS = 100_000  # what a hanging wandb may pile up before rows are dropped


def mode(config: Config) -> str:
    """auto is online where a key is found: in the environment, or in netrc as `wandb login` leaves it."""
    if config.wandb.mode != "auto":
        return config.wandb.mode
    if os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    return "online" if os.environ.get("WANDB_API_KEY") or known else "offline"


def eval_row(step: int, loss: float, bits_per_byte: float, sets: dict[str, float]) -> dict[str, Any]:
    """loss: of the run's own held-out split. sets: the loss of each held-out set by its name."""
    by_set = {f"eval/{name}/loss": value for name, value in sets.items()}
    return {"eval/step": step, "eval/loss": loss, "eval/bits_per_byte": bits_per_byte} | by_set


def manifest_of(folder: Path) -> rundir.Manifest | None:
    with contextlib.suppress(ConfigError):
        return rundir.read_manifest(folder)
    return None


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as wandb draws it: what is null in our files was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folders: Sequence[Path]) -> None:
    """Nobody knows whether the server got all: nothing is deleted."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rename(folder.with_name(f"{REPLAYED}{folder.name}"))


class WandbLog:
    """Rows go in without waiting; a thread starts wandb with the first of them and passes them on."""

    def __init__(self, config: Config, folder: Path, warn: Any):
        self.config, self.folder, self.warn = config, folder, warn
        self.mode = mode(config)
        self.rows: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self.thread: threading.Thread | None = None
        self.broken = self.mode == "disabled"

    def log(self, row: dict[str, Any]) -> None:
        if self.broken:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, name="wandb", daemon=True)
            self.thread.start()
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.give_up("it takes nothing any more")

    def work(self) -> None:
        try:
            before = sorted(self.folder.glob("wandb/offline-run-*"))
            run, known = self.start()
            # What earlier controllers wrote down; one that died may never have told wandb.
            for step, written in sorted(rundir.metrics(self.folder).items()):
                if step not in known["loss"]:
                    run.log(plain(written))
                    known["loss"].add(step)
            evals = {event["step"]: event for event in rundir.events(self.folder) if event["event"] == "eval"}
            for step, event in sorted(evals.items()):
                if step not in known["eval/loss"]:
                    run.log(plain(eval_row(step, event["loss"], event["bits_per_byte"], event.get("sets", {}))))
                    known["eval/loss"].add(step)
            if self.mode == "offline":
                remove(before)  # the new file holds all that they do
            else:
                set_aside(before)
            while (row := self.rows.get()) is not None:
                kind = next((name for name in AXES if name in row), None)
                if kind is not None:
                    if row[AXES[kind]] in known[kind]:
                        continue
                    known[kind].add(row[AXES[kind]])
                run.log(plain(row))
            run.finish()
            import wandb

            wandb.teardown()  # `finish` returns a moment before the last records are in the file; this waits
        except BaseException as error:  # wandb raises even SystemExit; training does not care
            self.give_up(f"{type(error).__name__}: {error}")

    def start(self) -> tuple[Any, dict[str, set[int]]]:
        """The wandb run, and the steps that its server holds already, by the name of what is logged once a step.

        An agent of a sweep names the run itself: the manifest keeps that id, and a resume goes on with it.
        """
        known: dict[str, set[int]] = {kind: set() for kind in AXES}
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        config, manifest = self.config, manifest_of(self.folder)
        if manifest is not None and len(manifest.attempts) > 1:
            for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):  # of the agent that began the run: not of its resume
                os.environ.pop(name, None)
        run = wandb.init(
            id=manifest.wandb_id if manifest else config.run.id,
            name=config.run.id,
            project=config.wandb.project,
            entity=config.wandb.entity,
            dir=str(self.folder),
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            config=asdict(config) | {"parent": manifest.parent if manifest else None},
            # The machine that trains is not the controller's: its own load would only mislead.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=60),
        )
        if manifest is not None and run.id != manifest.wandb_id:
            rundir.write_manifest(self.folder, replace(manifest, wandb_id=run.id))
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("eval/step")
        run.define_metric("eval/*", step_metric="eval/step")
        if self.mode == "online" and run.resumed:  # the newest value of each axis: rows of a kind go in step order
            newest = {kind: run.summary.get(axis) for kind, axis in AXES.items()}
            known = {kind: set(range(int(step) + 1)) for kind, step in newest.items() if step is not None}
            known = {kind: known.get(kind, set()) for kind in AXES}
        return run, known

    def give_up(self, why: str) -> None:
        if not self.broken:
            self.broken = True
            self.warn(f"wandb is off for the rest of this run ({why}); metrics.jsonl has everything")

    def finish(self) -> None:
        """Hands over what is left. Waits FINISH_TIMEOUT_S at most."""
        if self.thread is None:
            return
        if not self.broken:
            with contextlib.suppress(queue.Full):  # then it hangs, and the wait below ends it
                self.rows.put(None, timeout=1.0)
        self.thread.join(FINISH_TIMEOUT_S)
        if self.thread.is_alive():
            self.give_up(f"it did not finish within {FINISH_TIMEOUT_S:.0f} s")
