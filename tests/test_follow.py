"""Which step a server that follows a run serves."""

from pathlib import Path

import pytest

from orchestrator.programs.serve import newest
from tests.test_front import config


@pytest.mark.parametrize(
    ("steps", "served", "wanted"),
    [
        ([10, 20], None, 20),
        ([10, 20], 10, 20),
        ([10], 20, 20),  # training went back
        ([], 20, 20),  # the run is gone
        ([], None, None),
    ],
)
def test_later_steps_only(tmp_path: Path, steps: list[int], served: int | None, wanted: int | None) -> None:
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    serve = config(checkpoint=str(tmp_path), follow=True).serve
    assert serve is not None
    assert newest(serve, served) == wanted
