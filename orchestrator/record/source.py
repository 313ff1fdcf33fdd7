"""The code that runs: its commit, how it differs from that, and its files as one archive for another machine."""

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma.config import ConfigError
from orchestrator.record import secrets

TOP = Path(__file__).parents[2]
NEEDED = ("conf", "gemma", "launch", "orchestrator", "pyproject.toml", "constraints.txt")  # by a run
SUBMITTED = "submitted.json"  # what an archive has in the place of .git
MOST_DIFF = 1_000_000  # characters
MOST_BYTES = 50_000_000  # of an archive: half of what Ray's dashboard takes
GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Source:
    commit: str | None  # with '+' where the working tree differs; None outside a checkout
    diff: str | None  # how it does, new files of ours and all


def source(top: Path = TOP) -> Source:
    if is_submitted(top):
        return Source(**json.loads((top / SUBMITTED).read_text()))
    try:
        if not (commit := git(top, "rev-parse", "HEAD").strip()) or not is_checkout(top):
            return Source(None, None)
    except (OSError, subprocess.SubprocessError):
        return Source(None, None)
    try:
        found = diff(top)
    except (OSError, subprocess.SubprocessError) as error:
        found = f"[git did not tell how the working tree differs: {error}]\n"
    if len(found) > MOST_DIFF:
        found = f"{found[:MOST_DIFF]}\n[cut here: {len(found)} characters in all]\n"
    return Source(commit + "+" * bool(found), found)


def is_submitted(top: Path = TOP) -> bool:
    """Whether this code came here as an archive."""
    return (top / SUBMITTED).is_file()


def is_checkout(top: Path) -> bool:
    """Not merely a folder below somebody else's."""
    return bool(git(top, "ls-files", "--", "orchestrator"))


def git(top: Path, *arguments: str, index: str = "") -> str:
    """Its output. Raises CalledProcessError, TimeoutExpired, and OSError where there is none."""
    env = os.environ | ({"GIT_INDEX_FILE": index} if index else {})
    done = subprocess.run(["git", *arguments], cwd=top, env=env, capture_output=True, timeout=GIT_TIMEOUT_S, check=True)
    return done.stdout.decode(errors="replace")


def diff(top: Path) -> str:
    """Of the working tree against its commit, without what looks like a secret. New files of ours are in it."""
    with tempfile.TemporaryDirectory() as folder:  # an index of our own
        index = Path(folder, "index")
        shutil.copy(top / git(top, "rev-parse", "--git-path", "index").strip(), index)
        there = [name for name in NEEDED if (top / name).exists()]
        git(top, "add", "--intent-to-add", "--", *there, index=str(index))
        whole = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
        changed = [name for name in git(top, *whole, "--name-only", "-z", index=str(index)).split("\0") if name]
        kept, left_out = sift(top, changed)
        parts = [f"[left out: {name}: {why}]\n" for name, why in left_out.items()]
        literal = ("--literal-pathspecs", *whole, "--")
        for name in kept:  # a part at a time: what was taken out of a file stands in it too
            part = git(top, *literal, name, index=str(index))
            why = secrets.by_content(part.encode())
            parts.append(f"[left out: {name}: {why}]\n" if why else part)
        return "".join(parts)


def sift(top: Path, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The files that may travel and stay in a manifest, and why the others may not."""
    left_out = {name: why for name in names if (why := secrets.why_left_out(top, name))}
    return [name for name in names if name not in left_out], left_out


def files(top: Path = TOP) -> list[str]:
    """What a run needs of a checkout, tracked or new, but for what it ignores; else all there is. Relative, sorted."""
    try:
        asked = ("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *NEEDED)
        found = git(top, *asked).split("\0") if is_checkout(top) else []
    except (OSError, subprocess.SubprocessError):
        found = []
    if not found:
        below = [path for name in NEEDED for path in (top / name, *(top / name).rglob("*"))]
        found = [str(path.relative_to(top)) for path in below]
    return sorted({name for name in found if "__pycache__" not in Path(name).parts and (top / name).is_file()})


def pack(folder: Path, top: Path = TOP) -> Path:
    """An archive of them in a folder, the same for the same code. Raises ConfigError where it is too big."""
    path = folder / "code.zip"
    names, left_out = sift(top, files(top))
    for name, why in left_out.items():
        print(f"detach=true: {name} is not sent: {why}", flush=True)
    sizes = {name: (top / name).stat().st_size for name in names}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"detach=true: the code to send has {sum(sizes.values()) / 1e6:.0f} MB, {largest} alone"
            f" {sizes[largest] / 1e6:.0f}; allowed are {MOST_BYTES / 1e6:.0f}, without what .gitignore names"
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), (top / name).read_bytes(), zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo(SUBMITTED), json.dumps(asdict(source(top))))
    return path
