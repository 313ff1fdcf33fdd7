"""wandb: one run, one writer, in a thread of its own. Nothing that happens to wandb stops or slows training.

Steps lie on the axis `step`, not on wandb's own counter, which drops whatever goes backwards. After a restart the
steps done again are the same to the bit, so what wandb has already is not sent twice. (Resumed with another learning
rate they differ: then wandb keeps the first of the steps done twice, metrics.jsonl both.)
"""

import contextlib
import os
import queue
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.record import rundir, wandb_spool

FINISH_TIMEOUT_S = 30.0
ONCE_A_STEP = ("loss", "eval/loss")  # what tells a row of a kind that is written once for each step
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
    return {"step": step, "eval/loss": loss, "eval/bits_per_byte": bits_per_byte} | by_set


def parent_of(folder: Path) -> dict[str, Any] | None:
    """The run and step that this one began from, if any."""
    with contextlib.suppress(ConfigError):
        return rundir.read_manifest(folder).parent
    return None


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
            run, known = self.start()
            # A controller that died may have written steps that never reached wandb.
            for step, written in sorted(rundir.metrics(self.folder).items()):
                if step not in known["loss"]:
                    run.log(written)
                    known["loss"].add(step)
            for event in rundir.events(self.folder):
                if event["event"] == "eval" and event["step"] not in known["eval/loss"]:
                    run.log(eval_row(event["step"], event["loss"], event["bits_per_byte"], event["sets"]))
                    known["eval/loss"].add(event["step"])
            while (row := self.rows.get()) is not None:
                once = next((name for name in ONCE_A_STEP if name in row), None)
                if once is not None:
                    if row["step"] in known[once]:
                        continue
                    known[once].add(row["step"])
                run.log(row)
            run.finish()
            import wandb

            wandb.teardown()  # `finish` returns a moment before the last records are in the file; this waits
        except BaseException as error:  # wandb raises even SystemExit; training does not care
            self.give_up(f"{type(error).__name__}: {error}")

    def start(self) -> tuple[Any, dict[str, set[int]]]:
        """The wandb run, and the steps it holds already, by the name of what is logged once a step."""
        known: dict[str, set[int]] = {name: set() for name in ONCE_A_STEP}
        if self.mode == "offline":
            known = {name: wandb_spool.steps(self.folder, name) for name in ONCE_A_STEP}
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        config = self.config
        run = wandb.init(
            id=config.run.id,
            name=config.run.id,
            project=config.wandb.project,
            entity=config.wandb.entity,
            dir=str(self.folder),
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            config=asdict(config) | {"parent": parent_of(self.folder)},
            # The machine that trains is not the controller's: its own load would only mislead.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=60),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if self.mode == "online" and run.resumed:
            last = run.summary.get("step")
            known = {name: set(range(int(last or 0) + 1)) for name in ONCE_A_STEP}
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
