"""Every fault that a run must survive, done on purpose to a real run: real Ray nodes, processes, signals.

Each ends bitwise as the undisturbed run does, unless its test says why not.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import rundir
from tests.runs import SMALL, assert_same_run, event_names, finish, goodput, launch, losses, wait_for, wait_for_step

STEPS = 40
LOST = 1  # step at most, of those that were done when the fault struck


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(small_run: Path) -> Path:
    return small_run


def struck(root: Path, faults: str, *overrides: str, code: int = 0) -> Path:
    """A run to which these faults happen. Whatever they are, its ledger sums to wall time."""
    folder = root / faults.replace("@", "-").replace("/", "-").replace(":", "-").replace(",", "-")
    chaos = ["chaos=listed", f"chaos.faults=[{faults}]"]
    finish(launch("train", f"run.root={root}", f"run.id={folder.name}", *SMALL, *chaos, *overrides), code)
    named = [override.partition("=")[2] for override in overrides if override.startswith("run.id=")]
    folder = root / (named[0] if named else folder.name)
    found = goodput(folder)
    assert sum(found["buckets"].values()) == pytest.approx(found["wall_s"], rel=0.01)
    return folder


def incidents(folder: Path) -> list[dict[str, Any]]:
    return goodput(folder)["incidents"]


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("worker@15/1", "host died"),
        ("host@15/0", "node died"),
        pytest.param("crash@15/0", "host crashed", marks=pytest.mark.soak),
        pytest.param("host@15/1", "node died", marks=pytest.mark.soak),
    ],
)
def test_what_is_lost_comes_back_from_memory(undisturbed: Path, root: Path, fault: str, outcome: str) -> None:
    folder = struck(root, fault)
    (found,) = incidents(folder)
    assert (found["outcome"], found["rank"], found["source"]) == (outcome, int(fault[-1]), "memory")
    assert found["steps_lost"] <= LOST
    # Chips are looked at where a host is new: what recovers on the same hosts waits for no such thing.
    assert event_names(folder).count("fit") == (2 if outcome == "node died" else 1)
    assert_same_run(undisturbed, folder, STEPS)


def test_a_host_with_a_wrong_chip_is_quarantined_by_name_and_replaced(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "chip@0/1")
    (found,) = incidents(folder)
    assert (found["outcome"], found["rank"], found["step"]) == ("unfit host", 1, 0)
    (unfit,) = [event for event in rundir.events(folder) if event["event"] == "unfit"]
    assert (unfit["slice"], unfit["worker"], unfit["why"]) == ("simulated-0", 1, "chip 0 multiplies wrong")
    assert event_names(folder).count("initialise") == 1
    assert_same_run(undisturbed, folder, STEPS)


def test_where_nobody_replaces_a_bad_host_the_run_goes_around_it_resumed_or_not(
    root: Path, existing_cluster: str
) -> None:
    where = [f"run.root={root}", "cluster=ray", f"cluster.address={existing_cluster}", "train.dtype=float32"]
    chaos = ["chaos=listed", "chaos.faults=[chip@0/1]"]
    finish(launch("train", "run.id=around", *where, *SMALL, *chaos, "timeout.replace_s=2"), 2)
    finish(launch("resume", "run=around", f"run.root={root}", "timeout.reserve_s=2"), 2)
    reasons = [event["reason"] for event in rundir.events(root / "around") if event["event"] == "give_up"]
    assert len(reasons) == 2
    assert all("(worker 1 of s0): chip 0 multiplies wrong" in reason for reason in reasons)
    assert event_names(root / "around").count("unfit") == 1


def test_an_announced_departure_saves_moves_on_and_is_free(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "preempt@15/1", "retry.budget=0")
    (found,) = incidents(folder)
    assert (found["outcome"], found["rank"], found["steps_lost"]) == ("preempted", 1, 0)
    commits = [event["step"] for event in rundir.events(folder) if event["event"] == "commit"]
    assert found["step"] in commits
    assert_same_run(undisturbed, folder, STEPS)


def test_a_hang_is_ended_once_all_stacks_are_in_the_run_directory(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "hang@15/1", "timeout.hang_s=2")
    (found,) = incidents(folder)
    assert (found["outcome"], found["rank"]) == ("hang", 1)
    assert "most recent call first" in (folder / "logs" / "attempt-1-host-0.log.stacks").read_text()
    assert_same_run(undisturbed, folder, STEPS)


def test_a_host_that_stands_still_for_a_moment_is_no_hang(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "slow@15/1")
    assert incidents(folder) == []
    assert_same_run(undisturbed, folder, STEPS)


def test_a_state_that_is_not_a_number_is_gone_back_from(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "nan@12")
    bad = [event for event in rundir.events(folder) if event["event"] == "bad_step"]
    assert len(bad) == 3
    assert all(len(event["ids"]) == 8 for event in bad)
    assert_same_run(undisturbed, folder, STEPS)


def test_rollback_leaves_the_bad_batch_out_and_says_which(root: Path) -> None:
    folder = struck(root, "nan@12", "guard.action=rollback", "run.id=rolled-back")
    (skipped,) = [event for event in rundir.events(folder) if event["event"] == "skip_batch"]
    assert skipped["places"] == [[8 * (skipped["step"] - 1), 8 * skipped["step"]]]
    assert len(skipped["ids"]) == 8
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))


def test_the_guard_stops_a_run_where_it_is_told_to(root: Path) -> None:
    folder = struck(root, "nan@12", "guard.action=stop", "run.id=guarded", code=2)
    page = (folder / "incident.txt").read_text()
    assert "guard.action=stop" in page
    assert "launch.resume run=guarded" in page


def test_faults_amid_save_restore_and_compile(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "worker@10:save/0,worker@10:compile/1,worker@20:save/1,worker@20:restore/0", "run.id=amid")
    assert len(incidents(folder)) == 4
    assert_same_run(undisturbed, folder, STEPS)


def test_a_torn_checkpoint_is_named_set_aside_and_the_one_before_is_used(undisturbed: Path, root: Path) -> None:
    folder = struck(root, "tear@26,worker@26/1", "checkpoint.snapshot=off", "checkpoint.every=13")
    assert [found["outcome"] for found in incidents(folder)] == ["host died", "checkpoint unreadable"]
    (aside,) = [event for event in rundir.events(folder) if event["event"] == "set_aside"]
    assert aside["step"] == 26
    assert "checkpoints/26" in incidents(folder)[1]["evidence"]
    assert incidents(folder)[1]["steps_lost"] >= 13
    assert_same_run(undisturbed, folder, STEPS)


def test_with_no_older_checkpoint_left_it_refuses_and_starts_nothing_afresh(root: Path) -> None:
    folder = struck(root, "tear@13,worker@13/1", "checkpoint.snapshot=off", "checkpoint.every=13", code=2)
    assert "no older one" in (folder / "incident.txt").read_text()
    assert event_names(folder).count("initialise") == 1


TWO_SLICES = ["cluster.slice=v5p-8", "cluster.num_slices=2", "mesh=multislice"]
ENDLESS = ["train.steps=100000", "checkpoint.every=1000", "eval.every=0"]  # each is stopped once it has shown enough


def stopped_when(folder: Path, ready: Callable[[], bool], what: str, *overrides: str) -> dict[int, float]:
    process = launch("train", f"run.root={folder.parent}", f"run.id={folder.name}", *SMALL, *overrides)
    wait_for(ready, what, process)
    process.send_signal(signal.SIGINT)
    finish(process, 3)
    return losses(folder)


def test_a_lost_slice_is_done_without_and_taken_up_again(root: Path) -> None:
    def grown() -> bool:
        reserved = [event for event in rundir.events(folder) if event["event"] == "reserve"]
        done = max(rundir.metrics(folder), default=0)
        return [event["slices"] for event in reserved] == [2, 1, 2] and done > reserved[-1]["step"] + 5

    folder = root / "shrunk"
    fault = ["chaos=listed", "chaos.faults=[host@15/1]"]
    waits = ["cluster.min_slices=1", "timeout.shrink_s=1", "cluster.repair_s=4"]
    overrides = [*TWO_SLICES, *waits, *fault, *ENDLESS]
    seen = stopped_when(folder, grown, "steps with both slices again", *overrides)
    assert [found["outcome"] for found in incidents(folder)] == ["slice lost", "slice back"]
    longest = max(seen)
    whole = root / "whole"
    expected = stopped_when(
        whole, lambda: max(rundir.metrics(whole), default=0) >= longest, f"step {longest}", *TWO_SLICES, *ENDLESS
    )
    # The same global batches; but fewer devices sum them in another order.
    assert max(abs(seen[step] - expected[step]) for step in seen) <= 1e-3


def broken(tmp_path: Path, what: str) -> dict[str, str]:
    """The environment of a user whose own code fails on host 1 when it reads the batch of step 12."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import builtins, os, signal, sys
real = builtins.__import__
def hooked(name, *args, **kwargs):
    module = real(name, *args, **kwargs)
    data = sys.modules.get("gemma.train.data")
    if data is not None and hasattr(data, "open_dataset") and not hasattr(data, "broken"):
        data.broken, read = True, data.Dataset.train_rows
        def train_rows(self, places, start, stop):
            import jax
            if places[0] == 12 * 8 and jax.process_index() == 1:
                {what}
            return read(self, places, start, stop)
        data.Dataset.train_rows = train_rows
    return module
builtins.__import__ = hooked
""")
    return {"PYTHONPATH": str(tmp_path)}


def failing(root: Path, tmp_path: Path, name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    for key, value in broken(tmp_path, what).items():
        monkeypatch.setenv(key, value)
    process = launch("train", f"run.root={root}", f"run.id={name}", *SMALL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    return root / name, err


def test_the_users_own_error_is_told_once_and_not_retried(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, err = failing(root, tmp_path, "mistaken", 'raise KeyError("my mistake")', monkeypatch)
    assert err.count("KeyError: 'my mistake'") >= 1
    assert err.count("Traceback (most recent call last)") == 1
    assert event_names(folder).count("start") == 1
    assert [(found["outcome"], found["rank"]) for found in incidents(folder)] == [("error", 1)]


def test_the_same_failure_twice_at_a_step_stops_with_a_page(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = failing(root, tmp_path, "crashing", "os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    assert [found["outcome"] for found in incidents(folder)] == ["host crashed"] * 2
    page = (folder / "incident.txt").read_text()
    assert "twice the same at step 12" in page
    assert len(page.splitlines()) < 100


def test_a_used_up_budget_stops_the_run(root: Path) -> None:
    folder = struck(root, "worker@15/1", "retry.budget=0", "run.id=poor", code=2)
    assert "retry.budget=0" in (folder / "incident.txt").read_text()


def test_off_is_off_and_the_disk_is_gone_back_to(undisturbed: Path, root: Path) -> None:
    # Fifteen steps after the first save began: a busy machine may take seconds to have it whole on disk.
    folder = struck(root, "worker@25/1", "checkpoint.snapshot=off", "run.id=off")
    (found,) = incidents(folder)
    assert (found["source"], "keep" in event_names(folder)) == ("disk", False)
    assert_same_run(undisturbed, folder, STEPS)


def test_the_next_controller_takes_over_the_memory_of_a_cluster_that_lives(
    undisturbed: Path, root: Path, existing_cluster: str
) -> None:
    provider = ["cluster=ray", f"cluster.address={existing_cluster}", "train.dtype=float32"]
    each_step = ["checkpoint.every=0", "checkpoint.snapshot=1"]
    process = launch("train", f"run.root={root}", "run.id=taken-over", *SMALL, *provider, *each_step)
    folder = root / "taken-over"
    wait_for_step(process, folder, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(launch("resume", "run=taken-over", f"run.root={root}"), 0)
    restored = [event for event in rundir.events(folder) if event["event"] == "restore"][-1]
    assert restored["source"] == "memory"
    assert restored["step"] >= 20 - LOST
    assert losses(folder) == losses(undisturbed)
