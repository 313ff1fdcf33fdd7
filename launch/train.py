"""python -m launch.train key=value ...: trains Gemma 2 from one process."""

import shutil
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gemma.config import ConfigError
from launch import detached
from launch.command import CONF, MISTAKES, checked, main, process_started, tell
from launch.fork import fork
from orchestrator import config as configs
from orchestrator.exit import Exit
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import manifest, rundir, source

NOT_THERE = ("detach", "run.id", "run.root", "cluster.dashboard")  # of the overrides, on the head
codes: list[Exit] = []  # one a job; a sweep leaves with the worst
sweeps: set[Path] = set()


@hydra.main(config_path=CONF, config_name="run", version_base="1.3")
def job(composed: DictConfig) -> None:
    """One run. Raises no mistake of the user's through Hydra, which would add lines of its own."""
    if codes and codes[-1] is Exit.STOPPED:
        return  # the user asked for the end of the sweep
    commanded = time.monotonic() if codes else process_started()
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        sweeps.add(Path(hydra_config.sweep.dir).absolute())
    try:
        codes.append(train(composed, commanded))
    except MISTAKES as error:
        tell("train", error)
        if hydra_config.mode == RunMode.MULTIRUN:
            print(f"train: refused, the others go on: {' '.join(hydra_config.overrides.task)}", file=sys.stderr)
        codes.append(Exit.MISTAKE)


def train(composed: DictConfig, commanded: float) -> Exit:
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    config = configs.from_container({str(key): value for key, value in container.items()})
    if config.evaluate is not None:
        raise ConfigError("evaluate: goes with launch.evaluate")
    if config.plan.search or config.plan.smallest:
        raise ConfigError("plan.search, plan.smallest: only launch.plan searches")
    preflight.check(config)
    if not config.detach:  # its job does that on the head
        preflight.check_fits(config)
    run_id = config.run.id or rundir.new_id(config.model.name)
    config = configs.with_id(config, run_id, config.run.root)
    overrides = list(HydraConfig.get().overrides.task)
    if config.detach:
        assert config.cluster.dashboard_at is not None
        rest = [line for line in overrides if line.partition("=")[0].lstrip("+") not in NOT_THERE]
        at, sweep = config.cluster.dashboard_at, HydraConfig.get().mode == RunMode.MULTIRUN
        return detached.begin(at, run_id, config.run.root, "train", [*rest, f"run.id={run_id}"], sweep)
    with Interrupt() as interrupt:
        folder = rundir.create(config.run.root, run_id)
        lock = rundir.lock(folder)
        try:
            rundir.write_manifest(folder, manifest.new(config, overrides))
        except ConfigError:
            shutil.rmtree(folder)  # nothing is in it
            raise
        if source.is_submitted():
            print(f"train: run {run_id} in {folder}", flush=True)  # who submitted it waits for this

        from orchestrator.run import run  # Ray: not before the input is known to be good

        return run(config, folder, lock, interrupt, commanded)


def work() -> int:
    sys.argv[1:] = checked(sys.argv[1:])
    if any(argument.startswith("from=") for argument in sys.argv[1:]):
        return fork(sys.argv[1:], process_started())
    job()
    if set(codes) == {Exit.MISTAKE}:
        for folder in sweeps:  # Hydra's own record of the sweep: nothing was started, so nothing is left
            shutil.rmtree(folder, ignore_errors=True)
            for parent in (folder.parent, folder.parent.parent):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
    return max(codes, default=Exit.FINISHED)


def command() -> None:
    """The console script gemma-train: the same command, under a name that a shell can complete."""
    main("train", work)


if __name__ == "__main__":
    sys.argv[0] = "launch.train"
    command()
