"""An emulated cloud's queued resources, and what becomes of them by itself: tests/cloud_tpu.py serves them."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from google.cloud import tpu_v2alpha1 as tpu

from tests import machines

States = tpu.QueuedResourceState.State
CAPACITY = 'There is no more capacity in the zone "{}"; you can try in another zone where Cloud TPU Nodes are offered'


@dataclass(frozen=True)
class Settings:
    provision_s: float = 1.0
    delete_s: float = 0.2
    stock: dict[str, int] = field(default_factory=dict)
    empty: str = "wait"
    quota: tuple[str, ...] = ()
    denied: str = ""
    trouble: float = 0.0
    preempt_s: float | None = None
    notice_s: float = 5.0
    hosts: bool = True


@dataclass
class Given:
    """One queued resource."""

    resource: Any
    hosts: int
    moved_at: float  # to its state
    booted: list[machines.Machine] = field(default_factory=list)


@dataclass
class Cloud:
    settings: Settings
    place: machines.Machines
    endpoint: str = ""
    given: dict[str, Given] = field(default_factory=dict)
    operations: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[float, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    active_at: dict[str, float] = field(default_factory=dict)
    preempted: bool = False
    hook: Callable[[str, str], None] = lambda verb, moment: None  # called "before" and "after" a verb is obeyed
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def move(self, one: Given, state: Any) -> None:
        one.resource.state.state, one.moved_at = state, time.monotonic()
        name = one.resource.name.rpartition("/")[2]
        self.log.append(f"{time.time():.3f} {name} {state.name}")
        if state is States.ACTIVE:
            self.active_at[name] = time.time()


def zone_of(one: Given) -> str:
    return str(one.resource.name.split("/")[3])


def free(cloud: Cloud, zone: str) -> float:
    holding = (States.PROVISIONING, States.ACTIVE, States.SUSPENDING, States.DELETING)
    used = sum(o.hosts for o in cloud.given.values() if zone_of(o) == zone and o.resource.state.state in holding)
    return cloud.settings.stock.get(zone, float("inf")) - used


def tick(cloud: Cloud) -> None:
    """What happens by itself."""
    for name, one in list(cloud.given.items()):
        state, age_s = one.resource.state.state, time.monotonic() - one.moved_at
        if state in (States.ACCEPTED, States.WAITING_FOR_RESOURCES):
            if free(cloud, zone_of(one)) >= one.hosts:
                cloud.move(one, States.PROVISIONING)
            elif cloud.settings.empty == "fail":
                one.resource.state.failed_data.error.message = CAPACITY.format(zone_of(one))
                cloud.move(one, States.FAILED)
            elif state is States.ACCEPTED:
                cloud.move(one, States.WAITING_FOR_RESOURCES)
        elif state is States.PROVISIONING and age_s >= cloud.settings.provision_s:
            if cloud.settings.hosts:
                node = one.resource.tpu.node_spec[0].node
                one.booted = [machines.boot(cloud.place, dict(node.metadata), w) for w in range(one.hosts)]
            cloud.move(one, States.ACTIVE)
        elif state is States.ACTIVE and cloud.settings.preempt_s is not None and not cloud.preempted:
            if age_s >= cloud.settings.preempt_s:
                cloud.preempted = True
                preempt(cloud, one)
        elif state is States.SUSPENDING and age_s >= cloud.settings.notice_s:
            end(cloud, one)
            cloud.move(one, States.SUSPENDED)
        elif state is States.DELETING and age_s >= cloud.settings.delete_s:
            end(cloud, one)
            del cloud.given[name]
            cloud.log.append(f"{time.time():.3f} {name.rpartition('/')[2]} gone")


def preempt(cloud: Cloud, one: Given) -> None:
    for machine in one.booted:
        machines.warn(machine)
    cloud.move(one, States.SUSPENDING)


def end(cloud: Cloud, one: Given) -> None:
    for machine in one.booted:
        machines.end(cloud.place, machine)
    one.booted.clear()
