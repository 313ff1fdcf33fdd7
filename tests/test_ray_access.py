"""Who may use the Ray cluster of a local run: nobody without its token, and no other user of the machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.slices import auth
from orchestrator.slices.environment import inherited, unwanted
from orchestrator.slices.simulated import simulated
from tests.runs import TOP

WRITE = """
import sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1], cluster_id=sys.argv[2])
print(client.internal_kv_put(b"x", b"y", True, b"fun", timeout=5))
"""
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[simulated.Cluster]:
    folder = Path(f"/tmp/gemma-access-{os.getpid()}")
    folder.mkdir(mode=0o700)
    auth.write_token(folder, auth.new_token())
    with auth.using(simulated.token_path(folder)):
        made = simulated.start({0: simulated.Host()}, folder)
        try:
            yield made
        finally:
            simulated.stop(made)


def write(cluster: simulated.Cluster, env: dict[str, str], before: tuple[str, ...] = ()) -> tuple[str, str]:
    """An entry in the function table, by a process with this environment: what it printed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*before, sys.executable, "-c", WRITE, cluster.address, cluster.cluster_id]
    done = subprocess.run(command, cwd="/", env=plain | env, capture_output=True, text=True, timeout=60)
    return done.stdout.strip(), done.stderr


def test_the_token_opens_the_cluster(cluster: simulated.Cluster) -> None:
    assert write(cluster, auth.token_env(simulated.token_path(cluster.temp_dir))) == ("1", "")


@pytest.mark.parametrize(
    "env",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["none", "wrong"],
)
def test_without_the_token_nothing_can_be_written(cluster: simulated.Cluster, env: dict[str, str]) -> None:
    out, err = write(cluster, env)
    assert out == ""
    assert "Unauthenticated" in err or "InvalidAuthToken" in err, err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_read_the_token_nor_reach_the_sockets(cluster: simulated.Cluster) -> None:
    try:
        subprocess.run([*NOBODY, sys.executable, "-c", "import ray"], check=True, timeout=60, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this Python")
    out, err = write(cluster, auth.token_env(simulated.token_path(cluster.temp_dir)), tuple(NOBODY))
    assert out == ""
    assert "cannot be opened" in err, err
    seen = subprocess.run([*NOBODY, "ls", str(cluster.temp_dir)], capture_output=True, text=True, timeout=10)
    assert seen.returncode != 0
    assert not seen.stdout


def test_the_token_stands_in_no_command_line_nor_log(cluster: simulated.Cluster) -> None:
    path = simulated.token_path(cluster.temp_dir)
    token = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert cluster.temp_dir.stat().st_mode & 0o777 == 0o700
    for process in cluster.reaper.spawned:
        assert token not in Path(f"/proc/{process.pid}/cmdline").read_text()
    files = [file for file in cluster.temp_dir.rglob("*") if file.is_file() and file != path]
    assert files
    assert not [file for file in files if token in file.read_text(errors="replace")]


def test_hosts_inherit_a_list_and_not_what_the_shell_has() -> None:
    kept = {"PATH": "/bin", "LC_ALL": "C", "GOOGLE_APPLICATION_CREDENTIALS": "/k", "STORAGE_EMULATOR_HOST": "http://h"}
    kept |= {"FSSPEC_GS": "{}", "LIBTPU_INIT_ARGS": "--x", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    dropped = ["http_proxy", "HTTPS_PROXY", "all_proxy", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"]
    dropped += ["JAX_DISABLE_JIT", "JAX_NUMPY_RANK_PROMOTION", "JAX_DEBUG_NANS", "WANDB_API_KEY", "RAY_ADDRESS"]
    assert inherited(kept | dict.fromkeys(dropped, "1")) == kept
    names = [name for name in dropped if name not in ("WANDB_API_KEY", "RAY_ADDRESS")]
    assert unwanted([*kept, *dropped]) == names


def test_the_reaper_may_be_killed_and_all_is_put_away_nonetheless(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    reaper = simulated.start_reaper(folder)
    first = simulated.spawn(reaper, tmp_path / "a.log", {}, ["sleep", "600"])
    reaper.process.kill()
    reaper.process.wait()
    second = simulated.spawn(reaper, tmp_path / "b.log", {}, ["sleep", "600"])
    assert reaper.process.poll() is None  # another one took its place
    reaper.process.kill()
    simulated.end(folder, reaper)
    assert first.poll() is not None
    assert second.poll() is not None
    assert not folder.exists()


def test_a_proxy_is_passed_by_on_the_way_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from orchestrator.slices.environment import bypass_proxy; bypass_proxy('10.0.0.9');"
        "import json, urllib.request as u;"
        "print(json.dumps([bool(u.proxy_bypass_environment(h)) for h in ('127.0.0.2', '10.0.0.9', 'example.org')]))"
    )
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == [True, True, False]
