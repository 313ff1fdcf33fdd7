"""A corpus as tokens: tokenised once, into two flat files that are memory-mapped.

Every document stands as BOS, its tokens, EOS. Rows are windows over the flat file (see `gemma.train.data`), so one
tokenisation serves every sequence length.
"""

import hashlib
import json
import shutil
from pathlib import Path

from gemma.config import ConfigError, Data
from gemma.text import files, tokenise, tokenizer
from gemma.text.token_cache import DamagedError, Tokens, open_cached

FORMAT = 2  # part of the cache key: raise it when the files' meaning changes


def key(data: Data, paths: list[Path]) -> str:
    """Names a tokenisation by all it depends on; a touched file is a new key."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    model = "byte"
    if data.tokenizer != "byte":
        model = hashlib.sha256(Path(data.tokenizer).expanduser().read_bytes()).hexdigest()
    facts = [FORMAT, data.text_key, data.eval_fraction, model, stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def open_tokens(data: Data, cache: Path, vocab: int, setting: str = "data.path", lock_s: float = 600.0) -> Tokens:
    """The tokens of `data`, tokenised now if `cache` lacks them or holds them damaged.

    Processes of one machine, or of a shared file system, do the work once: the others wait for its lock, lock_s at
    most. setting: the key that the user gave the text by. Raises ConfigError where the corpus or tokenizer cannot be
    used, or its ids exceed `vocab`.
    """
    found = files.listing(data, setting)
    coder = tokenizer.load(data.tokenizer)
    if coder.vocab > vocab:
        raise ConfigError(f"model.vocab={vocab}: data.tokenizer={data.tokenizer} makes {coder.vocab} ids")
    folder = cache / "tokens" / key(data, found.files)
    try:
        return open_cached(folder, found)
    except FileNotFoundError:
        pass
    except DamagedError as error:
        print(f"WARNING: the token cache is damaged, and made again: {error}", flush=True)
    with tokenise.lock(folder.with_suffix(".lock"), lock_s):
        try:
            return open_cached(folder, found)  # another process was quicker
        except (FileNotFoundError, DamagedError):
            shutil.rmtree(folder, ignore_errors=True)
        tokenise.build(data, found.files, coder, folder, setting)
    if key(data, files.listing(data, setting).files) != folder.name:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{setting}={data.path}: changed while it was read")
    return open_cached(folder, found)
