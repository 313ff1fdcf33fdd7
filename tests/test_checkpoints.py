"""A run that ever committed a checkpoint never starts from step 0 again, whatever has become of its directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma.config import ConfigError
from orchestrator.record import rundir
from orchestrator.recovery import checkpoints
from tests.test_rundir import fabricate

EVERY = 20


def worked(root: Path, steps: int = 45, kept: int = 2) -> Path:
    """A run's directory after so many steps: as a killed controller leaves it."""
    folder = fabricate(root, "some", f"checkpoint.every={EVERY}", f"checkpoint.keep_last={kept}")
    metrics, events = rundir.Appender(folder / "metrics.jsonl"), rundir.Appender(folder / "events.jsonl")
    events.write({"time": 1.0, "event": "start", "attempt": 1, "step": 0, "pids": [1, 2]})
    for step in range(1, steps + 1):
        metrics.write({"step": step, "attempt": 1, "loss": 1.0})
        if step % EVERY == 0:
            events.write({"time": 1.0, "event": "save", "attempt": 1, "step": step})
            events.write({"time": 1.0, "event": "commit", "attempt": 1, "step": step})
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
            for old in rundir.committed(folder)[:-kept]:
                shutil.rmtree(folder / "checkpoints" / str(old))
    return folder


def event(folder: Path, name: str, step: int, attempt: int = 2, **more: object) -> None:
    rundir.Appender(folder / "events.jsonl").write(
        {"time": 1.0, "event": name, "attempt": attempt, "step": step} | more
    )


def put_aside(folder: Path, step: int) -> None:
    """As a controller does it with a checkpoint that it cannot read."""
    path = folder / "checkpoints" / str(step)
    aside = path.rename(path.with_name(f"{step}.unreadable-2"))
    event(folder, "set_aside", step, path=str(aside))


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def lose_newest(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "40")


def rename_all(folder: Path) -> None:
    for step in rundir.committed(folder):
        (folder / "checkpoints" / str(step)).rename(folder / "checkpoints" / f"away-{step}")


def all_unreadable(folder: Path) -> None:
    for step in rundir.committed(folder):
        put_aside(folder, step)


def unreadable_and_no_events(folder: Path) -> None:
    all_unreadable(folder)
    (folder / "events.jsonl").unlink()


def unreadable_and_removed(folder: Path) -> None:
    all_unreadable(folder)
    lose_all(folder)


def no_events(folder: Path) -> None:
    lose_all(folder)
    (folder / "events.jsonl").unlink()


def empty_events(folder: Path) -> None:
    lose_all(folder)
    (folder / "events.jsonl").write_text("")


def cut_events(folder: Path) -> None:
    lose_all(folder)
    text = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(text.splitlines(keepends=True)[0])


def damaged_commits(folder: Path) -> None:
    lose_all(folder)
    text = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(text.replace('"commit", "attempt"', '"commit, "attempt"'))


def a_commit_cut_short(folder: Path) -> None:
    lose_all(folder)
    kept = [line for line in (folder / "events.jsonl").read_text().splitlines() if "commit" not in line]
    (folder / "events.jsonl").write_text("\n".join([*kept, '{"time": 1.0, "event": "commit", "att']))


def only_logs(folder: Path) -> None:
    no_events(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "logs" / "attempt-1-host-0.log").write_text("stepping\n")


def only_goodput(folder: Path) -> None:
    no_events(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "goodput.json").write_text("{}")


@pytest.mark.parametrize(
    "harm",
    [
        *(
            lose_all,
            lose_newest,
            rename_all,
            all_unreadable,
            unreadable_and_no_events,
            unreadable_and_removed,
            no_events,
        ),
        *(empty_events, cut_events, damaged_commits, a_commit_cut_short, only_logs, only_goodput),
    ],
)
def test_what_has_lost_its_checkpoints_is_refused_as_often_as_it_is_resumed(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = worked(tmp_path)
    assert checkpoints.resumable(folder) == 40
    harm(folder)
    said = set()
    for _ in range(3):
        with pytest.raises(ConfigError, match=r"^run=some: .*does not start from step 0") as refused:
            checkpoints.resumable(folder)
        said.add(str(refused.value))
    assert len(said) == 1
    assert "\n" not in said.pop()


@pytest.mark.parametrize("steps", [0, 5, 25])
@pytest.mark.parametrize("torn", ["", '{"time": 1.0, "event": "pha'])
def test_a_run_that_never_committed_may_begin_again(tmp_path: Path, steps: int, torn: str) -> None:
    folder = worked(tmp_path, steps)
    kept = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"commit"' not in line]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in kept) + torn)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    assert checkpoints.resumable(folder) is None


def test_a_directory_in_which_nothing_was_done_yet_begins(tmp_path: Path) -> None:
    assert checkpoints.resumable(fabricate(tmp_path, "some")) is None


def test_an_unreadable_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    folder = worked(tmp_path)
    put_aside(folder, 40)
    assert checkpoints.resumable(folder) == 20


def test_an_unreadable_checkpoint_leaves_an_older_one_though_those_between_were_removed_for_it(tmp_path: Path) -> None:
    folder = worked(tmp_path, 85, kept=1)
    (folder / "checkpoints" / "20").mkdir()  # as checkpoint.keep_every keeps it
    put_aside(folder, 80)
    assert checkpoints.resumable(folder) == 20
    event(folder, "commit", 40, attempt=3)  # and what is committed after that must be there again
    with pytest.raises(ConfigError, match=r"checkpoints/40 was committed and is gone"):
        checkpoints.resumable(folder)


def test_what_the_run_went_back_beyond_is_not_missed(tmp_path: Path) -> None:
    folder = worked(tmp_path)
    for step in (20, 40):
        event(folder, "set_aside", step, reason="beyond the step that the run went back to")
    lose_all(folder)
    assert checkpoints.resumable(folder) is None


def test_a_refusal_says_how_to_go_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    folder = worked(tmp_path)
    lose_newest(folder)
    with pytest.raises(ConfigError, match=rf"launch.train from={folder}@20$"):
        checkpoints.resumable(folder)


def test_lines_of_another_kind_do_not_hide_what_was_committed(tmp_path: Path) -> None:
    folder = worked(tmp_path)
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "commit", "step": "forty"}) + "\n" + json.dumps({"event": "set_aside"}) + "\n")
    assert checkpoints.resumable(folder) == 40
