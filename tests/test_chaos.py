"""Random faults in one run: processes and hosts, between steps and amid saves, restores and compiles."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from gemma.config import ConfigError
from orchestrator.chaos.faults import Chaos, Fault, plan
from orchestrator.record import rundir
from tests.runs import assert_same_run, finish, goodput, launch, losses

RUN = ["checkpoint.every=20", "eval.every=50", "eval.rows=16", "optim.warmup_steps=5"]
OFF = Chaos(faults=(), random=0, kinds=("worker",), phases=("step",), seed=0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("steps", "faults", "seed"), [(60, 4, 4273), pytest.param(300, 20, 12, marks=pytest.mark.soak)], ids=["4", "20"]
)
def test_a_run_with_random_faults_ends_bitwise_like_an_undisturbed_one(
    tmp_path: Path, steps: int, faults: int, seed: int
) -> None:
    root, run = f"run.root={tmp_path}", [*RUN, f"train.steps={steps}"]
    finish(launch("train", root, "run.id=calm", *run), 0)
    random = ["chaos=random", f"chaos.random={faults}", f"chaos.seed={seed}"]
    finish(launch("train", root, "run.id=chaos", *run, *random), 0, 600)
    struck = [event for event in rundir.events(tmp_path / "chaos") if event["event"] == "chaos"]
    assert len(struck) == faults
    assert Counter(event["phase"] for event in struck).keys() == {"step", "save", "restore", "compile"}
    assert {"worker", "host"} <= {event["fault"] for event in struck}
    assert_same_run(tmp_path / "calm", tmp_path / "chaos", steps)
    assert len(losses(tmp_path / "chaos")) == steps
    found = goodput(tmp_path / "chaos")
    assert sum(found["buckets"].values()) == pytest.approx(found["wall_s"], rel=0.01)


def test_the_seed_decides_what_strikes_when() -> None:
    drawn = replace(OFF, random=9, kinds=("worker", "host"), phases=("step", "save"))
    assert plan(drawn, 100, 4) == plan(drawn, 100, 4) != plan(replace(drawn, seed=1), 100, 4)
    assert all(1 <= fault.step < 100 and 0 <= fault.rank < 4 for fault in plan(drawn, 100, 4))


def test_what_is_listed_strikes_as_it_says() -> None:
    listed = replace(OFF, faults=("worker@30", "host@60/1", "crash@90:save/3", "chip@0/1"))
    assert plan(listed, 100, 2) == [
        Fault(0, "worker", 30, "step", 0),
        Fault(1, "host", 60, "step", 1),
        Fault(2, "crash", 90, "save", 1),  # ranks go round
        Fault(3, "chip", 0, "check", 1),
    ]


@pytest.mark.parametrize(
    "text", ["worker", "worker@", "worker@x", "fire@3", "worker@3:lunch", "worker@3/x", "chip@3:step", ""]
)
def test_a_fault_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^chaos.faults="):
        replace(OFF, faults=(text,))
