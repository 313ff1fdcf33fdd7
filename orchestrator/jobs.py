"""Runs whose controller is a job on the head of a Ray cluster: they outlive the machine that submitted them.

Spoken to is the dashboard of the cluster, by Ray's own client.
"""

import asyncio
import json
import logging
import os
import secrets
import shlex
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from gemma.config import ConfigError
from orchestrator.exit import HOW, Exit
from orchestrator.record import source
from orchestrator.slices.topology import NAME_LABEL

ANSWER_TIMEOUT_S = 3.0  # for a dashboard to show that it is there
CALL_TIMEOUT_S = 60.0
POLL_S = 0.2
TROUBLE_S = 60.0  # for which no poll may get an answer, before a wait is given up
STOP_S = 3600  # for what `ray job stop` ends, before it kills it: a controller saves
RUN, ROOT, COMMAND = "gemma-run", "gemma-root", "gemma-command"  # metadata of a job
DRIVES = ("train", "resume")
MARKET_LABEL = "ray.io/market-type"
# These would lead Ray's client to another cluster.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Ray would give the hosts what the job itself needs: a run brings its code to them in a way of its own.
UNSET = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True)
class Head:
    """Of a cluster, as its dashboard tells."""

    at: str  # HOST:PORT of the dashboard
    client: JobSubmissionClient
    node_id: str
    resources: Mapping[str, float]  # of the node
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """The one that drives a run, or the newest that drove it."""

    id: str  # Ray's submission id
    run: str
    root: str
    state: str
    began: float  # time.time()
    ended: bool


@contextmanager
def user_errors(at: str) -> Iterator[None]:
    """Trouble with a dashboard is the user's mistake, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, RayError, RayStateApiException) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"cluster.dashboard={at}: the Ray cluster does not do as asked ({why})") from error


def connect(at: str) -> Head:
    """Raises ConfigError where no dashboard answers."""
    try:
        request = urllib.request.Request(f"http://{at}/api/version", headers=get_auth_headers_if_auth_enabled({}))
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            json.load(answer)["ray_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cluster.dashboard={at}: no dashboard of a Ray cluster answers there ({error}); one that was started"
            " without --dashboard-host=0.0.0.0 listens on its own machine only"
        ) from error
    for chatty in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.ERROR)
    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        with user_errors(at):
            client = JobSubmissionClient(f"http://{at}")
            heads = list_nodes(f"http://{at}", filters=[("is_head_node", "=", True)], timeout=int(CALL_TIMEOUT_S))
    finally:
        os.environ.update(hidden)
    client._do_request = partial(client._do_request, timeout=CALL_TIMEOUT_S)  # type: ignore[method-assign]
    alive = [node for node in heads if node.state == "ALIVE"]
    if not alive:
        raise ConfigError(f"cluster.dashboard={at}: the Ray cluster has no head")
    return Head(at, client, alive[0].node_id, alive[0].resources_total, alive[0].labels)


def check_stays(head: Head) -> None:
    """A controller must not go with a machine that may be taken away. Raises ConfigError."""
    why = ""
    if head.resources.get("TPU") or NAME_LABEL in head.labels:
        why = f"is a TPU host, of slice {head.labels.get(NAME_LABEL, 'unknown')}"
    if head.labels.get(MARKET_LABEL) == "spot":
        why = "is a spot machine"
    if why:
        raise ConfigError(
            f"cluster.dashboard={head.at}: the head {why}, and a controller there would go with it; start the head on a"
            " machine that stays"
        )


def submit(head: Head, run: str, root: str, command: str, arguments: Sequence[str]) -> str:
    """Sends the code of this process and lets a command of it run on the head; the job's id. Raises ConfigError."""
    # No shell stays in between: a signal to the job is one to the command.
    entrypoint = f"exec env -u {UNSET} python -m launch.{command} {shlex.join(arguments)}"
    with tempfile.TemporaryDirectory() as folder, user_errors(head.at):
        code = source.pack(Path(folder))
        return str(
            head.client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{run}-{command}-{secrets.token_hex(3)}",
                runtime_env={"working_dir": str(code), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}},
                metadata={RUN: run, ROOT: root, COMMAND: command},
                entrypoint_label_selector={"ray.io/node-id": head.node_id},
            )
        )


def jobs(head: Head) -> list[Job]:
    """Of runs, oldest first; of each run the newest, but for one that ended beside one that is at work."""
    with user_errors(head.at):
        found = head.client.list_jobs()
    newest: dict[str, Job] = {}
    for details in sorted(found, key=lambda one: one.start_time or 0):
        metadata = details.metadata or {}
        if metadata.get(COMMAND) in DRIVES and details.submission_id:
            run = metadata[RUN]
            this = job(details, run, metadata[ROOT])
            if this.ended and run in newest and not newest[run].ended:
                continue  # a second controller was refused
            newest.pop(run, None)
            newest[run] = this
    return list(newest.values())


def job(details: Any, run: str, root: str) -> Job:
    ended = JobStatus(details.status).is_terminal()
    began = (details.start_time or 0) / 1000
    return Job(details.submission_id, run, root, state(str(details.status), details.driver_exit_code), began, ended)


def state(status: str, code: int | None) -> str:
    """What became of the controller, in the words of launch.status. Pure."""
    if status == "FAILED":
        ends = {int(exit_code): said for exit_code, said in HOW.items()} | {int(Exit.MISTAKE): "refused"}
        return ends.get(-1 if code is None else code, "died")
    return {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "finished", "STOPPED": "stopped"}[status]


def find(head: Head, run: str) -> Job:
    """The job of run=ID, or of the newest run. Raises ConfigError naming what there is."""
    known = jobs(head)
    for found in reversed(known):
        if run in (found.run, "latest"):
            return found
    there = ", ".join(found.run for found in known[-5:]) or "none"
    raise ConfigError(f"run={run}: no such run is known to the Ray cluster at {head.at}; the newest are {there}")


def state_of(head: Head, id: str) -> tuple[str, bool]:
    """A job's state, and whether it has ended."""
    with user_errors(head.at):
        found = job(head.client.get_job_info(id), "", "")
    return found.state, found.ended


def output(head: Head, id: str) -> str:
    """What a job printed, without what Ray says before it."""
    with user_errors(head.at):
        whole = str(head.client.get_job_logs(id))
    return printed(whole, id)


def printed(log: str, id: str) -> str:
    """Pure."""
    before, mark, after = log.partition(f"Running entrypoint for job {id}: ")
    return after.partition("\n")[2] if mark else before


def wait(head: Head, id: str, timeout_s: float, said: str = "") -> bool:
    """Whether a job has ended in time; or has printed what is waited for. A poll may fail, many in a row may not."""
    answered = time.monotonic()
    deadline = answered + timeout_s
    while True:
        try:
            if state_of(head, id)[1] or (said and said in output(head, id)):
                return True
            answered = time.monotonic()
        except ConfigError:
            if time.monotonic() > min(deadline, answered + TROUBLE_S):
                raise
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)


def forget(head: Head, id: str) -> None:
    """A job that has ended."""
    with user_errors(head.at):
        head.client.delete_job(id)


def stop(head: Head, id: str) -> None:
    """Ray's own way: it asks all processes of a job to end, and kills them after STOP_S. Returns at once."""
    with user_errors(head.at):
        head.client.stop_job(id)


def run_command(
    head: Head, run: str, root: str, command: str, arguments: Sequence[str], timeout_s: float
) -> tuple[int | None, str]:
    """A command about a run, where the run lies: its exit code and what it printed. None: it did not end in time."""
    id = submit(head, run, root, command, [f"run={run}", f"run.root={root}", *arguments])
    in_time = wait(head, id, timeout_s)
    text = output(head, id)
    if not in_time:
        stop(head, id)
        return None, text
    with user_errors(head.at):
        code = head.client.get_job_info(id).driver_exit_code
    forget(head, id)
    return (Exit.GAVE_UP if code is None else code), text


def follow(head: Head, id: str, show: Callable[[str], None]) -> None:
    """Shows what a job prints, from its beginning until it ends."""

    async def tail() -> None:
        async for part in head.client.tail_job_logs(id):
            show(part)

    with user_errors(head.at):
        asyncio.run(tail())
