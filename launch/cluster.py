"""python -m launch.cluster up|down|list|render key=value ...: slices that are there without a run."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from gemma.config import ConfigError
from launch import detached
from launch.command import CONF, arguments, main
from orchestrator import config as configs
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.record import rundir
from orchestrator.slices import providers, upkeep
from orchestrator.slices.topology import slice_type
from orchestrator.slices.upkeep import Provider, RefusedError
from orchestrator.slices.wanted import Request, State

VERBS = ("up", "down", "list", "render")
RETRY_S = 1.0
# An owner, as far as can be told from here. unasked: it was submitted to a cluster that does not say whether it drives
# it. unknown: nothing here tells.
Fate = Literal["driven", "unasked", "kept", "dead", "unknown"]
USAGE = """Slices that outlive a run, or were left by one.

  python -m launch.cluster list cluster=gcp                     what is there, and of it what dead runs left
  python -m launch.cluster down cluster=gcp run=ID|latest       give back a run's, or what a killed one left
  python -m launch.cluster down cluster=gcp cluster.name=NAME   give back a name's
  python -m launch.cluster down cluster=gcp orphans=true        give back those of runs here that are dead, but
                                   what cluster.keep=true kept; and name those of which nothing here tells
  python -m launch.cluster up cluster=gcp cluster.name=NAME cluster.slice=v5p-128 cluster.num_slices=2
                                   ask for slices and wait for them; launch.train with the same cluster.name takes them
  python -m launch.cluster render cluster=gcp ...               what would be asked for; nothing is touched

Or cluster=gke; up and render need its cluster.gke.image and cluster.gke.claim.
run.root (default: runs) is where runs lie. force=true: down run=ID, though the cluster that the run was submitted to
does not say whether it drives it. Exit code 0 done, 1 a mistake, 2 something is left or was not given."""


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
    own, overrides = arguments({"run": "", "orphans": "false", "force": "false"}, USAGE)
    for key in ("orphans", "force"):
        if own[key] not in ("true", "false"):
            raise ConfigError(f"{key}={own[key]}: allowed are true and false")
    config = composed(overrides)
    if verb == "list":
        return show(config)
    if verb == "down":
        return down(config, own["run"], own["orphans"] == "true", own["force"] == "true")
    if config.cluster.name is None:
        raise ConfigError("cluster.name: missing; give the slices a name by which a run finds them")
    return up(config, config.cluster.name) if verb == "up" else render(config, config.cluster.name)


def tell(what: str, news: str) -> None:
    print(f"{what}: {news}", flush=True)


def judged(owner: str, root: str) -> tuple[Fate, str]:
    """What has become of an owner, and why that is thought."""
    folder = Path(root).expanduser() / owner
    if rundir.is_locked(folder):
        return "driven", "is being driven by a process; stop that first"
    if noted := detached.noted(owner, root):
        try:
            job = detached.job(noted, owner)
        except ConfigError as error:
            return "unasked", f"was submitted to the cluster of {noted.dashboard}, which does not tell ({error})"
        if not job.ended:
            return "driven", f"is being driven by a job on a cluster; launch.stop run={owner} first"
        if not (folder / "manifest.json").exists():
            return "unknown", f"its job has ended ({job.state}), and what it keeps is not known here"
    if not (folder / "manifest.json").exists():
        return "unknown", f"no such run is in run.root={root}, and none was submitted from here"
    try:
        keep = rundir.read_manifest(folder).config["cluster"].get("keep")
    except (ConfigError, KeyError) as error:
        return "unknown", str(error)
    return ("kept", "was to keep them (cluster.keep=true)") if keep else ("dead", "is not driven any more")


def listed(provider: Provider) -> Sequence[Request]:
    """Raises ConfigError where the provider does not tell."""
    deadline = time.monotonic() + upkeep.ANSWER_TIMEOUT_S
    while True:
        try:
            return provider.list_requests()
        except RefusedError as refused:
            if refused.kind != "trouble" or time.monotonic() > deadline:
                raise ConfigError(f"cluster={provider.kind}: {refused}") from refused
        time.sleep(RETRY_S)


def show(config: Config) -> int:
    price, now, root = config.cluster.price_per_chip_hour, time.time(), config.run.root
    table = Table("slice", "zone", "type", "capacity", "state", "owner", "age", "chip-hours", "cost", box=None)
    for request in sorted(
        listed(providers.provider(config).open_provider(config, "")), key=lambda r: (r.owner, r.since)
    ):
        hours = (now - request.since) / 3600
        chip_hours = hours * request.slices * slice_type(request.slice).chips
        waits = request.state is State.WAITING  # that costs nothing
        cost = f"{chip_hours * price:,.0f}" if price is not None and not waits else "-"
        row = [request.name, request.zone, request.slice, request.capacity, request.state.value]
        row += [request.owner + mark(request.owner, root), f"{hours:.1f} h", "-" if waits else f"{chip_hours:,.1f}"]
        table.add_row(*row, cost)
    Console(width=200 if not sys.stdout.isatty() else None).print(table if table.rows else "no slices")
    return Exit.FINISHED


def mark(owner: str, root: str) -> str:
    """Beside an owner's name; no cluster is asked for it."""
    if detached.noted(owner, root):
        return " (detached)"
    fate, _ = judged(owner, root)
    return f" ({fate})" if fate in ("dead", "kept") else ""


def down(config: Config, run: str, orphans: bool, force: bool = False) -> int:
    if (bool(run) + orphans + bool(config.cluster.name)) != 1:
        raise ConfigError("down: give one of run=ID, cluster.name=NAME, orphans=true")
    if force and not run:
        raise ConfigError("force=true: goes with run=ID")
    if orphans:
        return down_orphans(config, providers.provider(config).open_provider(config, ""))
    if not run:
        return delete_all(
            config, providers.provider(config).open_provider(config, ""), "cluster.name", str(config.cluster.name)
        )
    if run == "latest":
        run = rundir.find(config.run.root, run).name
    fate, why = judged(run, config.run.root)
    if fate == "driven":
        raise ConfigError(f"run={run}: {why}")
    if fate == "unasked" and not force:
        raise ConfigError(f"run={run}: may be driven: it {why}; force=true gives back all the same")
    return delete_all(config, providers.provider(config).open_provider(config, ""), "run", run)


def down_orphans(config: Config, provider: Provider) -> int:
    """Gives back what runs here that are dead have left, and says of all others why not."""
    found = {owner: judged(owner, config.run.root) for owner in sorted({r.owner for r in listed(provider)})}
    for owner, (fate, why) in found.items():
        how = {"kept": f"; run={owner} gives back", "unknown": f"; run={owner} gives back"}
        if fate != "dead":
            print(f"{owner}: not given back: {why}" + how.get(fate, ""))
    dead = [owner for owner, (fate, _) in found.items() if fate == "dead"]
    if not dead:
        print(f"nothing is left of dead runs in run.root={config.run.root}")
    return max((delete_all(config, provider, "run", owner) for owner in dead), default=Exit.FINISHED)


def delete_all(config: Config, provider: Provider, key: str, owner: str) -> int:
    assert config.cluster.cloud is not None
    looks: list[Sequence[Request] | None] = []  # None: the provider did not tell

    def list_requests() -> Sequence[Request]:
        looks.append(None)
        try:
            seen = provider.list_requests()
        except RefusedError as refused:
            if refused.kind == "forbidden":
                raise ConfigError(f"cluster={provider.kind}: {refused}") from refused
            raise
        looks[-1] = seen
        return seen

    watched, poll_s = replace(provider, list_requests=list_requests), config.cluster.cloud.poll_s
    left = upkeep.clear(watched, owner, poll_s, tell, patient=True)
    owners = {request.owner for seen in looks for request in seen or ()}
    if left or not looks or looks[-1] is None:
        print(f"{key}={owner}: something is left" if left else f"{key}={owner}: it is not known what is left")
        return Exit.GAVE_UP
    if owner in owners:
        print(f"{key}={owner}: nothing is left")
    else:
        others = ", ".join(sorted(owners)) or "none"
        print(f"{key}={owner} has no slices, so nothing is left of it; owners with slices: {others}")
    return Exit.FINISHED


def up(config: Config, owner: str) -> int:
    kept = providers.provider(config).upkeep(config, owner)
    deadline = time.monotonic() + config.timeout.reserve_s
    with upkeep.managed(kept, keep=True, tell=tell) as lease:
        while time.monotonic() < deadline:
            try:
                lease.repair()
            except upkeep.NoSlicesError as error:
                tell("cluster", str(error))
                return Exit.GAVE_UP
            if sum(state is State.READY for state in kept.states.values()) >= kept.wanted.count:
                lease.repair()
                return Exit.FINISHED
            time.sleep(0.1)
    tell("cluster", f"not all there after timeout.reserve_s={config.timeout.reserve_s:.0f}; what waits is kept")
    return Exit.GAVE_UP


def render(config: Config, owner: str) -> int:
    print(providers.provider(config).rendered(config, owner))
    return Exit.FINISHED


if __name__ == "__main__":
    main("cluster", work)
