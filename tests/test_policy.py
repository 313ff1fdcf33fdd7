"""Failures: evidence to outcome, outcome to decision; and how far the hosts are sent ahead. All pure."""

import random

import pytest

from orchestrator.programs.window import MOST_STEPS, deadline_s, due, snapshot_every, window_end
from orchestrator.recovery.outcome import Evidence, Outcome, classify
from orchestrator.recovery.policy import MOST_FREE, RETRIED, Failure, GiveUp, Restart, decide

BROKEN = "JaxRuntimeError"
OOM = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes"


DEAD = Evidence(1, died=True, time=5.0)


@pytest.mark.parametrize(
    ("evidence", "outcome", "rank"),
    [
        ([Evidence(0, exception=BROKEN, message="Connection closed"), DEAD], Outcome.HOST_DIED, 1),
        ([Evidence(0, died=True), Evidence(1, died=True, node_alive=False)], Outcome.NODE_DIED, 1),
        ([Evidence(0, died=True, node_alive=False, slice_alive=False)], Outcome.SLICE_LOST, 0),
        ([Evidence(0, died=True, crash="Fatal Python error: Segmentation fault")], Outcome.HOST_CRASHED, 0),
        # The first that died is the cause: its peers abort when they lose it.
        ([DEAD, Evidence(0, died=True, crash="Aborted", time=5.1)], Outcome.HOST_DIED, 1),
        ([DEAD, Evidence(0, died=True, crash="Segmentation fault", time=4.9)], Outcome.HOST_CRASHED, 0),
        ([Evidence(0, exception=BROKEN), Evidence(1, died=True, out_of_memory=True)], Outcome.OUT_OF_MEMORY, 1),
        ([Evidence(0, exception=BROKEN), Evidence(1, died=True, notice="SIGTERM")], Outcome.PREEMPTED, 1),
        ([Evidence(0, died=True, node_alive=False, notice="drained")], Outcome.PREEMPTED, 0),
        ([Evidence(0, overdue="run"), Evidence(1, overdue="run")], Outcome.HANG, 0),
        ([Evidence(0, overdue="run"), Evidence(1, overdue="run", stopped=True)], Outcome.HANG, 1),
        ([Evidence(0, exception=BROKEN, message="INTERNAL: Gloo: timed out")], Outcome.PEER_LOST, 0),
        ([Evidence(1, exception="XlaRuntimeError", message="UNAVAILABLE")], Outcome.PEER_LOST, 1),
        ([Evidence(0, exception="ValueError", message="the request timed out")], Outcome.ERROR, 0),
        ([Evidence(0, exception="TimeoutError", message="preempted")], Outcome.ERROR, 0),
        ([Evidence(0, exception=BROKEN, message="peer"), Evidence(1, exception="KeyError")], Outcome.ERROR, 1),
        (
            [Evidence(0, exception="KeyError", time=9.0), Evidence(1, exception="IndexError", time=8.0)],
            Outcome.ERROR,
            1,
        ),
        ([Evidence(0, exception=BROKEN, message="peer"), Evidence(1, exception=BROKEN, message=OOM)], Outcome.ERROR, 1),
        ([Evidence(0, exception=BROKEN), Evidence(1, exception="ConfigError", message="x")], Outcome.BAD_INPUT, 1),
        ([Evidence(0, exception="KeyError"), Evidence(1, exception="CheckpointError")], Outcome.CHECKPOINT, 1),
        ([Evidence(0, exception="LostError", message="40 was committed and is gone")], Outcome.LOST, 0),
        ([Evidence(0, exception="SnapshotError")], Outcome.SNAPSHOT, 0),
        ([Evidence(0, exception="Diverged")], Outcome.DIVERGED, 0),
        ([Evidence(0, exception="ConfigError"), Evidence(1, died=True)], Outcome.HOST_DIED, 1),
        ([Evidence(0, overdue="run"), Evidence(1, exception="KeyError")], Outcome.ERROR, 1),
        ([Evidence(0, died=True, node_alive=False), Evidence(1, unfit="chip 2 is slow")], Outcome.UNFIT, 1),
        ([Evidence(0)], Outcome.ERROR, 0),
    ],
)
def test_a_failure_is_classified_by_evidence_not_by_words(
    evidence: list[Evidence], outcome: Outcome, rank: int
) -> None:
    found, cause = classify(evidence)
    assert (found, cause.rank) == (outcome, rank)


def test_every_outcome_has_evidence_that_leads_to_it() -> None:
    (table,) = [mark.args[1] for mark in test_a_failure_is_classified_by_evidence_not_by_words.pytestmark]
    assert {row[1] for row in table} == set(Outcome) - {Outcome.REGROWN}  # which is told, not found out


def died(committed: int | None, step: int = 7) -> Failure:
    return Failure(Outcome.HOST_DIED, "host died", step, committed)


@pytest.mark.parametrize(
    ("history", "budget", "decision"),
    [
        ([None], 0, GiveUp),
        ([None], 1, Restart),
        ([None, None], 1, GiveUp),
        ([None, None, 10], 1, Restart),  # a new commit gives a new budget
        ([None, 10, 10], 2, Restart),
        ([None, 10, 10, 10], 2, GiveUp),
        ([10, 20, 30, 40, 50], 1, Restart),
    ],
)
def test_the_budget_counts_failures_since_the_last_new_commit(
    history: list[int | None], budget: int, decision: type
) -> None:
    assert isinstance(decide([died(committed) for committed in history], budget), decision)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_what_another_try_can_mend_is_tried_again(outcome: Outcome) -> None:
    final = {Outcome.ERROR, Outcome.BAD_INPUT, Outcome.DIVERGED, Outcome.LOST}
    decision = decide([Failure(outcome, "x", 7, 0, left=1)], 9)
    assert isinstance(decision, GiveUp) is (outcome in final)


def test_an_unreadable_checkpoint_is_passed_over_while_an_older_one_is_left() -> None:
    history = [Failure(Outcome.CHECKPOINT, "x", 0, None, left=left) for left in (2, 1, 0)]
    assert [type(decide(history[:n], 0)) for n in (1, 2, 3)] == [Restart, Restart, GiveUp]


def tries(failure: Failure, budget: int) -> int:
    """How often the same failure, without any progress, is answered by a restart."""
    history = [failure]
    while isinstance(decide(history, budget), Restart):
        history.append(failure)
        assert len(history) < 1000, "without a bound"
    return len(history) - 1


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("committed", [None, 7])
@pytest.mark.parametrize("outcome", Outcome)
def test_nothing_is_tried_again_for_ever_without_progress(outcome: Outcome, committed: int | None, left: int) -> None:
    assert tries(Failure(outcome, "x", 7, committed, left), 3) <= MOST_FREE


def test_failures_that_take_turns_without_progress_end_too() -> None:
    kinds = [Failure(outcome, outcome.value, 7, 7, left=3) for outcome in RETRIED]
    history: list[Failure] = []
    for failure in kinds * 100:
        history.append(failure)
        if isinstance(decide(history, 3), GiveUp):
            return
    pytest.fail("without a bound")


def test_preemptions_between_which_the_run_gets_on_are_free_however_many() -> None:
    history = [Failure(Outcome.PREEMPTED, "preempted", step, step) for step in range(200)]
    assert all(isinstance(decide(history[:n], 0), Restart) for n in range(1, 201))


def test_preemptions_do_not_count_against_the_budget_of_failures() -> None:
    history = [Failure(Outcome.PREEMPTED, "preempted", 7, 7)] * MOST_FREE
    assert isinstance(decide(history, 0), Restart)
    assert isinstance(decide([*history, died(7)], 1), Restart)
    assert isinstance(decide([died(7), *history, died(7)], 1), GiveUp)
    assert "30 are allowed" in decide([*history, history[0]], 0).reason


OWN = [Outcome.HOST_CRASHED, Outcome.OUT_OF_MEMORY, Outcome.HANG, Outcome.PEER_LOST]


@pytest.mark.parametrize("outcome", OWN)
@pytest.mark.parametrize(
    ("signature", "step", "decision"), [("s", 7, GiveUp), ("s", 6, GiveUp), ("s", 5, Restart), ("t", 7, Restart)]
)
def test_the_same_failure_twice_at_the_same_step_ends_the_run(
    outcome: Outcome, signature: str, step: int, decision: type
) -> None:
    before = Failure(outcome, signature, step, None)
    assert isinstance(decide([before, Failure(outcome, "s", 7, None)], 9), decision)


@pytest.mark.parametrize("outcome", [Outcome.HOST_DIED, Outcome.NODE_DIED, Outcome.SLICE_LOST])
def test_what_is_done_to_a_run_from_outside_may_strike_twice_at_a_step(outcome: Outcome) -> None:
    assert isinstance(decide([Failure(outcome, "s", 7, None)] * 2, 9), Restart)


def test_a_decision_says_why() -> None:
    assert "retry.budget=1" in decide([died(None), died(None)], 1).reason


def test_a_window_makes_a_step_at_least_and_crosses_no_stop_and_not_the_end() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        end = dice.randint(1, 500)
        first = dice.randrange(end)
        stops = (dice.choice([0, 1, 3, 10, 100]), dice.choice([0, 7, 50]))
        last = window_end(first, end, dice.choice([None, 0.001, 0.1, 0.9, 30.0]), stops)
        assert first < last <= min(end, first + MOST_STEPS)
        assert not [s for s in range(first + 1, last) if any(every and s % every == 0 for every in stops)]


@pytest.mark.parametrize(("step_s", "steps"), [(None, 1), (0.1, 10), (0.001, MOST_STEPS), (60.0, 1)])
def test_a_window_lasts_about_a_second(step_s: float | None, steps: int) -> None:
    assert window_end(1000, 10**6, step_s, (0, 0)) == 1000 + steps


@pytest.mark.parametrize(
    ("step", "every", "expected"), [(10, 5, True), (11, 5, False), (40, 0, True), (10, 0, False), (40, 7, True)]
)
def test_what_happens_every_so_often_also_happens_at_the_end(step: int, every: int, expected: bool) -> None:
    assert due(step, 40, every) is expected


@pytest.mark.parametrize(
    ("cost_s", "step_s", "every"),
    [(0.001, 0.1, 1), (0.002, 0.1, 2), (1.0, 0.1, 1000), (0.02, 5.0, 1), (0.0, 0.0, 1)],
)
def test_snapshots_are_as_dense_as_their_cost_allows(cost_s: float, step_s: float, every: int) -> None:
    found = snapshot_every(cost_s, step_s, 0.01)
    assert found == every
    assert cost_s <= 0.01 * found * step_s + 1e-9


def test_a_hang_is_what_takes_far_longer_than_the_run_has_shown() -> None:
    assert deadline_s(600, 60, None, 10) == 600  # nothing seen yet
    assert 60 < deadline_s(600, 60, 0.1, 10) < 70
    assert 200 < deadline_s(600, 60, 20.0, 1) <= 260
