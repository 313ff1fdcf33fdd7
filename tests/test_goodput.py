"""The ledger of time, on a clock of whole seconds, where sums are exact."""

import random

import pytest

from orchestrator.record.goodput import BUCKETS, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_switch_charges_the_bucket_that_ends() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.switch("reserve")
    clock.now += 5
    assert ledger.switch("step") == 5
    clock.now += 15
    found = ledger.snapshot()
    assert (ledger.seconds["reserve"], ledger.seconds["step"]) == (5, 15)
    assert (found["wall_s"], found["goodput"]) == (20, 0.75)


@pytest.mark.parametrize(("asked", "moved"), [(3, 3), (0, 0), (10, 10), (11, 10), (-4, 0)])
def test_a_move_takes_no_more_than_there_is_and_never_less_than_nothing(asked: float, moved: float) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.switch("step")
    clock.now += 10  # not yet charged when the move comes
    ledger.move("step", "save", asked)
    assert (ledger.seconds["step"], ledger.seconds["save"]) == (10 - moved, moved)


@pytest.mark.parametrize("seed", range(5))
def test_buckets_sum_to_wall_time_whatever_happens(seed: int) -> None:
    dice, clock = random.Random(seed), Clock()
    ledger, carried = Ledger(clock), 0.0
    for _ in range(300):
        clock.now += dice.randint(0, 9)
        match dice.randrange(4):
            case 0:
                ledger.switch(dice.choice(BUCKETS))
            case 1:
                ledger.move(dice.choice(BUCKETS), dice.choice(BUCKETS), dice.randint(-3, 20))
            case 2:
                ledger.snapshot()
            case 3:
                earlier = {name: float(dice.randint(0, 5)) for name in dice.sample(BUCKETS, 3)}
                carried += sum(earlier.values())
                ledger.carry({"buckets": earlier, "restarts": 0})
    found = ledger.snapshot()
    assert sum(ledger.seconds.values()) == clock.now - 1000.0 + carried == found["wall_s"]
    assert min(ledger.seconds.values()) >= 0


def test_a_resumed_run_carries_on_from_what_goodput_json_said() -> None:
    clock = Clock()
    first = Ledger(clock)
    first.switch("step")
    clock.now += 30
    first.restarts = 2
    second = Ledger(clock)
    second.carry(first.snapshot())
    clock.now += 10
    found = second.snapshot()
    assert (found["wall_s"], found["goodput"], found["restarts"]) == (40, 0.75, 2)


def test_a_run_that_has_not_lasted_has_no_goodput() -> None:
    assert Ledger(Clock()).snapshot()["goodput"] == 0.0
