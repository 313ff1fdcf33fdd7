"""launch.plan: the real step compiled for slices that are not here; what it says, and what launch.train makes of it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemma import analytic, v5p
from gemma.compile_ahead import out_of_memory
from launch.plan import as_json, composed, lines
from orchestrator import ahead, plan, preflight, search
from orchestrator.config import Config

TOP = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
LARGE = ["model=gemma2_27b", "cluster.slice=v5p-1024", "mesh.fsdp=512", "data.sequence=8192", "train.batch=512"]
SMALL = ["model=tiny", "cluster.slice=v5p-8", "mesh.tensor=2"]
FACTS: dict[str, Any] = {
    "fits": True,
    "message": "",
    "parameters_bytes": 10,
    "optimizer_bytes": 20,
    "gradients_bytes": 10,
    "activations_bytes": 5,
    "needed_bytes": 100,
    "optimal_s": 3.3,
    "compile_s": 1.0,
    "cost": {
        "flops": 459e12,
        "hbm_bytes": 2765e9,
        "roofline_s": 30.0,
        "roofline_once_s": 3.0,
        "kernels_s": 1.0,
        "cycles_s": 25.0,
        "sent_bytes": {"fsdp": {"all-gather": 6e9}},
        "network_s": 0.5,
    },
}


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.plan", *overrides]
    return subprocess.run(line, cwd=TOP, capture_output=True, text=True, timeout=300)


def not_asked(config: Config, tell: ahead.Tell) -> ahead.Answer:
    raise AssertionError(f"the compiler was asked about {ahead.name(config)}")


def fits_from(fsdp: int, asked: list[Config]) -> Any:
    """A compiler to which everything with at least so many ways of fsdp fits."""

    def ask(config: Config, tell: ahead.Tell) -> ahead.Answer:
        asked.append(config)
        ways = config.program.mesh.fsdp
        return ahead.Answer(FACTS | {"fits": ways >= fsdp, "needed_bytes": int(100e9) if ways < fsdp else 100}, False)

    return ask


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """tiny on a v5p-8, by command, and where it is remembered."""
    cache = tmp_path_factory.mktemp("cache")
    done = command(*SMALL, f"run.cache={cache}", "output=json", "train.tokens=1e9")
    assert done.returncode == 0, done.stderr
    return cache, json.loads(done.stdout)  # alone there


def test_the_estimate_is_the_compilers_with_loops_counted_as_often_as_they_run() -> None:
    made = plan.make(composed(LARGE), FACTS, [], False)
    assert made.step_s
    assert (made.step_s.compute, made.step_s.hbm, made.step_s.network) == (1.0, 1.0, 0.5)
    assert made.step_s.estimate == pytest.approx(30 * 3.3 / 3)
    assert made.step_s.serial == pytest.approx(33.0 + 1.0 + 0.5)


def test_where_the_compiler_counts_transfers_as_minus_a_second_its_rule_is_taken_alone() -> None:
    made = plan.make(composed(LARGE), FACTS | {"optimal_s": -2.0}, [], False)
    assert made.step_s
    assert made.step_s.estimate == 30.0


def test_what_follows_from_the_estimate() -> None:
    config = composed([*LARGE, "train.tokens=8192e3"])  # 1000 sequences
    made = plan.make(config, FACTS, ["a=b"], True)
    seconds = 33.0 * 1000 / 512
    assert made.tokens_per_s == pytest.approx(512 * 8192 / 33)
    assert (made.days, made.chip_hours) == pytest.approx((seconds / 86400, seconds * 512 / 3600))
    assert made.mfu == pytest.approx(made.flops["model"] / (512 * v5p.FLOPS * 33))
    assert made.hbm_bytes.workspace == 100 - 45
    assert (made.overrides, made.cached) == (["a=b"], True)


def test_tokens_are_those_of_all_steps_where_none_are_given() -> None:
    assert plan.make(composed([*LARGE, "train.steps=7"]), FACTS, [], False).tokens == 7 * 512 * 8192


def test_the_parameters_are_the_published_ones() -> None:
    made = plan.make(composed(LARGE), FACTS, [], False)
    assert made.parameters == {"embedding": 1_180_237_824, "other": 26_047_480_320}


@pytest.mark.parametrize("facts", [{"fits": False, "cost": None, "message": "Used"}, {"needed_bytes": int(96e9)}])
def test_what_needs_more_than_a_chip_has_does_not_fit(facts: dict[str, Any]) -> None:
    made = plan.make(composed(LARGE), FACTS | facts, [], False)
    assert not made.fits
    assert lines(made)[0].startswith("DOES NOT FIT")


def test_a_refusal_for_memory_tells_the_bytes() -> None:
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded by 24.76G."
    )
    assert out_of_memory(message) == int(120.5 * 2**30)
    message = "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (474.42G) exceeds available HBM"
    assert out_of_memory(message) == int(474.42 * 2**30)
    assert out_of_memory("RESOURCE_EXHAUSTED: in other words") == 0
    assert out_of_memory("INTERNAL: something else") is None


def test_equal_programs_are_remembered_and_others_are_not() -> None:
    def key(*overrides: str) -> str:
        return ahead.key(composed([*LARGE, *overrides]))

    same = ["train.steps=9", "train.seed=3", "optim.lr=1", "checkpoint.every=7", "cluster.num_slices=1"]
    other = [
        "train.remat=dots",
        "train.batch=1024",
        "data.sequence=4096",
        "model.window=8",
        "mesh.tensor=1 mesh.fsdp=-1",
    ]
    assert {key(o) for o in same} == {key()}
    assert len({key(), *(key(*o.split()) for o in other[:-1])}) == len(other)
    assert key(*other[-1].split()) == key()  # -1 fills to the same mesh


def test_a_custom_topology_is_another_program() -> None:
    usual = ["model=gemma2_27b", "cluster.slice=v5p-12288", "mesh.tensor=8", "train.batch=768"]
    assert ahead.key(composed(usual)) != ahead.key(composed([*usual, "cluster.topology=8x24x32"]))


def test_a_search_keeps_what_was_given() -> None:
    config = composed(LARGE)
    found = list(search.candidates(config, {"mesh.fsdp", "train.batch"}))
    assert {c.program.mesh.fsdp for c in found} == {512}
    assert {c.train.batch for c in found} == {512}
    assert {c.train.remat for c in found} == set(search.REMAT)


def test_a_search_without_limits_tries_meshes_and_batches() -> None:
    found = list(search.candidates(composed(["model=gemma2_27b", "cluster.slice=v5p-1024", "plan.search=true"]), set()))
    assert {c.program.mesh.tensor for c in found} == {1, 2, 4, 8, 16}
    assert {c.train.batch // c.program.mesh.batch_shards for c in found} == set(search.BATCH_A_CHIP)


def test_across_slices_only_replicas() -> None:
    config = composed(
        ["model=gemma2_9b", "cluster.slice=v5p-128", "cluster.num_slices=2", "mesh=multislice", "plan.search=true"]
    )
    assert {c.program.mesh.replica % 2 for c in search.candidates(config, set())} == {0}


def test_a_search_compiles_few_and_ranks_what_fits_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "ask", fits_from(64, asked))
    config = composed(
        ["model=gemma2_27b", "cluster.slice=v5p-1024", "data.sequence=8192", "plan.search=true", "plan.compiles=2"]
    )
    found = search.best(config, {"data.sequence"}, ["model=gemma2_27b"], lambda *_: None)
    assert sum(p.fits for p in found) == 2
    assert len(asked) <= 6
    assert [p.fits for p in found] == sorted((p.fits for p in found), reverse=True)
    assert f"mesh.fsdp={found[0].mesh['fsdp']}" in found[0].overrides
    assert set(as_json(found)) > {"ranking", "fits", "overrides"}


def test_the_smallest_slice_is_looked_for_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "ask", fits_from(1, asked))
    config = composed(["model=gemma2_9b", "data.sequence=8192", "plan.smallest=true"])
    found = search.smallest(config, {"data.sequence"}, [], lambda *_: None)
    assert found[0].slice == asked[0].cluster.slice == "v5p-8"  # 147 GB of state over four chips


def test_a_run_that_fits_by_far_asks_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ask", not_asked)
    preflight.check_fits(composed(["model=tiny", "cluster=ray", "cluster.address=x:1"]))


@pytest.mark.parametrize("override", ["plan.skip=true", "cluster=local"])
def test_a_simulated_slice_and_plan_skip_ask_no_compiler(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ask", not_asked)
    preflight.check_fits(composed([*LARGE, "cluster=ray", "cluster.address=x:1", override]))


def test_a_run_that_does_not_fit_is_refused_and_the_nearest_mesh_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "ask", fits_from(32, asked))
    mesh = ["mesh.fsdp=8", "mesh.replica=64", "mesh.tensor=1"]
    config = composed([*(o for o in LARGE if "mesh" not in o), *mesh, "cluster=ray", "cluster.address=x:1"])
    with pytest.raises(preflight.ConfigError) as refusal:
        preflight.check_fits(config)
    text = str(refusal.value)
    assert text.startswith("mesh.replica=64 mesh.fsdp=8 mesh.tensor=1: needs 100.0 GB of 95 GB HBM a chip")
    assert "mesh.fsdp=32" in text
    assert "plan.skip=true" in text


def test_arithmetic_knows_more_memory_and_more_work() -> None:
    program = composed(LARGE).program

    def with_train(**changes: Any) -> analytic.Rough:
        return analytic.rough(replace(program, train=replace(program.train, **changes)))

    kept = [with_train(remat=remat) for remat in ("full", "narrow", "dots", "none")]
    assert [r.hbm_bytes for r in kept] == sorted(r.hbm_bytes for r in kept)
    assert kept[0].step_s > kept[1].step_s > kept[2].step_s
    assert with_train(batch=1024).step_s > with_train().step_s


@needs_compiler
def test_a_plan_says_what_was_asked(compiled: tuple[Path, dict[str, Any]]) -> None:
    found = compiled[1]
    parts = found["hbm_bytes"]
    assert found["fits"] is True
    assert found["parameters"] == {"embedding": 272 * 64, "other": 74304}
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert found["mesh"] == {"replica": 1, "fsdp": 2, "tensor": 2}
    assert found["flops"]["hlo"] >= 0.95 * found["flops"]["model"]
    assert set(found["sent_bytes"]) >= {"fsdp", "tensor"}
    assert all(found["step_s"][name] > 0 for name in ("compute", "hbm", "network", "estimate"))
    assert 0 < found["mfu"] < 1
    assert found["tokens"] == 1e9
    assert set(SMALL) == set(found["overrides"])


@needs_compiler
def test_what_the_compiler_refuses_does_not_fit(tmp_path: Path) -> None:
    """Its real refusal: the logits of 131072 tokens at once."""
    logits = ["model.vocab=256128", "train.batch=64", "data.sequence=8192", "train.loss_chunk=8192"]
    done = command("model=tiny", "cluster.slice=v5p-8", *logits, f"run.cache={tmp_path}", "output=json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["fits"], found["step_s"], found["mfu"]) == (2, False, None, None)
    assert found["hbm_bytes"]["total"] > 4 * 256128 * 131072
    assert "RESOURCE_EXHAUSTED" in found["message"]


@needs_compiler
def test_two_slices_sum_their_gradients_over_the_dcn(tmp_path: Path) -> None:
    two = ["cluster.num_slices=2", "mesh=multislice", "mesh.tensor=1", "train.batch=16"]
    done = command("model=tiny", "cluster.slice=v5p-8", *two, f"run.cache={tmp_path}", "output=json")
    found = json.loads(done.stdout)
    other = [size for axes, kinds in found["sent_bytes"].items() if "replica" in axes for size in kinds.values()]
    share = sum(found["parameters"].values()) / 4
    assert sum(other) > 2 * share  # of the gradients, in bfloat16 at least
    assert found["step_s"]["estimate"] > 0
    assert found["step_s"]["network"] > sum(other) / v5p.DCN_BYTES_PER_S * 0.99


@needs_compiler
def test_asked_again_it_remembers(compiled: tuple[Path, dict[str, Any]]) -> None:
    cache, first = compiled
    done = command(*SMALL, f"run.cache={cache}", "output=json", "train.tokens=1e9")
    assert json.loads(done.stdout) == first | {"cached": True}
    assert {path.suffix for path in (cache / "plans").iterdir()} == {".json"}  # nothing half-written, no log


@needs_compiler
def test_a_torn_answer_is_asked_for_anew(compiled: tuple[Path, dict[str, Any]]) -> None:
    cache, first = compiled
    (remembered,) = (cache / "plans").glob("*.json")
    whole = remembered.read_text()
    remembered.write_text(whole[: len(whole) // 2])
    done = command(*SMALL, f"run.cache={cache}", "output=json")
    assert json.loads(done.stdout)["hbm_bytes"] == first["hbm_bytes"]


@needs_compiler
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_plan_that_is_stopped_leaves_no_compiler_and_no_answer(how: signal.Signals, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "launch.plan", *SMALL, f"run.cache={tmp_path}"]
    with subprocess.Popen(line, cwd=TOP, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(how)
        process.wait(timeout=30)
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert not list((tmp_path / "plans").glob("*.json"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["output=xml"], "plan: output=xml: allowed are text and json"),
        (["mesh.fsdp=3"], "plan: mesh.replica=1 mesh.fsdp=3 mesh.tensor=1: makes 3 chips, the cluster has 8"),
        (["cluster.slice=v5p-9"], "plan: cluster.slice=v5p-9: no such slice; allowed: v5p-8"),
        (["cluster.slice=v5p-1024", "cluster.topology=8x8x9"], "plan: cluster.topology=8x8x9: allowed for"),
        (["train.tokens=-1"], "plan: train.tokens=-1"),
        (["plan.serach=true"], "plan: plan.serach: unknown key; did you mean plan.search"),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], expected: str) -> None:
    done = command(*overrides)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(expected), done.stderr
    assert done.stderr.count("\n") == 1


def test_training_takes_no_tokens() -> None:
    line = [sys.executable, "-m", "launch.train", "train.tokens=1e6"]
    done = subprocess.run(line, cwd=TOP, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("train: train.tokens=1e+06: only launch.plan takes it; give train.steps=977")
