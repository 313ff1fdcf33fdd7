"""What names a compiled program: where its devices are, not only how many."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma.train import aot

TOP = Path(__file__).parents[1]
# In a process of its own: libtpu, once loaded, stays.
KEYS = """
import os
from gemma.plan.compile_ahead import QUIET
os.environ |= QUIET
from jax.experimental import topologies
from gemma.train import aot
def key(name, **slices):
    return aot.key("train", (1,), topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
print(key("v5p:4x4x8"), key("v5p:4x4x8"), key("v5p:2x8x8"), key("v5p:4x4x4", num_slices=2))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_slices_of_as_many_chips_have_programs_of_their_own() -> None:
    """128 chips: as one torus, as another, and as two slices."""
    done = subprocess.run([sys.executable, "-c", KEYS], cwd=TOP, capture_output=True, text=True, timeout=120)
    one, again, other, two_slices = done.stdout.split()
    assert one == again
    assert len({one, other, two_slices}) == 3


@pytest.mark.parametrize("flag", aot.FLAGS)
def test_another_environment_is_another_program(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = aot.key("train", (1,))
    monkeypatch.setenv(flag, "--xla_of_another_mind")
    assert aot.key("train", (1,)) != before


def test_another_process_is_not_another_program_by_its_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    before = aot.key("train", (1,))
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "10.0.0.9")
    assert aot.key("train", (1,)) == before
