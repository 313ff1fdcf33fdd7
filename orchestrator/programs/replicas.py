"""A server's replicas: slices that serve by themselves behind one address, as many as the load asks for.

Each is a run within the server's, in a folder and a thread of its own: its hosts fail, are replaced and stand again as
those of any run, and what it was computing goes on at another replica meanwhile.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma.config import ConfigError, Replicas
from orchestrator import config as configs
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.placement import Spot
from orchestrator.hosts.ready import Demand, Load
from orchestrator.interrupt import Interrupt
from orchestrator.programs.pipeline import stop_spending
from orchestrator.record import manifest, rundir
from orchestrator.record.progress import Screen
from orchestrator.record.report import Report
from orchestrator.slices.lease import Lease

LOOK_EVERY_S = 0.2
ROOMY = 0.5  # of the slots that fewer replicas would have: so much load leaves one of them to spare

# Works on hosts of one replica, again and again, until it is told to end.
Attempts = Callable[[Config, Path, Fleet, Report, Interrupt], Exit]


@dataclass
class Replica:
    number: int
    folder: Path
    interrupt: Interrupt  # its own: it can be ended by itself
    leaving: bool = False  # it was told to end, the server goes on
    left: Exit | Exception | None = None  # how it ended
    spots: tuple[Spot, ...] = ()  # where it was last

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass
class Trend:
    """Since when (time.monotonic()) there has been too much to do, or too little."""

    crowded: float | None = None
    roomy: float | None = None


@dataclass
class Server:
    config: Config
    folder: Path
    lease: Lease
    report: Report
    interrupt: Interrupt
    attempts: Attempts
    there: dict[int, Replica] = field(default_factory=dict)
    over: bool = False  # whatever a thread meets from now on is no news


def run(
    config: Config,
    folder: Path,
    lease: Lease,
    report: Report,
    interrupt: Interrupt,
    demand: Demand,
    attempts: Attempts,
) -> Exit:
    """Until the user ends it, or no replica is left. Raises ConfigError."""
    assert config.serve is not None
    server = Server(config, folder, in_turn(lease), report, interrupt, attempts)
    trend, code = Trend(), Exit.GAVE_UP
    try:
        for _ in range(config.serve.replicas.min):
            begin(server)
        while server.there:
            time.sleep(LOOK_EVERY_S)
            load = demand()
            report.phase("step" if load.standing else "start", f"{load.standing} of {len(server.there)} replicas stand")
            report.write_goodput()
            see_ended(server)
            if interrupt.asked() or stop_spending(report):
                code = Exit.STOPPED
                for replica in server.there.values():
                    replica.interrupt.count = 1
                continue
            count = sum(not replica.leaving for replica in server.there.values())
            wanted = wanted_replicas(config.serve.replicas, count, load, trend, time.monotonic())
            if wanted > count:
                server.lease.resize(len(server.there) + 1)
                begin(server)
            elif wanted < count:
                end(server, max(n for n, replica in server.there.items() if not replica.leaving))
        report.event("stop" if code is Exit.STOPPED else "give_up")
        return code
    finally:
        server.over = True


def wanted_replicas(settings: Replicas, count: int, load: Load, trend: Trend, now: float) -> int:
    """How many there should be: one more where requests have waited for settings.up_s though all stand, one fewer
    where the rest would have had room to spare for settings.down_s. Notes in `trend` since when.
    """
    crowded = load.waiting > 0 and load.standing >= count
    per_replica = load.slots / load.standing if load.standing else 0.0
    roomy = load.running + load.waiting <= ROOMY * per_replica * (count - 1) and load.standing >= count
    trend.crowded = (trend.crowded or now) if crowded else None
    trend.roomy = (trend.roomy or now) if roomy else None
    if count < settings.min:
        return count  # one has given up: nothing is tried without end
    if trend.crowded is not None and now - trend.crowded >= settings.up_s and count < settings.max:
        trend.crowded = None
        return count + 1
    if trend.roomy is not None and now - trend.roomy >= settings.down_s and count > settings.min:
        trend.roomy = None
        return count - 1
    return count


def begin(server: Server) -> None:
    number = next(n for n in range(len(server.there) + 1) if n not in server.there)
    replica = Replica(number, server.folder / f"replica-{number}", Interrupt())
    replica.interrupt.check = lambda: pass_on(server.interrupt, replica.interrupt)
    server.there[number] = replica
    server.report.event("replica", name=replica.name, news="begins")
    threading.Thread(target=attend, args=(server, replica), name=replica.name, daemon=True).start()


def pass_on(asked: Interrupt, own: Interrupt) -> None:
    asked.check()
    own.count = max(own.count, min(1, asked.count))


def end(server: Server, number: int) -> None:
    replica = server.there[number]
    replica.leaving, replica.interrupt.count = True, 1
    server.report.event("replica", name=replica.name, news="is not needed any more")
    server.report.screen.say(f"{replica.name}: is not needed any more")


def see_ended(server: Server) -> None:
    """Raises ConfigError where a replica found a mistake of the user's: it would be the same in all."""
    for number, replica in list(server.there.items()):
        if replica.left is None:
            continue
        if isinstance(replica.left, ConfigError):
            raise replica.left
        del server.there[number]
        said = replica.left.name.lower() if isinstance(replica.left, Exit) else type(replica.left).__name__
        server.report.event("replica", name=replica.name, news=f"ended: {said}")
        server.lease.resize(max(1, len(server.there)))
        if replica.leaving and replica.spots:
            server.lease.discard(replica.spots[0], "one replica fewer is needed")


def attend(server: Server, replica: Replica) -> None:
    """A replica's life, in its thread."""
    folder, config = replica.folder, configs.of_replica(server.config, replica.folder)
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / "manifest.json").exists():
            rundir.write_manifest(folder, manifest.new(config, [], "serve"))
        lock = rundir.lock(folder)
        report = Report(config, folder, time.monotonic(), Screen(server.report.screen, replica.name))
        try:
            with fleets.managed(config, folder, server.lease, f"{server.folder.name}-{replica.name}") as fleet:
                left = server.attempts(config, folder, fleet, report, replica.interrupt)
                replica.spots = fleet.placement.spots if fleet.placement else ()
        finally:
            report.close()
            lock.close()
        replica.left = left
    except Exception as error:
        if not server.over:
            story = folder / "failure.txt"  # its logs may not be there yet
            rundir.try_text(story, traceback.format_exc())
            if not isinstance(error, ConfigError):
                server.report.screen.say(f"{replica.name} failed: {error} ({story})")
        replica.left = error


def in_turn(lease: Lease) -> Lease:
    """The same for several threads: what starts or ends hosts is done by one at a time."""
    turn = threading.Lock()

    def repair() -> None:
        with turn:
            lease.repair()

    def discard(spot: Spot, why: str) -> None:
        with turn:
            lease.discard(spot, why)

    return replace(lease, repair=repair, discard=discard)
