"""The token of a Ray cluster: without it nobody who reaches the cluster's ports may read, write or run anything there.

Ray 2.60 has it from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH. The token itself is only in a file of mode 0600: never in a
command line, a log or a manifest.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
FILE = "auth_token"


def new_token() -> str:
    return secrets.token_hex(32)


def write_token(folder: Path, token: str) -> Path:
    """A file that only this user can read. Raises FileExistsError rather than use one that is there."""
    path = folder / FILE
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return path


def user_token() -> str | None:
    """The token that this user's environment has for clusters which others started; None where it has none.

    Raises OSError where RAY_AUTH_TOKEN_PATH cannot be read.
    """
    if os.environ.get(MODE, "").lower() != "token":
        return None
    if token := os.environ.get(TOKEN):
        return token
    return Path(os.environ.get(PATH) or "~/.ray/auth_token").expanduser().read_text().strip()


def token_env(path: Path) -> dict[str, str]:
    return {MODE: "token", PATH: str(path)}


@contextmanager
def using(path: Path) -> Iterator[None]:
    """This process, and the processes that it starts meanwhile, use the token in a file."""
    before = {name: os.environ.get(name) for name in (MODE, TOKEN, PATH)}
    os.environ.pop(TOKEN, None)
    os.environ.update(token_env(path))
    refresh()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        refresh()


def refresh() -> None:
    """Ray has read mode and token when it was imported, or first used them."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
