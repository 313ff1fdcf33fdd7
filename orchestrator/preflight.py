"""What can be refused before anything is started, besides the config itself."""

import os
import socket
from pathlib import Path

from gemma import corpus, tokenizer
from gemma.config import ConfigError
from orchestrator.config import Config

ANSWER_TIMEOUT_S = 2.0


def check(config: Config) -> None:
    """Raises ConfigError. Data, tokenizer and weights are looked at where they are this machine's: elsewhere the hosts
    look.
    """
    check_root(config.run.root)
    if config.cluster.kind == "ray":
        check_address(str(config.cluster.address))
    if config.cluster.kind == "local":
        if config.train.init_from is not None:
            from gemma import sources  # a tenth of a second that other runs do not pay

            sources.check_model("train.init_from", config.train.init_from, config.model)
        corpus.check(config.data, config.train.batch)
        coder = tokenizer.load(config.data.tokenizer)
        if coder.vocab > config.model.vocab:
            raise ConfigError(
                f"model.vocab={config.model.vocab}: data.tokenizer={config.data.tokenizer} makes {coder.vocab} ids;"
                f" give model.vocab={-(-coder.vocab // 128) * 128} or a larger model"
            )


def check_root(root: str) -> None:
    """The directory of runs exists and can be written, or can be made."""
    path = Path(root).expanduser().absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ConfigError(f"run.root={root}: {path} is a file, not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"run.root={root}: {path} cannot be written")


def check_address(address: str) -> None:
    """Something listens there: Ray itself would try for minutes."""
    if address == "auto" or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster.address={address}: must be HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cluster.address={address}: nothing answers there ({error})") from error
