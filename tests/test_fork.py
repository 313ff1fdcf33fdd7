"""A fork begins at its parent's step and leaves the parent as it is; a copied folder has no second owner."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gemma.config import ConfigError
from gemma.text import order as orders
from launch import fork, status
from orchestrator.config import with_id
from orchestrator.page import history, page
from orchestrator.record import rundir
from orchestrator.recovery import checkpoints
from orchestrator.run import going_on
from tests.test_checkpoints import event, worked
from tests.test_config import config_of
from tests.test_rundir import fabricate


def test_a_fork_begins_at_the_step_without_the_batches_that_were_left_out_and_the_parent_stays(tmp_path: Path) -> None:
    parent = worked(tmp_path)
    event(parent, "restore", 10, batches=[[0, 8], [10, 16]])
    event(parent, "skip_batch", 15, places=[[112, 120]], ids=[1])
    event(parent, "skip_batch", 39, places=[[300, 316]], ids=[2])
    (parent / "checkpoints" / "20" / "weights").write_text("of the parent")
    child = fabricate(tmp_path, "child")
    made = replace(rundir.read_manifest(child), parent={"id": "some", "step": 20})
    fork.begin(child, parent, 20, made)
    assert checkpoints.resumable(child) == 20
    assert orders.recorded(rundir.events(child), 20, 16) == orders.Order(((0, 8), (10, 16)), ((112, 120),))
    assert rundir.read_manifest(child).parent == {"id": "some", "step": 20}
    with open(child / "checkpoints" / "20" / "weights", "r+") as file:  # as chaos tears one, in place
        file.truncate(3)
    assert (parent / "checkpoints" / "20" / "weights").read_text() == "of the parent"


def test_a_fork_that_loses_what_it_began_with_does_not_start_from_step_0(tmp_path: Path) -> None:
    child = fabricate(tmp_path, "child")
    fork.begin(child, worked(tmp_path), 40, rundir.read_manifest(child))
    (child / "checkpoints" / "40").rename(child / "checkpoints" / "gone")
    with pytest.raises(ConfigError, match="does not start from step 0"):
        checkpoints.resumable(child)


@pytest.mark.parametrize(("text", "step"), [("some@20", 20), ("some@latest", 40), ("some", 40), ("PATH@20", 20)])
def test_the_parent_is_named_by_id_or_path_and_a_step(tmp_path: Path, text: str, step: int) -> None:
    folder = worked(tmp_path)
    assert fork.parent_of(text.replace("PATH", str(folder)), str(tmp_path)) == (folder, step)


@pytest.mark.parametrize("text", ["some@7", "some@", "some@-1", "some@x", "other@20"])
def test_a_step_or_run_that_is_not_there_is_refused_by_name(tmp_path: Path, text: str) -> None:
    worked(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(text.partition("@")[0])):
        fork.parent_of(text, str(tmp_path))


def test_status_and_report_say_what_is_a_copy_and_what_a_fork_began_from(tmp_path: Path) -> None:
    parent = worked(tmp_path)
    copy = Path(shutil.copytree(parent, tmp_path / "copied"))
    child = fabricate(tmp_path, "child")
    rundir.write_manifest(child, replace(rundir.read_manifest(child), parent={"id": "some", "step": 20}))
    assert "a copy of some" in status.line(copy)[1]
    assert [status.line(folder)[1] for folder in (parent, child)] == ["died", "died"]
    assert "begun from run some at step 20" in status.detail(child)
    pages = {folder: page.page(history.read(folder, "died", 1e9)) for folder in (parent, copy, child)}
    assert {folder for folder, text in pages.items() if "a copy of run" in text} == {copy}
    assert "run some at step 20" in pages[child]


def test_the_summary_offers_no_resume_that_would_be_refused(tmp_path: Path) -> None:
    folder = worked(tmp_path)
    config = with_id(config_of(), folder.name, str(tmp_path))
    assert going_on(config, folder, "").startswith(f"python -m launch.resume run={folder.name}")
    shutil.rmtree(folder / "checkpoints")
    assert re.match(r"none: .*was committed and is gone", going_on(config, folder, ""))
