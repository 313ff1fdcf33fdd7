"""Chips are looked at before they train: what a host finds, and who is judged unfit by it."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma.checkpoint import checksums
from gemma.messages import ChipFacts
from gemma.train import fitness as looking
from orchestrator.config import Fitness
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.fitness import Unfit, blamed, judge, misled
from orchestrator.hosts.placement import Spot, whole_slices
from orchestrator.record import rundir
from orchestrator.recovery.outcome import Evidence
from orchestrator.slices.lease import Lease, avoided
from orchestrator.slices.topology import NAME_LABEL, RANK_LABEL, TYPE_LABEL
from tests.test_config import config_of

CHIPS = 4
GB = 10**9
WANTED = Fitness(check=True, slow_factor=1.5, free_share=0.9)
SOUND = ChipFacts("tpu", CHIPS, 8, (95 * GB,) * 4, ("aa",) * 4, (2.4e-3,) * 4)


def found(**other: object) -> ChipFacts:
    return replace(SOUND, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([SOUND, SOUND], {}),
        ([SOUND], {}),
        ([SOUND, found(chips=3, products=(), seconds=())], {1: "3 of 4 chips are there"}),
        ([found(platform="cpu"), SOUND], {0: "it has no chips, and computes on its processor"}),
        ([found(platform="cpu", free_bytes=(), seconds=())] * 2, {}),
        ([SOUND, found(free_bytes=(95 * GB, 95 * GB, 20 * GB, 95 * GB))], {1: "chip 2 has 20.0 GB free, another 95.0"}),
        ([SOUND, found(free_bytes=(90 * GB,) * 4)], {}),
        ([found(free_bytes=()), found(free_bytes=())], {}),
        ([found(products=("aa", "bb", "aa", "bb")), SOUND], {0: "chip 1, 3 multiplies wrong"}),
        ([found(products=("aa", "aa", "aa", "bb"))], {0: "chip 3 multiplies wrong"}),  # among its own host's
        ([found(products=("bb",) * 4), SOUND, SOUND], {0: "chip 0, 1, 2, 3 multiplies wrong"}),
        (
            [found(products=("bb",) * 4), SOUND],
            {0: "chip 0, 1, 2, 3 multiplies as", 1: "chip 0, 1, 2, 3 multiplies as"},
        ),
        ([SOUND, found(seconds=(2.4e-3, 2.4e-3, 3.7e-3, 2.4e-3))], {1: "chip 2 is slow: .* 3.70 ms, others 2.40"}),
        ([SOUND, found(seconds=(2.4e-3, 2.4e-3, 3.5e-3, 2.4e-3))], {}),
        ([found(seconds=()), found(seconds=())], {}),
        (
            [found(chips=2, products=(), seconds=()), SOUND, SOUND, found(products=("aa", "aa", "bb", "aa"))],
            {0: "2 of 4 chips", 3: "chip 2 multiplies wrong"},
        ),
    ],
)
def test_a_host_is_judged_beside_the_others(hosts: list[ChipFacts], expected: dict[int, str]) -> None:
    unfit = judge(hosts, CHIPS, WANTED)
    assert [one.rank for one in unfit] == list(expected)
    for one in unfit:
        assert re.match(expected[one.rank], one.why), one.why


def test_slowness_is_not_looked_for_where_the_factor_is_null() -> None:
    slow = found(seconds=(1.0,) * 4)
    assert judge([SOUND, SOUND, slow], CHIPS, WANTED)
    assert not judge([SOUND, SOUND, slow], CHIPS, replace(WANTED, slow_factor=None))


def test_a_sum_over_all_chips_names_the_hosts_that_were_told_another() -> None:
    assert misled([(36,) * 4, (36,) * 4], 8) == []
    assert misled([(36,) * 4, (36, 36, 35, 36)], 8) == [Unfit(1, "a sum over all chips is 35, not 36")]


HELD = Evidence(1, exception="RuntimeError", message="the TPU is in use by another process")
LOST_PEER = Evidence(0, exception="JaxRuntimeError", message="DEADLINE_EXCEEDED")


@pytest.mark.parametrize(
    ("evidence", "unfit"),
    [
        ([HELD], {1: "RuntimeError: the TPU is in use"}),
        ([HELD, LOST_PEER], {1: "RuntimeError: the TPU is in use"}),  # who waited for it is not to blame
        ([replace(HELD, rank=0), HELD], {}),  # the program's fault, or the image's
        ([LOST_PEER], {}),
        ([replace(LOST_PEER, message="RESOURCE_EXHAUSTED: 1 GB")], {0: "JaxRuntimeError: RESOURCE_EXHAUSTED"}),
        ([Evidence(1, overdue="chip check")], {1: "its chips are overdue: chip check"}),
        ([Evidence(0, overdue="chip check"), Evidence(1, overdue="chip check")], {}),
        ([HELD, Evidence(0, died=True)], {}),
    ],
)
def test_chips_that_fail_one_host_are_its_own_what_befalls_all_is_nobodys(
    evidence: list[Evidence], unfit: dict[int, str]
) -> None:
    told = blamed(evidence, 2)
    assert {one.rank for one in told if one.unfit} == set(unfit)
    assert all(one.unfit.startswith(unfit[one.rank]) for one in told if one.unfit)
    assert unfit or told == evidence


def test_sound_chips_multiply_alike_and_a_spoilt_one_does_not(tmp_path: Path) -> None:
    sound, again = (looking.alone(8, 8, tmp_path) for _ in range(2))  # the second out of the cache
    assert sound == again
    assert (sound.chips, len(sound.products), len(set(sound.products))) == (8, 8, 1)
    spoilt = looking.alone(8, 8, tmp_path, spoilt=True)
    assert spoilt.products[1:] == sound.products[1:]
    assert spoilt.products[0] != sound.products[0]


def test_the_product_is_exact_so_right_is_one_value_whatever_the_chip(tmp_path: Path) -> None:
    size = looking.SIMULATED_SIZE
    at = np.arange(size * size, dtype=np.uint32).reshape(size, size)
    a_IK, b_KJ = (np.asarray(looking.numbers(at, first, "int32"), np.int64) for first in (0, size * size))
    assert {a_IK.min(), a_IK.max()} == {-128, 127}
    product = jax.numpy.asarray(a_IK @ b_KJ, "float32")
    expected = np.asarray(checksums.part_sums(product, product.shape, ((), ()))).tobytes().hex()
    assert set(looking.alone(8, 8, tmp_path).products) == {expected}
    mesh = looking.every_chip()
    as_on_chips = looking.multiplying(mesh, size, "bfloat16")(looking.salted(mesh, False))
    assert {np.asarray(part).tobytes().hex() for part in looking.parts(as_on_chips)} == {expected}


def test_all_chips_hear_of_each_other(tmp_path: Path) -> None:
    heard = looking.meet(tmp_path)
    assert heard == (36,) * 8
    assert misled([heard], 8) == []


def test_where_chips_are_missing_nothing_is_computed(tmp_path: Path) -> None:
    seen = looking.alone(12, 12, tmp_path)
    assert (seen.chips, seen.chips_in_all, seen.products) == (8, 8, ())
    assert [one.why for one in judge([seen], 12, WANTED)] == ["8 of 12 chips are there"]
    assert list(tmp_path.iterdir()) == []


def test_each_chip_has_a_time_of_its_own() -> None:
    mesh = looking.every_chip()
    program = looking.multiplying(mesh, 64, "float32")
    took = looking.shortest(program, looking.salted(mesh, False))
    assert len(took) == 8
    assert min(took) > 0


SPOT = Spot("s0", 1, "node-1", "10.0.0.2")


def test_a_quarantine_is_remembered_by_the_next_controller_and_by_node(tmp_path: Path) -> None:
    events = rundir.Appender(tmp_path / "events.jsonl")
    events.write({"event": "unfit", "host": SPOT.ip, "slice": "s0", "worker": 1, "node": "node-1", "why": "chip 0 x"})
    fleet = fleets.Fleet(
        config_of(), "test", Lease(lambda: None, avoided, lambda: None), quarantined=fleets.quarantined(tmp_path)
    )
    assert str(fleet.quarantined["node-1"]) == "host 10.0.0.2 (worker 1 of s0): chip 0 x"

    def slices(second: str) -> list[list[Spot]]:
        labels = [{NAME_LABEL: "s0", RANK_LABEL: str(worker), TYPE_LABEL: "v5p-16"} for worker in range(2)]
        nodes = [
            {"NodeID": node, "Labels": one, "Alive": True, "NodeManagerAddress": SPOT.ip}
            for node, one in zip(("node-0", second), labels, strict=True)
        ]
        return whole_slices(nodes, "v5p-16", 2, fleet.avoid)

    assert slices("node-1") == []
    assert len(slices("node-2")) == 1  # its successor, at the same address
    fleet.notices["node-2"] = "goes"
    assert slices("node-2") == []
