"""What KubeRay is asked for, held by a golden file: python -m tests.test_gke_render writes it again."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gemma.config import ConfigError
from orchestrator.config import Config, crossed
from orchestrator.slices import gke
from orchestrator.slices.raycluster import raycluster
from orchestrator.slices.topology import CHIPS_PER_HOST, TOPOLOGIES
from orchestrator.slices.wanted import request_name
from tests.runs import finish, launch
from tests.test_config import container

GOLDEN = Path(__file__).with_name("gke_raycluster.yaml")
GIVEN = ["cluster=gke", "cluster.name=mine", "cluster.gke.image=europe-docker.pkg.dev/p/r/gemma:1"]
GIVEN += ["cluster.gke.claim=runs", "run.root=/shared/runs"]
CASES = [
    [],
    ["cluster.capacity=spot", "cluster.gke.service_account=trainer", "cluster.gke.host_network=true"],
    ["cluster.capacity=reserved", "cluster.gke.reservation=march"],
    ["cluster.slice=v5p-128", "cluster.num_slices=2"],
    ["cluster.slice=v5p-512", "cluster.topology=4x4x16", "cluster.gke.namespace=training"],
    ["cluster.slice=v5p-8"],
]


def of(*overrides: str) -> Config:
    return crossed(container(*GIVEN, *overrides))


def rendered() -> str:
    return "---\n".join(f"# {' '.join(case) or 'a v5p-16'}\n{gke.rendered(of(*case), 'mine')}\n" for case in CASES)


def test_the_raycluster_is_the_golden_one() -> None:
    assert rendered() == GOLDEN.read_text()


def test_the_command_prints_it_and_touches_nothing(tmp_path: Path) -> None:
    nowhere = f"cluster.gke.kubeconfig={tmp_path / 'none'}"
    out = finish(launch("cluster", "render", *GIVEN, nowhere), 0)
    assert yaml.safe_load(out) == next(yaml.safe_load_all(GOLDEN.read_text()))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_hosts_of_a_slice_have_its_chips_as_the_web_hook_demands(name: str) -> None:
    found = yaml.safe_load(gke.rendered(of(f"cluster.slice={name}"), "mine"))
    (group,) = found["spec"]["workerGroupSpecs"]
    topology = group["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert group["numOfHosts"] * CHIPS_PER_HOST == math.prod(map(int, topology.split("x")))


@pytest.mark.parametrize("image", ["a'b", 'a"b', "a: {b}", "a\n- b", "{{ a }}", "#", "<&>", "null", "é"])
def test_no_value_becomes_structure(image: str) -> None:
    config = of()
    found = raycluster(config.cluster, replace(config.cluster.gke, image=image), "mine", "some")
    for group in (found["spec"]["headGroupSpec"], *found["spec"]["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == image


def test_no_name_is_longer_than_kuberay_takes() -> None:
    assert len(request_name("x" * 64, 4e9, 0)) <= 53


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.gke.image=null", r"cluster\.gke\.image: missing; give the pods an image"),
        ("cluster.gke.claim=null", r"cluster\.gke\.claim: missing; name a PersistentVolumeClaim"),
        ("cluster.gke.mount=shared", r"cluster\.gke\.mount=shared: must be a whole path"),
        ("cluster.gke.shared_memory_gib=400", r"cluster\.gke\.shared_memory_gib=400: is of the pod's memory"),
        ("cluster.gke.namespace=A_b", r"cluster\.gke\.namespace=A_b: must be a Kubernetes name"),
        ("cluster.gke.cpus=0", r"cluster\.gke\.cpus"),
        ("cluster.gke.poll_s=0", r"cluster\.gke\.poll_s=0"),
        ("cluster.capacity=reserved", r"cluster\.gke\.reservation=null: goes with cluster\.capacity=reserved"),
    ],
)
def test_what_no_cluster_could_take_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gke.rendered(of(override), "mine")


if __name__ == "__main__":
    GOLDEN.write_text(rendered())
