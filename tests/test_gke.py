"""RayClusters by Kubernetes' own client against the emulator: no hosts behind them here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.slices import gke, kube, upkeep
from orchestrator.slices.upkeep import NoSlicesError, Upkeep
from orchestrator.slices.wanted import State
from tests import kuberay
from tests.kube import Kube, Settings, preempt
from tests.test_config import config_of

DEADLINE_S = 20.0
TWO_SLICES = ("cluster.num_slices=2", "mesh=multislice", "train.batch=16")


def config(emulated: Kube, *overrides: str) -> Config:
    return config_of(*kuberay.overrides(emulated), "cluster.gke.poll_s=0.02", "run.id=mine", *overrides)


@contextmanager
def serving(**settings: Any) -> Iterator[Kube]:
    with kuberay.serve(Settings(**({"provision_s": 0.1, "delete_s": 0.1, "hosts": False} | settings))) as emulated:
        yield emulated


def ready(kept: Upkeep) -> Callable[[], bool]:
    return lambda: State.READY in kept.states.values()


def wait(check: Callable[[], None], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline
        check()
        time.sleep(0.01)


@contextmanager
def keeping(
    config: Config, keep: bool = False, owner: str = "mine", told: list[str] | None = None
) -> Iterator[tuple[Upkeep, Any]]:
    kept = gke.upkeep(config, owner)
    say = lambda what, news: told.append(f"{what}: {news}") if told is not None else None  # noqa: E731
    with upkeep.managed(kept, keep, say) as given:
        yield kept, given.repair


def test_slices_are_asked_for_as_one_and_given_back_at_the_end() -> None:
    with serving() as emulated:
        with keeping(config(emulated, *TWO_SLICES)) as (kept, check):
            wait(check, ready(kept))
            (one,) = emulated.made.values()
            assert len(one.slices) == 2
            (request,) = gke.open_provider(config(emulated), "").list_requests()
            assert (request.owner, request.slice, request.slices) == ("mine", "v5p-16", 2)
        assert emulated.made == {}


@pytest.mark.parametrize("seed", [1, 8])  # the first call has no answer, or a 500
def test_it_gets_there_through_500s_and_silence_and_leaves_nothing(seed: int) -> None:
    with serving(trouble=0.4) as emulated:
        emulated.dice.seed(seed)
        with keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
            wait(check, lambda: len(emulated.made) == 1)
        assert emulated.made == {}


@pytest.mark.parametrize("verb", ["list", "create"])
def test_what_is_not_permitted_is_the_users_matter(verb: str) -> None:
    with serving(denied=verb) as emulated:
        said = f'cannot {verb} resource "rayclusters"'
        with pytest.raises(ConfigError, match=said), keeping(config(emulated)) as (_, check):
            check()
        assert emulated.made == {}


def test_without_the_operator_that_is_said() -> None:
    said = "404 Not Found.*is there a Ray operator"
    with serving(missing="operator") as emulated, pytest.raises(ConfigError, match=said), keeping(config(emulated)):
        pass


@pytest.mark.parametrize("quota", ["objects", "pods"])
def test_where_no_quota_allows_it_that_is_said_with_its_name_and_nothing_is_left(quota: str) -> None:
    with serving(quota=quota) as emulated:
        with pytest.raises(NoSlicesError, match="exceeded quota: tpus"), keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
        assert emulated.made == {}


def test_an_image_that_does_not_exist_is_not_waited_for() -> None:
    with serving(missing="image") as emulated:
        with pytest.raises(NoSlicesError, match="docker.io/x:1.*not found"), keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
        assert emulated.made == {}


def test_where_there_are_no_machines_it_waits_and_says_for_what() -> None:
    told: list[str] = []
    with serving(free=0) as emulated, keeping(config(emulated), told=told) as (kept, check):
        wait(check, lambda: any("GCE out of resources" in line for line in told))
        assert not ready(kept)()


def test_a_lost_slice_is_waited_for_as_kuberay_makes_it_anew() -> None:
    told: list[str] = []
    with serving(notice_s=0.1, provision_s=0.3) as emulated, keeping(config(emulated), told=told) as (kept, check):
        wait(check, ready(kept))
        (name,) = emulated.made
        told.clear()
        with emulated.lock:
            preempt(emulated, emulated.made[name])
        wait(check, lambda: any("waiting in default: 0/9 nodes are available" in line for line in told))
        wait(check, ready(kept))
        assert list(emulated.made) == [name]


def test_nobody_elses_is_touched_and_what_is_kept_is_taken_up_again() -> None:
    with serving() as emulated:
        with keeping(config(emulated), keep=True, owner="other") as (kept, check):
            wait(check, ready(kept))
        (theirs,) = emulated.made
        with keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
        assert list(emulated.made) == [theirs]
        assert upkeep.clear(gke.open_provider(config(emulated), ""), "mine", 0.01, lambda *_: None, patient=True) == []
        assert list(emulated.made) == [theirs]
        with keeping(config(emulated), owner="other") as (kept, check):
            wait(check, ready(kept))
            assert list(emulated.made) == [theirs]
        assert emulated.made == {}


def test_another_slice_than_is_there_is_made_in_its_place() -> None:
    with serving() as emulated:
        with keeping(config(emulated), keep=True) as (kept, check):
            wait(check, ready(kept))
        (before,) = emulated.made
        with keeping(config(emulated, *TWO_SLICES)) as (kept, check):
            wait(check, lambda: before not in emulated.made and ready(kept)())
        assert emulated.made == {}


def test_pages_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.slices.kube.PAGE", 2)
    with serving() as emulated:
        for owner in "abcde":
            gke.open_provider(config(emulated), owner).create(gke.Create(f"gemma-{owner}", "default"))
        assert sorted(one.owner for one in gke.open_provider(config(emulated), "").list_requests()) == list("abcde")


FILE = """
apiVersion: v1
kind: Config
clusters: [{name: x, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: x, user: {}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
"""


@pytest.mark.parametrize(
    ("content", "context", "said"),
    [
        (None, "x", "cluster.gke.context=x: no credentials; allowed: gcloud"),
        ("{", "x", "cluster.gke.context=x: no credentials; allowed: gcloud"),
        ("clusters: []", "x", "cluster.gke.context=x: no credentials; allowed: gcloud"),
        (FILE, "y", "cluster.gke.context=y: no credentials; allowed: gcloud"),
        (FILE, "x", "cluster=gke: http://127.0.0.1:1 does not answer: "),
    ],
)
def test_what_leads_to_no_cluster_is_refused_at_once(
    tmp_path: Path, content: str | None, context: str, said: str
) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content)
    given = ["image=x", "claim=x", f"kubeconfig={file}", f"context={context}"]
    found = config_of("cluster=gke", *(f"cluster.gke.{one}" for one in given)).cluster.gke
    assert found is not None
    with pytest.raises(ConfigError) as refused:
        kube.check(found)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
