"""Which mesh, remat and batch a search compiles, and what launch.train makes of a run that does not fit."""

from dataclasses import replace
from typing import Any

import pytest

from gemma.plan import analytic
from launch.plan import as_json, composed
from orchestrator.config import Config
from orchestrator.plan import ahead, preflight, search
from tests.plan_facts import FACTS, LARGE


def not_asked(config: Config, tell: ahead.Tell) -> ahead.Answer:
    raise AssertionError(f"the compiler was asked about {ahead.name(config)}")


def fits_from(fsdp: int, asked: list[Config]) -> Any:
    """A compiler to which everything with at least so many ways of fsdp fits."""

    def ask(config: Config, tell: ahead.Tell) -> ahead.Answer:
        asked.append(config)
        ways = config.program.mesh.fsdp
        return ahead.Answer(FACTS | {"fits": ways >= fsdp, "needed_bytes": int(100e9) if ways < fsdp else 100}, False)

    return ask


def test_a_search_keeps_what_was_given() -> None:
    config = composed(LARGE)
    found = list(search.candidates(config, {"mesh.fsdp", "train.batch"}))
    assert {c.program.mesh.fsdp for c in found} == {512}
    assert {c.train.batch for c in found} == {512}
    assert {c.train.remat for c in found} == set(search.REMAT)


SHORT = ["model=gemma2_27b", "cluster.slice=v5p-1024", "plan.search=true", "data.sequence=128"]


def test_a_search_without_limits_tries_meshes_and_batches() -> None:
    found = list(search.candidates(composed(SHORT), set()))
    assert {c.program.mesh.tensor for c in found} == {1, 2, 4, 8, 16}
    assert {c.train.batch // c.program.mesh.batch_shards for c in found} == {2**n for n in range(10)}  # of 128 tokens


@pytest.mark.parametrize(("sequence", "most"), [(128, 512), (8192, 8), (100, 512), (32768, 8)])
def test_rows_of_a_chip_are_more_where_they_are_short(sequence: int, most: int) -> None:
    rows = search.rows_a_chip(sequence)
    assert (rows[0], rows[-1]) == (1, most)
    assert rows == sorted(set(rows))


def test_across_slices_only_replicas() -> None:
    config = composed(
        ["model=gemma2_9b", "cluster.slice=v5p-128", "cluster.num_slices=2", "mesh=multislice", "plan.search=true"]
    )
    assert {c.program.mesh.replica % 2 for c in search.candidates(config, set())} == {0}


def test_a_search_compiles_few_and_ranks_what_fits_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "facts_of", fits_from(64, asked))
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
    monkeypatch.setattr(ahead, "facts_of", fits_from(1, asked))
    config = composed(["model=gemma2_9b", "data.sequence=8192", "plan.smallest=true"])
    found = search.smallest(config, {"data.sequence"}, [], lambda *_: None)
    assert found[0].slice == asked[0].cluster.slice == "v5p-8"  # 147 GB of state over four chips
    assert {config.cluster.slice for config in asked} == {"v5p-8"}
    assert found[0].batch > asked[0].train.batch  # what needs least memory has one row: nobody would train so
    assert "cluster.slice=v5p-8" in found[0].overrides


def test_a_run_that_fits_by_far_asks_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "facts_of", not_asked)
    preflight.check_fits(composed(["model=tiny", "cluster=ray", "cluster.address=x:1"]))


@pytest.mark.parametrize("override", ["plan.skip=true", "cluster=local"])
def test_a_simulated_slice_and_plan_skip_ask_no_compiler(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "facts_of", not_asked)
    preflight.check_fits(composed([*LARGE, "cluster=ray", "cluster.address=x:1", override]))


def test_a_run_that_does_not_fit_is_refused_and_the_nearest_mesh_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "facts_of", fits_from(32, asked))
    mesh = ["mesh.fsdp=8", "mesh.replica=64", "mesh.tensor=1"]
    config = composed([*(o for o in LARGE if "mesh" not in o), *mesh, "cluster=ray", "cluster.address=x:1"])
    with pytest.raises(preflight.ConfigError) as refusal:
        preflight.check_fits(config)
    text = str(refusal.value)
    assert text.startswith("mesh.replica=64 mesh.fsdp=8 mesh.tensor=1: needs 100.0 GB of 95 GB HBM a chip")
    assert "mesh.fsdp=32" in text
    assert "plan.skip=true" in text


def test_where_no_mesh_of_the_slice_fits_the_way_to_a_larger_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(ahead, "facts_of", fits_from(64, asked))
    overrides = ["model=gemma2_27b", "cluster=ray", "cluster.address=x:1", "cluster.slice=v5p-8", "train.batch=4"]
    with pytest.raises(preflight.ConfigError, match=r"fits: none on a v5p-8; .* plan.smallest=true"):
        preflight.check_fits(composed([*overrides, "data.sequence=8192"]))
    assert len(asked) == 1  # 435 GB of state over four chips: no other mesh is worth the compiler's time


def test_arithmetic_knows_more_memory_and_more_work() -> None:
    program = composed(LARGE).program

    def with_train(**changes: Any) -> analytic.Rough:
        return analytic.rough(replace(program, train=replace(program.train, **changes)))

    kept = [with_train(remat=remat) for remat in ("full", "narrow", "dots", "none")]
    assert [r.hbm_bytes for r in kept] == sorted(r.hbm_bytes for r in kept)
    assert kept[0].step_s > kept[1].step_s > kept[2].step_s
    assert with_train(batch=1024).step_s > with_train().step_s
    a_row = [with_train(batch=batch).step_s / batch for batch in (512, 1024, 2048)]
    assert a_row == sorted(a_row, reverse=True)  # the optimizer's share shrinks


def test_of_meshes_equally_near_the_fastest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "facts_of", fits_from(1, []))
    mesh = ["cluster.slice=v5p-16", "data.sequence=8192", "train.batch=8", "mesh.replica=8", "mesh.fsdp=1"]
    found = search.nearest(composed(["model=gemma2_27b", "cluster=ray", "cluster.address=x:1", *mesh]), lambda *_: None)
    assert found
    assert found.program.mesh.shape == (1, 8, 1)  # and not tensor 8
