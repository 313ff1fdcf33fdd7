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
    (checkout / "gemma/train/step.py").write_text("x\n" * (source.MOST_DIFF - 10_000))
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
    assert "gemma/a.secret" not in packed_names(checkout)


def test_code_that_is_too_big_is_refused_by_the_name_of_its_largest_file(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_BYTES", 1000)
    (checkout / "gemma/table.py").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match=r"^detach=true: the code to send has .* gemma/table\.py alone"):
        source.pack(tmp_path, checkout)


def packed_names(checkout: Path) -> set[str]:
    with zipfile.ZipFile(source.pack(checkout.parent, checkout)) as archive:
        return set(archive.namelist())


FAKE = "Zq3" * 16  # of the length of a key
SECRETS = {
    "launch/.env": "X=1",
    "conf/.env.local": "X=1",
    "conf/credentials.json": "{}",
    "conf/service_account.json": "{}",
    "conf/token.json": "{}",
    "conf/kubeconfig": "x",
    "orchestrator/id_rsa": "x",
    "orchestrator/id_ed25519": "x",
    "orchestrator/server.pem": "x",
    "orchestrator/some.key": "x",
    "orchestrator/some.p12": "x",
    "gemma/.netrc": "x",
    "gemma/weights.safetensors": "x",
    "gemma/raw": "a\0b",
    "gemma/long.txt": "x" * 3_000_000,
    "orchestrator/notes.txt": "-----BEGIN RSA " + "PRIVATE KEY-----\nabc",
    "orchestrator/one.py": f"key = 'AKIA{'Q7' * 8}'",
    "orchestrator/two.py": "key = 'ghp" + f"_{FAKE}'",
    "orchestrator/three.py": "key = 'hf" + f"_{FAKE}'",
    "orchestrator/four.yaml": "key: sk" + f"-{FAKE}",
    "orchestrator/five.py": "key = 'xoxb" + f"-{FAKE}'",
    "orchestrator/six.json": '{"type": "service_account", "project": "x"}',
}


@pytest.mark.parametrize("tracked", [False, True])
def test_secrets_and_weights_are_neither_sent_nor_in_the_diff_and_are_named(
    checkout: Path, capsys: pytest.CaptureFixture[str], tracked: bool
) -> None:
    for name, content in SECRETS.items():
        (checkout / name).write_text("before\n" if tracked else content)
    if tracked:
        git(checkout, "add", "--force", ".")
        git(checkout, "commit", "-q", "-m", "more")
        for name, content in SECRETS.items():
            (checkout / name).write_text(content)
    assert not packed_names(checkout) & SECRETS.keys()
    said, diff = capsys.readouterr().out, source.source(checkout).diff
    assert diff is not None
    for name, content in SECRETS.items():
        assert f"{name} is not sent: " in said
        assert f"[left out: {name}: " in diff
        assert len(content) < 4 or content not in diff


def test_a_secret_that_was_taken_out_of_a_file_does_not_stand_in_the_diff(checkout: Path) -> None:
    path = checkout / "orchestrator/run.py"
    path.write_text(SECRETS["orchestrator/two.py"])
    git(checkout, "commit", "-q", "-a", "-m", "by mistake")
    path.write_text("key = os.environ['KEY']\n")
    diff = source.source(checkout).diff
    assert diff is not None
    assert FAKE not in diff
    assert "[left out: orchestrator/run.py: it holds a GitHub" in diff


def test_source_files_that_speak_of_tokens_and_secrets_are_sent(checkout: Path) -> None:
    names = {
        "gemma/tokens.py": "token = 1",
        "gemma/secret_words.py": "api_key = get('x')",
        "conf/tokenizer.yaml": "a: 1",
    }
    for name, content in names.items():
        (checkout / name).write_text(content)
    assert names.keys() <= packed_names(checkout)


def test_all_of_this_project_is_sent() -> None:
    kept, left_out = source.sift(source.TOP, source.files())
    assert left_out == {}
    assert "gemma/text/tokens.py" in kept
