"""Before they train, hosts that are new to the run show that their chips are sound; one whose are not is replaced."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gemma.messages import ChipFacts
from orchestrator.chaos import chaos, faults
from orchestrator.config import Config, Fitness
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Call, Group, HostsFailedError
from orchestrator.hosts.placement import Spot
from orchestrator.record.report import Report
from orchestrator.recovery.outcome import COLLECTIVE_ERRORS, Evidence
from orchestrator.slices.topology import CHIPS_PER_HOST


@dataclass(frozen=True)
class Unfit:
    rank: int
    why: str


def check(config: Config, group: Group, fleet: Fleet, report: Report, stop: Callable[[], bool]) -> None:
    """All hosts look where one is new: they would wait for it anyway, and it is judged beside the others. Hosts that
    were found sound and start again do not. Raises HostsFailedError, with the bad ones in quarantine, and StoppedError.
    """
    spots, started = group.placement.spots, time.monotonic()
    nodes = {spot.node_id for spot in spots}
    if not config.fitness.check or nodes <= fleet.fit:
        return
    report.phase("start", "checking chips")
    chaos.strike(faults.plan(config.chaos, config.train.steps, len(spots)), "check", group, fleet, report)
    try:
        found = check_chips(config, group, stop)
        unfit = judge(found, CHIPS_PER_HOST, config.fitness) or misled(meet(config, group, stop), found[0].chips_in_all)
        failed = [Evidence(one.rank, unfit=one.why, time=time.time()) for one in unfit]
    except HostsFailedError as error:
        failed = list(error.evidence)
    for item in failed:
        if item.unfit:
            quarantine(spots[item.rank], item.unfit, fleet, report)
    if failed:
        raise HostsFailedError(failed)
    fleet.fit |= nodes
    slowest = max((s for one in found for s in one.seconds), default=None)
    report.event("fit", duration_s=time.monotonic() - started, chips=found[0].chips_in_all, slowest_s=slowest)


def check_chips(config: Config, group: Group, stop: Callable[[], bool]) -> list[ChipFacts]:
    """Each host at its own chips."""
    refs = [w.check.remote(CHIPS_PER_HOST, config.chips, config.run.cache) for w in group.workers]
    try:
        return hosts.collect(Call("chip check", tuple(refs), config.timeout.check_s, group.placement), stop)
    except HostsFailedError as failed:
        raise HostsFailedError(blamed(failed.evidence, len(refs))) from failed


def meet(config: Config, group: Group, stop: Callable[[], bool]) -> list[tuple[int, ...]]:
    """All chips of all hosts together. Where a link is broken nobody gets through: that names no host."""
    refs = [w.meet.remote(config.run.cache) for w in group.workers]
    call = Call("a first collective of all chips", tuple(refs), config.timeout.check_s, group.placement)
    return hosts.collect(call, stop)


def blamed(evidence: Sequence[Evidence], count: int) -> list[Evidence]:
    """Hosts whose chips do not come up, or never answer, while those of others do are unfit. What befalls all `count`
    of them is no host's fault, and a death or a lost peer stays what it is. Pure.
    """
    own = [e.rank for e in evidence if e.overdue or e.exception and not is_collective(e)]
    if not own or len(own) == count or any(e.died for e in evidence):
        return list(evidence)
    return [
        replace(e, unfit=f"its chips are overdue: {e.overdue}" if e.overdue else f"{e.exception}: {e.message}")
        for e in evidence
        if e.rank in own
    ]


def is_collective(item: Evidence) -> bool:
    return item.exception in COLLECTIVE_ERRORS and not item.message.startswith("RESOURCE_EXHAUSTED")


def judge(found: Sequence[ChipFacts], chips: int, wanted: Fitness) -> list[Unfit]:
    """The hosts that should not train, by what all have found, in rank order. Pure. chips: of a host."""
    products = Counter(product for one in found for product in one.products)
    right = next((product for product, count in products.items() if 2 * count > products.total()), None)
    usual_s = statistics.median([s for one in found for s in one.seconds] or [0.0])
    most_bytes = max((free for one in found for free in one.free_bytes), default=0)
    simulated = all(one.platform == "cpu" for one in found)
    unfit = []
    for rank, one in enumerate(found):
        why = (
            missing(one, chips, simulated)
            or taken(one, wanted.free_share, most_bytes)
            or wrong(one, right)
            or slow(one, wanted.slow_factor, usual_s)
        )
        if why:
            unfit.append(Unfit(rank, why))
    return unfit


def missing(one: ChipFacts, chips: int, simulated: bool) -> str:
    if one.platform == "cpu" and not simulated:
        return "it has no chips, and computes on its processor"
    return f"{one.chips} of {chips} chips are there" if one.chips != chips else ""


def taken(one: ChipFacts, share: float, most_bytes: int) -> str:
    for chip, free in enumerate(one.free_bytes):
        if free < share * most_bytes:
            return f"chip {chip} has {free / 1e9:.1f} GB free, another {most_bytes / 1e9:.1f} GB: somebody holds them"
    return ""


def wrong(one: ChipFacts, right: str | None) -> str:
    """right: what more than half of all chips say; None where no such half is, and all are in doubt."""
    chips = [str(chip) for chip, product in enumerate(one.products) if product != right]
    if not chips:
        return ""
    says = "multiplies wrong" if right is not None else "multiplies as less than half of all do, and so does each other"
    return f"chip {', '.join(chips)} {says}"


def slow(one: ChipFacts, factor: float | None, usual_s: float) -> str:
    for chip, seconds in enumerate(one.seconds):
        if factor is not None and seconds > factor * usual_s:
            return f"chip {chip} is slow: a matrix product takes it {1e3 * seconds:.2f} ms, others {1e3 * usual_s:.2f}"
    return ""


def misled(heard: Sequence[tuple[int, ...]], chips: int) -> list[Unfit]:
    """The hosts that were told another sum of 1..chips than there is, in rank order. Pure."""
    total = chips * (chips + 1) // 2
    wrong = [(rank, [said for said in mine if said != total]) for rank, mine in enumerate(heard)]
    return [Unfit(rank, f"a sum over all chips is {said[0]}, not {total}") for rank, said in wrong if said]


def quarantine(spot: Spot, why: str, fleet: Fleet, report: Report) -> None:
    """The run trains on this host no more, resumed or not."""
    fleet.quarantined[spot.node_id] = one = fleets.Quarantined(spot, why)
    report.event("unfit", host=spot.ip, slice=spot.slice_name, worker=spot.worker_id, node=spot.node_id, why=why)
    report.screen.say(f"quarantined: {one}")
