"""python -m launch.resume run=ID|latest [key=value ...]: goes on with a run."""

import time
from dataclasses import asdict, replace

from gemma.config import ConfigError
from launch import detached
from launch.command import apply, arguments, main, process_started
from orchestrator import change
from orchestrator import config as configs
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import rundir, source
from orchestrator.recovery import checkpoints
from orchestrator.slices.cluster import dashboard_of

USAGE = """Go on with a run from its newest checkpoint.

  python -m launch.resume run=latest
  python -m launch.resume run=ID train.steps=800          extend it; the learning rate's schedule stays as it was
  python -m launch.resume run=ID train.steps=800 optim.decay_steps=800   extend it and its schedule
  python -m launch.resume run=ID mesh.fsdp=4 mesh.tensor=2   onto another mesh
  python -m launch.resume run=ID detach=true             a detached run, where it lies
  python -m launch.train from=ID@STEP ...                a new run from there; this one stays as it is

  run       the run's id, or latest (required)
  run.root  where runs lie (default: runs)
  detach    true: the controller is a job on the head of the Ray cluster (default: false)
  cluster.dashboard   HOST:PORT of it, or cluster.address; not needed where the run was submitted from

Overrides are classified and printed: safe (more steps, logging), resharding (mesh, cluster), changing the training from
here on (optim, guard), changing the data order (data, train.seed, train.batch: refused unless
resume.allow_data_change=true), forbidden (model). So is the learning rate: before and after them, and at the end."""


def work() -> int:
    own, overrides = arguments({"run": "", "run.root": "runs", "detach": "false", "cluster.dashboard": ""}, USAGE)
    if not own["run"]:
        raise ConfigError("run: missing; give run=ID or run=latest")
    if own["detach"] not in ("true", "false"):
        raise ConfigError(f"detach={own['detach']}: must be true or false")
    if own["detach"] == "true":
        return resume_there(own, overrides)
    folder = rundir.find(own["run.root"], own["run"])
    manifest = rundir.read_manifest(folder)
    if manifest.id != folder.name:
        raise ConfigError(
            f"run={folder.name}: {folder} is a copy of run {manifest.id}, or was renamed, and two runs of one id would"
            f" mix; name it {manifest.id} again, or fork it: python -m launch.train from={folder}@latest"
        )
    old = manifest.config | {"run": manifest.config["run"] | {"root": own["run.root"]}}
    old |= {"resume": {"allow_data_change": False}, "detach": False}
    new = apply(old, overrides)
    config, former = configs.from_container(new), configs.from_container(old)
    new |= {"optim": asdict(config.optim)}  # lengths of the schedule that were null are numbers now
    found = change.changes(configs.flatten(old), configs.flatten(new))
    change.refuse(found, config.resume.allow_data_change)
    trains = config.evaluate is None and config.serve is None
    committed = checkpoints.resumable(folder) if trains else None
    done = committed or 0
    if trains and config.train.steps <= done:
        raise ConfigError(
            f"train.steps={config.train.steps}: run {folder.name} has done {done} already;"
            f" allowed: more than {done}, as in train.steps={2 * done}"
        )
    preflight.check(config)
    preflight.check_fits(config)
    lock = rundir.lock(folder)  # refused here, before anything is written, where another process drives the run
    for item in found:
        print(f"resume: {item}")
    if trains:
        never = "" if committed else " (nothing had been saved yet)"
        print(f"resume: {change.rates(former.optim, config.optim, done, config.train.steps)}")
        print(f"resume: run {folder.name} from step {done} to {config.train.steps}{never}", flush=True)
    code = source.source()
    attempt = rundir.Attempt("resume", overrides, time.time(), code.commit)
    resumed = replace(
        manifest,
        config=asdict(config),
        attempts=[*manifest.attempts, attempt],
        mesh=asdict(config.program.mesh),
        git_commit=code.commit,
        git_diff=code.diff,
    )
    with Interrupt() as interrupt:
        rundir.write_manifest(folder, resumed)

        from orchestrator.run import run  # Ray: not before the input is known to be good

        try:
            return run(config, folder, lock, interrupt, process_started())
        except ConfigError:
            rundir.write_manifest(folder, manifest)  # what a host refused is not what the run is
            raise


def resume_there(own: dict[str, str], overrides: list[str]) -> int:
    """The same as a job, where the run lies: there its manifest is read, and what may not be is refused."""
    from orchestrator import jobs

    overridden = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    own |= {"cluster.address": overridden.get("cluster.address", "")}
    at, run = detached.dashboard(own), own["run"]
    if at is None:  # the directory is here as there
        folder = rundir.find(own["run.root"], run)
        at, run = dashboard_of(str(rundir.read_manifest(folder).config["cluster"]["address"])), folder.name
        own |= {"run": run, "run.root": str(folder.parent)}
    if at is None:
        raise ConfigError(f"run={run}: detach=true needs cluster.dashboard=HOST:PORT, or cluster.address=HOST:PORT")
    run, root = detached.run_and_root(jobs.connect(at), own)
    return detached.begin(at, run, root, "resume", [f"run={run}", *overrides])


if __name__ == "__main__":
    main("resume", work)
