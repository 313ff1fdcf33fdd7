"""Which slices a run wants and who gives them: the `cluster` section of the configuration."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from gemma.config import require, require_at_least
from orchestrator.slices.topology import slice_type

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
HOST_PORT = r"[^\s:/]+:\d{1,5}"
DASHBOARD_PORT = 8265  # Ray's own default


@dataclass(frozen=True)
class Local:
    """What simulated slices do as a cloud's would, to rehearse it."""

    provision_s: float  # from being asked for to being there
    stock_out_s: float  # for so long there are none
    preempt_s: float | None  # the first one is taken away after so long; None is never
    notice_s: float  # after its hosts were told

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(value is None or value >= 0, f"cluster.local.{field.name}={value}: must be at least 0")

    @property
    def is_plain(self) -> bool:
        """Nothing of it: the slices are there at once, and stay."""
        return not self.provision_s and not self.stock_out_s and self.preempt_s is None


@dataclass(frozen=True)
class Gcp:
    """Google's Cloud TPU API."""

    project: str | None  # None is that of the credentials
    zones: tuple[str, ...]  # in order of preference
    patience_s: float  # for a zone that has no capacity now, before the next is asked
    valid_hours: float  # after so long without a slice a request ends by itself
    rejoin_s: float  # for the hosts of a slice to be in the Ray cluster, before it is given back for another
    reservation: str | None  # projects/P/locations/Z/reservations/R, with cluster.capacity=reserved
    runtime: str
    image: str | None  # of a container in which the host's part runs; None is the machine itself
    python: str  # that has what constraints.txt names, on the host or in the image
    startup_script: str | None  # a file here: run on each host before it joins
    network: str | None
    subnetwork: str | None
    external_ips: bool
    service_account: str | None
    disk: str | None  # a persistent disk that is there, attached read-only to each host
    port: int  # of the Ray cluster's head on this machine
    poll_s: float  # between two polls of what is there
    endpoint: str | None  # HOST:PORT of another server of the same API, asked without credentials: for tests

    def __post_init__(self) -> None:
        require(bool(self.zones), "cluster.gcp.zones=[]: empty; give zones that have v5p, as in [us-east5-a]")
        ok = all(re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone) for zone in self.zones)
        shown = ",".join(self.zones)
        require(ok, f"cluster.gcp.zones=[{shown}]: must be names of zones, as in us-east5-a")
        require(len(set(self.zones)) == len(self.zones), f"cluster.gcp.zones=[{shown}]: a zone is named twice")
        for name in ("patience_s", "valid_hours", "rejoin_s", "poll_s"):
            require(getattr(self, name) > 0, f"cluster.gcp.{name}={getattr(self, name)}: must be above 0")
        require(1024 <= self.port <= 65535, f"cluster.gcp.port={self.port}: must be from 1024 to 65535")


@dataclass(frozen=True)
class Gke:
    """Google Kubernetes Engine with the Ray operator, KubeRay."""

    kubeconfig: str | None  # None is KUBECONFIG, ~/.kube/config or, inside the cluster, the pod's own
    context: str | None  # of it; None is the current one
    namespace: str
    image: str | None  # of the pods: it has what constraints.txt names
    service_account: str | None  # of the pods, in Kubernetes
    claim: str | None  # a PersistentVolumeClaim for storage that all hosts share, with run.root
    mount: str  # where the pods have it
    reservation: str | None  # its name, with cluster.capacity=reserved
    host_network: bool  # the TPU hosts' pods are on their machines' network, metadata server and all
    cpus: int  # of a TPU host's pod
    memory_gib: int
    shared_memory_gib: int  # of that, where the snapshots lie
    head_cpus: int
    head_memory_gib: int
    poll_s: float  # between two polls of what is there

    def __post_init__(self) -> None:
        for name in ("cpus", "memory_gib", "shared_memory_gib", "head_cpus", "head_memory_gib"):
            require_at_least("cluster.gke", {name: getattr(self, name)}, 1)
        require(self.poll_s > 0, f"cluster.gke.poll_s={self.poll_s}: must be above 0")
        ok = re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.namespace)
        require(bool(ok), f"cluster.gke.namespace={self.namespace}: must be a Kubernetes name, as in default")
        require(self.mount.startswith("/"), f"cluster.gke.mount={self.mount}: must be a whole path, as in /shared")
        require(
            self.shared_memory_gib < self.memory_gib,
            f"cluster.gke.shared_memory_gib={self.shared_memory_gib}: is of the pod's memory; must be below"
            f" cluster.gke.memory_gib={self.memory_gib}",
        )


def dashboard_of(address: str) -> str | None:
    """Where Ray puts the dashboard of a cluster, unless told otherwise."""
    return f"{address.rpartition(':')[0]}:{DASHBOARD_PORT}" if re.fullmatch(HOST_PORT, address) else None


def check_complete(gke: Gke) -> None:
    """What must be known to ask for pods; to list them or give them back it need not. Raises ConfigError."""
    require(
        gke.image is not None,
        "cluster.gke.image: missing; give the pods an image that has what constraints.txt names",
    )
    require(
        gke.claim is not None,
        "cluster.gke.claim: missing; name a PersistentVolumeClaim that all pods can write (ReadWriteMany):"
        f" they mount it at cluster.gke.mount={gke.mount}, and run.root lies in it",
    )


@dataclass(frozen=True)
class Cluster:
    kind: Literal["local", "ray", "gcp", "gke"]
    slice: str
    topology: str | None  # AxBxC; None is the slice's usual one
    num_slices: int
    min_slices: int | None  # with so many the run goes on while others are lost; None is all
    address: str | None  # of a Ray cluster that exists already
    dashboard: str | None  # HOST:PORT of its dashboard; None is DASHBOARD_PORT of the address' host
    repair_s: float | None  # cluster=local: a lost host is replaced after so long; None is never
    capacity: Literal["on-demand", "spot", "reserved"]
    name: str | None  # slices that are this name's, not the run's: kept, and taken up by the next that gives it
    keep: bool  # the slices outlive the run
    price_per_chip_hour: float | None  # so that the ledger speaks of money
    max_chip_hours: float | None  # of the run, resumed or not: after so many it saves and stops
    local: Local | None
    gcp: Gcp | None
    gke: Gke | None

    def __post_init__(self) -> None:
        slice_type(self.slice, self.topology)
        require_at_least("cluster", {"num_slices": self.num_slices}, 1)
        require(
            self.min_slices is None or 1 <= self.min_slices <= self.num_slices,
            f"cluster.min_slices={self.min_slices}: must be from 1 to cluster.num_slices={self.num_slices}, or null",
        )
        require(
            self.repair_s is None or self.repair_s >= 0,
            f"cluster.repair_s={self.repair_s}: must be at least 0, or null",
        )
        allowed = "letters, digits, '-' and '_', at most 64, none of the last two in front"
        require(
            self.name is None or bool(re.fullmatch(NAME, self.name)), f"cluster.name={self.name}: {allowed}, or null"
        )
        for name in ("price_per_chip_hour", "max_chip_hours"):
            value = getattr(self, name)
            require(value is None or value > 0, f"cluster.{name}={value}: must be above 0, or null")
        ok = self.dashboard is None or re.fullmatch(HOST_PORT, self.dashboard)
        require(bool(ok), f"cluster.dashboard={self.dashboard}: must be HOST:PORT, or null")
        if self.kind == "ray":
            require(self.address is not None, "cluster.address: missing; cluster=ray needs cluster.address=HOST:PORT")
        if self.kind != "ray":
            brought = getattr(self, self.kind) is not None
            require(brought, f"cluster.{self.kind}: missing; cluster={self.kind} brings it")
        section = self.cloud
        outlive = section is not None or not (self.keep or self.name)
        which = "keep=true" if self.keep else f"name={self.name}"
        require(outlive, f"cluster.{which}: goes with cluster=gcp and cluster=gke; others have no slices to keep")
        if section is not None:
            require(
                (self.capacity == "reserved") == (section.reservation is not None),
                f"cluster.{self.kind}.reservation={section.reservation or 'null'}: goes with cluster.capacity=reserved,"
                f" which is {self.capacity}",
            )

    @property
    def dashboard_at(self) -> str | None:
        """HOST:PORT; None where the address does not tell."""
        return self.dashboard or dashboard_of(self.address or "")

    @property
    def cloud(self) -> Gcp | Gke | None:
        """The section of who is paid for slices; None where nobody is."""
        return {"gcp": self.gcp, "gke": self.gke}.get(self.kind)
