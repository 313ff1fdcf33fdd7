"""launch.plan serve=true: a server's real programs compiled for a slice that is not here, and what is said of them."""

import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gemma.config import ConfigError
from gemma.plan import v5p
from launch.plan import composed
from launch.weights import begin
from orchestrator.config import Config
from orchestrator.plan import ahead, preflight, serving

TOP = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
NINE = ["model=gemma2_9b", "serve.slots=64", "mesh.tensor=4", "mesh.fsdp=1", "cluster=ray", "cluster.address=a:1"]
COST = {"overlapped_s": 2e-3, "network_s": 1e-3, "hbm_bytes": 2765e6, "cycles_s": 3e-3}
NOTHING = dict.fromkeys(COST, 0.0)
FACTS: dict[str, Any] = {
    "message": "",
    "weights_bytes": 2765 * 10**6,
    "cache_bytes": 10**10,
    "cache_tokens": 65536,
    "page": 128,
    "decode": [{"size": 64, "needed_bytes": 10**10, "cost": COST}],
    "choice": [{"size": 64, "needed_bytes": 10**9, "cost": NOTHING}],
    "prefill": [{"size": 256, "needed_bytes": 10**10, "cost": COST}],
    "compile_s": 1.0,
}


def made(*overrides: str, **changes: Any) -> serving.ServingPlan:
    return serving.make(composed([*NINE, *overrides], "serve"), FACTS | changes, [], False)


def test_a_decode_step_is_what_the_compiler_says_and_what_the_rows_read() -> None:
    step = made().decode[0]
    # Of each layer 2 * 8 heads * 256 numbers of 2 bytes, over 4 chips, 2048 positions, 64 rows, 42 layers.
    read_s = 2 * 8 * 256 * 2 / 4 * 2048 * 64 * 42 / v5p.HBM_BYTES_PER_S
    assert step.ideal == pytest.approx(1e-3 + read_s)
    assert step.estimate == pytest.approx(3e-3 + read_s)
    assert step.cycles == pytest.approx(4e-3 + read_s)
    assert step.tokens_per_s == pytest.approx(64 / step.estimate)


def test_a_local_layer_reads_its_window() -> None:
    def read(length: int) -> float:
        return serving.read_bytes(composed(NINE, "serve"), length, 128)

    assert read(8192) - read(4096) == pytest.approx(read(4096) - read(2048))  # of 4096 more, half the layers
    assert read(4097) - read(4096) == read(4096) / 4096 / 2 * 128  # a page more


def test_the_first_token_comes_after_all_chunks() -> None:
    short, long = made("plan.length=256"), made("plan.length=2048")
    assert short.first_token_s is not None
    assert long.first_token_s is not None
    assert short.first_token_s == pytest.approx(3e-3, rel=0.2)
    assert 8 * 3e-3 <= long.first_token_s < 12 * 3e-3
    assert (short.sequences, long.sequences) == (256, 32)


def test_a_program_beyond_a_chips_memory_does_not_fit() -> None:
    large = [{"size": 64, "needed_bytes": 10**11, "cost": COST}]
    assert not made(decode=large).fits
    told = made(decode=[{"size": 64, "needed_bytes": 0, "cost": None}], message="RESOURCE_EXHAUSTED")
    assert (told.fits, told.decode, told.first_token_s) == (False, [], None)


@pytest.mark.parametrize(
    ("overrides", "mesh"),
    [
        (["model=gemma2_9b", "cluster=ray", "cluster.address=a:1"], (1, 1, 4)),
        (["model=gemma2_27b", "cluster=ray", "cluster.address=a:1", "cluster.slice=v5p-16"], (1, 1, 8)),
        (["model=gemma2_2b", "cluster=ray", "cluster.address=a:1", "cluster.slice=v5p-16"], (1, 2, 4)),
        (["model=gemma2_2b", "mesh.tensor=2"], (1, 2, 2)),
        (["model=tiny"], (1, 1, 1)),
        (["model=tiny", "cluster.slice=v5p-16"], (1, 8, 1)),
    ],
)
def test_heads_go_over_as_many_chips_as_they_can(overrides: list[str], mesh: tuple[int, int, int]) -> None:
    assert composed(overrides, "serve").program.mesh.shape == mesh


def test_weights_that_cannot_fit_are_refused_before_a_slice_is_asked_for() -> None:
    config = composed([*NINE, "model=gemma2_27b", "mesh.tensor=1", "mesh.fsdp=4", "serve.weights=float32"], "serve")
    preflight.check_fits(config)
    large = composed([*NINE[-2:], "model=gemma2_27b", "serve.weights=float32", "model.layers=184"], "serve")
    with pytest.raises(ConfigError, match=r"^mesh\.fsdp=1 mesh\.tensor=4: weights and one sequence of 8192 need"):
        preflight.check_fits(large)


def test_the_server_s_command_refuses_them_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        where = [f"cluster.address=127.0.0.1:{head.getsockname()[1]}", "cluster=ray", f"run.root={tmp_path}"]
        large = ["model=gemma2_27b", "model.layers=184", "serve.weights=float32"]
        config = composed([*where, *large, f"serve.checkpoint={tmp_path}"], "serve")
        with pytest.raises(ConfigError, match=r"plan\.skip=true overrides"):
            begin(config, [], "serve", None)
    assert not list(tmp_path.iterdir())


def test_a_search_ranks_every_mesh_of_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts_of(config: Config, _: ahead.Tell) -> ahead.Answer:
        seconds = COST | {"overlapped_s": 1e-3 * (5 - config.program.mesh.tensor)}
        return ahead.Answer(FACTS | {"decode": [FACTS["decode"][0] | {"cost": seconds}]}, False)

    monkeypatch.setattr(ahead, "facts_of", facts_of)
    found = serving.best(composed(["model=gemma2_9b", "plan.search=true"], "serve"), set(), ["model=gemma2_9b"], print)
    assert [p.mesh["tensor"] for p in found] == [4, 2, 1]
    assert found[0].overrides == ["model=gemma2_9b", "mesh.replica=1", "mesh.fsdp=1", "mesh.tensor=4"]


# Two layers whose heads have the size that the paged kernel takes, over two chips.
SMALL = [
    *("model=tiny", "model.head_size=128", "model.width=256", "model.query_scale=0.09", "serve.slots=8"),
    *("mesh.tensor=2", "mesh.fsdp=2", "plan.length=1024"),
]


@needs_compiler
@pytest.mark.timeout(600)
def test_the_programs_are_compiled_with_the_paged_kernel_and_remembered(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "launch.plan", "serve=true", "output=json", f"run.cache={tmp_path}", *SMALL]
    first, second = (subprocess.run(line, cwd=TOP, capture_output=True, text=True, timeout=500) for _ in range(2))
    assert first.returncode == 0, first.stderr
    told, again = json.loads(first.stdout), json.loads(second.stdout)
    assert (told["cached"], again["cached"]) == (False, True)
    assert told["fits"]
    assert [step["rows"] for step in told["decode"]] == [8]
    assert told["decode"][0]["hbm"] >= told["decode"][0]["ideal"]  # all weights are counted
    assert told["cache_tokens"] == 8 * 8192
    # 2 layers, keys and values of one head of 128 in bfloat16: a chip's, with the page that is nobody's.
    whole, page = 8 * 8192 * 2 * 128 * 2, 128 * 2 * 128 * 2
    assert whole < told["cache_bytes"] < 2 * (whole + page)
