"""What becomes of a submission, and of the waiting for it: no cluster behind it here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma.config import ConfigError
from launch import detached
from orchestrator.record import rundir


class Dashboard:
    """As much of Ray's client as a submission uses. polls: what the job's state is when it is asked for, in turn."""

    def __init__(self, *polls: str | BaseException, said: str = ""):
        self.polls, self.said, self.deleted, self.noted = list(polls), said, list[str](), False

    def submit_job(self, **wanted: Any) -> str:
        return str(wanted["submission_id"])

    def get_job_info(self, id: str) -> SimpleNamespace:
        self.noted = self.noted or rundir.detached(Path(detached.HERE, "some")) is not None
        poll = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        if isinstance(poll, BaseException):
            raise poll
        return SimpleNamespace(submission_id=id, status=poll, driver_exit_code=1, start_time=0)

    def get_job_logs(self, id: str) -> str:
        return self.said

    def delete_job(self, id: str) -> None:
        self.deleted.append(id)


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Submits run `some` to a dashboard."""
    from orchestrator import jobs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "TROUBLE_S", 0.3)

    def begin(dashboard: Dashboard, sweep: bool = False) -> int:
        head = jobs.Head("head:1", dashboard, "n", {}, {})  # type: ignore[arg-type]
        monkeypatch.setattr(jobs, "connect", lambda at: head)
        return detached.begin("head:1", "some", "/r", "train", [], sweep)

    return begin


def test_a_poll_that_fails_does_not_end_the_waiting(begin: Callable[..., int]) -> None:
    dashboard = Dashboard(OSError("gone"), RuntimeError("500"), "RUNNING", said="train: run some in /r")
    assert begin(dashboard) == 0
    assert dashboard.polls == ["RUNNING"]
    assert rundir.detached(Path("runs/some")) == rundir.Detached("head:1", "/r")


@pytest.mark.parametrize("trouble", [OSError("the network is gone"), KeyboardInterrupt()])
def test_what_was_submitted_goes_on_whatever_becomes_of_the_waiting(
    begin: Callable[..., int], capsys: pytest.CaptureFixture[str], trouble: BaseException
) -> None:
    assert begin(Dashboard("PENDING", trouble)) == 0
    out = capsys.readouterr().out
    assert "goes on" in out
    assert "python -m launch.stop run=some stops it" in out
    assert rundir.detached(Path("runs/some")) == rundir.Detached("head:1", "/r")
    stopped = isinstance(trouble, KeyboardInterrupt)
    assert begin(Dashboard("PENDING", trouble), sweep=True) == (3 if stopped else 0)  # a sweep submits no more


def test_a_submission_is_noted_at_once_and_a_refused_one_no_more(begin: Callable[..., int]) -> None:
    refused = Dashboard("PENDING", "FAILED", said="train: run.root=/r: cannot be written")
    with pytest.raises(ConfigError, match="^run.root=/r: cannot be written$"):
        begin(refused)
    assert refused.noted
    assert len(refused.deleted) == 1
    assert not Path("runs").exists()
    earlier = rundir.Detached("other:1", "/r")
    detached.note(Path("runs/some"), earlier)
    with pytest.raises(ConfigError):
        begin(refused)
    assert rundir.detached(Path("runs/some")) == earlier


def test_a_controller_that_was_refused_does_not_hide_the_one_that_drives() -> None:
    from orchestrator import jobs

    def job(id: str, status: str, began: int) -> SimpleNamespace:
        metadata = {jobs.RUN: "some", jobs.ROOT: "/r", jobs.COMMAND: "resume"}
        return SimpleNamespace(
            submission_id=id, status=status, driver_exit_code=None, start_time=began, metadata=metadata
        )

    for statuses, drives in ((["FAILED", "RUNNING", "FAILED"], 1), (["FAILED", "STOPPED"], 1), (["RUNNING"] * 2, 1)):
        listed = [job(str(i), status, i) for i, status in enumerate(statuses)]
        client = SimpleNamespace(list_jobs=lambda listed=listed: listed)
        head = jobs.Head("head:1", client, "n", {}, {})  # type: ignore[arg-type]
        assert jobs.find(head, "some").id == str(drives)
