"""What a compiled program depends on besides its config: this package's source, and the compilers."""

import functools
import hashlib
from importlib import metadata
from pathlib import Path


@functools.cache
def source_digest() -> str:
    """Of every file of this package: a changed line is another program."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
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
