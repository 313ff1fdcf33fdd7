"""launch.plan: the real step compiled for slices that are not here, and what it says of it."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemma.plan import v5p
from gemma.plan.compile_ahead import out_of_memory
from launch.plan import composed, lines
from orchestrator.plan import ahead, plan
from tests.plan_facts import FACTS, LARGE

TOP = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
SMALL = ["model=tiny", "cluster.slice=v5p-8", "mesh.tensor=2"]


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.plan", *overrides]
    return subprocess.run(line, cwd=TOP, capture_output=True, text=True, timeout=300)


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


def test_large_copies_are_not_made_beside_a_step() -> None:
    small = ["model=gemma2_27b", "cluster.slice=v5p-16", "data.sequence=8192", "train.batch=8"]
    assert plan.make(composed(small), FACTS, [], False).hbm_bytes.copies == 0


def test_copies_of_the_state_count_and_may_be_what_does_not_fit() -> None:
    made = plan.make(composed(LARGE), FACTS, [], False)
    assert (made.hbm_bytes.copies, made.hbm_bytes.total) == (60, 160)
    off = [*LARGE, "checkpoint.snapshot=off", "checkpoint.every=0"]
    assert plan.make(composed(off), FACTS, [], False).hbm_bytes.total == 100
    facts = FACTS | {"needed_bytes": int(v5p.HBM_BYTES) - 1}
    made = plan.make(composed(LARGE), facts, [], False)
    assert (made.fits, made.message) == (False, plan.WITHOUT_COPIES)
    assert plan.make(composed(off), facts, [], False).fits


def test_the_program_that_needs_most_decides_and_is_named() -> None:
    made = plan.make(composed(LARGE), FACTS | {"programs_bytes": {"eval": int(96e9), "init": 40}}, [], False)
    assert (made.fits, made.largest, made.programs_bytes["train"]) == (False, "eval", 160)
    assert "96.00 GB of 95 GB HBM a chip, by the program `eval`" in lines(made)[0]


def test_the_other_dtype_of_gradients_is_priced_beside_the_one_that_was_compiled() -> None:
    sent = {"fsdp": {"all-gather": 6e9, "reduce-scatter": 3e9}}
    made = plan.make(composed(LARGE), FACTS | {"cost": FACTS["cost"] | {"sent_bytes": sent}}, [], False)
    assert made.gradients["bfloat16"] == {"sent_bytes": 3e9, "network_s": 0.1}
    assert made.gradients["float32"] == {"sent_bytes": 6e9, "network_s": 0.2}
    assert any(line.startswith("gradients   summed over fsdp in bfloat16 3.00 GB, 0.100 s;") for line in lines(made))


@needs_compiler
def test_a_plan_says_what_was_asked(compiled: tuple[Path, dict[str, Any]]) -> None:
    found = compiled[1]
    parts = found["hbm_bytes"]
    assert found["fits"] is True
    assert set(found["programs_bytes"]) == {"train", "eval", "init", "pack", "unpack", "sums", "copy"}
    assert all(size >= parts["parameters"] for size in found["programs_bytes"].values())
    assert found["programs_bytes"]["eval"] >= parts["parameters"] + parts["optimizer"]
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
