"""The code that is sent is what the checkout holds, and its manifest says how that differs from the commit."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from gemma.config import ConfigError
from orchestrator.record import source

IDENTITY = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]


def git(top: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=top, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With a file of each kind; clean but for what is ignored."""
    top = tmp_path / "checkout"
    for name in ("conf/run.yaml", "gemma/train/step.py", "orchestrator/run.py", "launch/train.py", "tests/test_x.py"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"# {name}\n")
    (top / ".gitignore").write_text("__pycache__/\nruns/\n*.secret\n")
    git(top, "init", "-q")
    git(top, "add", ".")
    git(top, "commit", "-q", "-m", "all")
    (top / "gemma/__pycache__").mkdir()
    (top / "gemma/__pycache__/step.pyc").touch()
    (top / "gemma/a.secret").touch()
    (top / "runs/some").mkdir(parents=True)
    (top / "runs/some/manifest.json").touch()
    return top


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert source.source(checkout) == source.Source(git(checkout, "rev-parse", "HEAD"), "")


def test_changes_and_new_files_of_ours_are_in_the_diff_and_the_index_stays_as_it_was(checkout: Path) -> None:
    (checkout / "gemma/train/step.py").write_text("# changed\n")
    (checkout / "orchestrator/fresh.py").write_text("# new\n")
    (checkout / "launch/train.py").unlink()
    before = git(checkout, "status", "--porcelain")
    found = source.source(checkout)
    assert found.commit == git(checkout, "rev-parse", "HEAD") + "+"
    assert found.diff is not None
    for line in ("+# changed", "+++ b/orchestrator/fresh.py", "+# new", "+++ /dev/null"):
        assert line in found.diff.splitlines()
    assert "secret" not in found.diff
    assert git(checkout, "status", "--porcelain") == before


def test_a_long_diff_is_cut_and_says_so(checkout: Path) -> None:
    (checkout / "gemma/train/step.py").write_text("x" * 2 * source.MOST_DIFF)
    diff = source.source(checkout).diff
    assert diff is not None
    assert len(diff) < source.MOST_DIFF + 100
    assert "[cut here: " in diff[-100:]


def test_an_archive_holds_what_a_run_needs_and_tells_where_it_came_from(checkout: Path, tmp_path: Path) -> None:
    (checkout / "gemma/fresh.py").write_text("# new\n")
    (checkout / "launch/train.py").unlink()
    expected = source.source(checkout)
    packed = source.pack(tmp_path, checkout)
    there = tmp_path / "there"
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(there)
    names = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    needed = {"conf/run.yaml", "gemma/train/step.py", "gemma/fresh.py", "orchestrator/run.py"}
    assert names == needed | {source.SUBMITTED}
    assert source.is_submitted(there)
    assert not source.is_submitted(checkout)
    assert source.source(there) == expected


def test_the_same_code_makes_the_same_archive_later_too(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again").mkdir()
    first = source.pack(tmp_path, checkout).read_bytes()
    os.utime(checkout / "gemma/train/step.py", (1, 1))
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert source.pack(tmp_path / "again", checkout).read_bytes() == first


@pytest.mark.parametrize("below", [False, True], ids=["no git", "below somebody else's checkout"])
def test_outside_a_checkout_all_of_ours_is_sent_and_no_commit_is_claimed(checkout: Path, below: bool) -> None:
    (checkout / ".git").rename(checkout.parent / ".git" if below else checkout.parent / "away")
    assert source.source(checkout) == source.Source(None, None)
    found = source.files(checkout)
    assert found == ["conf/run.yaml", "gemma/a.secret", "gemma/train/step.py", "launch/train.py", "orchestrator/run.py"]


def test_code_that_is_too_big_is_refused_by_the_name_of_its_largest_file(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_BYTES", 1000)
    (checkout / "gemma/weights.bin").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match=r"^detach=true: the code to send has .* gemma/weights\.bin alone"):
        source.pack(tmp_path, checkout)
