"""What a compiled program depends on beyond its config: this package's source, and the compilers."""

import functools
import hashlib
from importlib import metadata
from pathlib import Path


@functools.cache
def source_digest() -> str:
    """Of every file of this package: a changed line is another program."""
    digest = hashlib.sha256()
    top = Path(__file__).parent
    for path in sorted(top.rglob("*.py")):
        digest.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def packages(*names: str) -> dict[str, str]:
    """Installed versions; "none" where a package is not there."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
