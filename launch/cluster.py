"""python -m launch.cluster up|down|list|render key=value ...: slices that are there without a run."""

import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from gemma.config import ConfigError
from launch import detached
from launch.command import CONF, arguments, main
from orchestrator import config as configs
from orchestrator import rundir, slices
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.topology import slice_type

VERBS = ("up", "down", "list", "render")
USAGE = """Slices that outlive a run, or were left by one.

  python -m launch.cluster list cluster=gcp                     what is there, and of it what dead runs left
  python -m launch.cluster down cluster=gcp run=ID              give back a run's, or what a killed one left
  python -m launch.cluster down cluster=gcp cluster.name=NAME   give back a name's
  python -m launch.cluster down cluster=gcp orphans=true        give back those of runs here that are dead
  python -m launch.cluster up cluster=gcp cluster.name=NAME cluster.slice=v5p-128 cluster.num_slices=2
                                   ask for slices and wait for them; launch.train with the same cluster.name takes them
  python -m launch.cluster render cluster=gcp ...               what would be asked for; nothing is touched

Or cluster=gke; up and render need its cluster.gke.image and cluster.gke.claim.
run.root (default: runs) is where runs lie. Exit code 0 done, 1 a mistake, 2 something is left or was not given."""


def composed(overrides: list[str]) -> Config:
    with initialize_config_dir(CONF, version_base="1.3"):
        container = OmegaConf.to_container(compose("run", overrides), resolve=True)
    assert isinstance(container, dict)
    config = configs.crossed({str(key): value for key, value in container.items()})
    if config.cluster.cloud is None:
        allowed = "allowed are cluster=gcp and cluster=gke; the others have no slices to keep"
        raise ConfigError(f"cluster={config.cluster.kind}: {allowed}")
    return config


def work() -> int:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        raise ConfigError(f"{verb or 'nothing'}: not a verb; allowed are {', '.join(VERBS)}")
    del sys.argv[1]
    own, overrides = arguments({"run": "", "orphans": "false"}, USAGE)
    if own["orphans"] not in ("true", "false"):
        raise ConfigError(f"orphans={own['orphans']}: allowed are true and false")
    config = composed(overrides)
    if verb == "list":
        return show(config)
    if verb == "down":
        return down(config, own["run"], own["orphans"] == "true")
    if config.cluster.name is None:
        raise ConfigError("cluster.name: missing; give the slices a name by which a run finds them")
    return up(config, config.cluster.name) if verb == "up" else render(config, config.cluster.name)


def tell(what: str, news: str) -> None:
    print(f"{what}: {news}", flush=True)


def is_dead(owner: str, root: str) -> bool:
    """Whether an owner is a run that lies here and that no process drives."""
    folder = Path(root, owner)
    return (folder / "manifest.json").exists() and not rundir.is_locked(folder)


def show(config: Config) -> int:
    price, now = config.cluster.price_per_chip_hour, time.time()
    table = Table("slice", "zone", "type", "capacity", "state", "owner", "age", "chip-hours", "cost", box=None)
    for request in sorted(slices.provider(config).opened(config, "").look(), key=lambda r: (r.owner, r.since)):
        hours = (now - request.since) / 3600
        chip_hours = hours * request.slices * slice_type(request.slice).chips
        dead = " (dead)" if is_dead(request.owner, config.run.root) else ""
        cost = f"{chip_hours * price:,.0f}" if price is not None else "-"
        row = [request.name, request.zone, request.slice, request.capacity, request.state.value, request.owner + dead]
        table.add_row(*row, f"{hours:.1f} h", f"{chip_hours:,.1f}", cost)
    Console(width=200 if not sys.stdout.isatty() else None).print(table if table.rows else "no slices")
    return Exit.FINISHED


def down(config: Config, run: str, orphans: bool) -> int:
    from orchestrator.slices import upkeep

    assert config.cluster.cloud is not None
    if (bool(run) + orphans + bool(config.cluster.name)) != 1:
        raise ConfigError("down: give one of run=ID, cluster.name=NAME, orphans=true")
    provider = slices.provider(config).opened(config, "")
    owners = [run or str(config.cluster.name)]
    if orphans:
        owners = sorted({r.owner for r in provider.look() if is_dead(r.owner, config.run.root)})
    elif run and Path(config.run.root, run).is_dir() and rundir.is_locked(Path(config.run.root, run)):
        raise ConfigError(f"run={run}: is being driven by a process; stop that first")
    elif run and detached.is_driven(Path(config.run.root, run)):
        raise ConfigError(f"run={run}: is being driven by a job on a cluster; launch.stop run={run} first")
    poll_s = config.cluster.cloud.poll_s
    left = [one for owner in owners for one in upkeep.clear(provider, owner, poll_s, tell, patient=True)]
    print("something is left" if left else "nothing is left")
    return Exit.GAVE_UP if left else Exit.FINISHED


def up(config: Config, owner: str) -> int:
    from orchestrator.slices import upkeep
    from orchestrator.slices.wanted import State

    kept = slices.provider(config).upkeep(config, owner)
    deadline = time.monotonic() + config.timeout.reserve_s
    with upkeep.kept(kept, keep=True, tell=tell) as given:
        while time.monotonic() < deadline:
            try:
                given.repair()
            except upkeep.NoSlicesError as error:
                tell("cluster", str(error))
                return Exit.GAVE_UP
            if sum(state is State.READY for state in kept.states.values()) >= kept.wanted.count:
                given.repair()
                return Exit.FINISHED
            time.sleep(0.1)
    tell("cluster", f"not all there after timeout.reserve_s={config.timeout.reserve_s:.0f}; what waits is kept")
    return Exit.GAVE_UP


def render(config: Config, owner: str) -> int:
    print(slices.provider(config).rendered(config, owner))
    return Exit.FINISHED


if __name__ == "__main__":
    main("cluster", work)
