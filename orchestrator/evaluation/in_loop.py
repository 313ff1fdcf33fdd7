"""Rows of the card asked while a run trains, on the same hosts, with the weights where they are: `eval.tasks`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma.batching import rows as blocks
from gemma.config import ConfigError
from gemma.messages import Scores
from gemma.text import tokenizer as tokenizers
from orchestrator.config import Config
from orchestrator.evaluation import judge, requests, tasks
from orchestrator.evaluation.requests import Asked, Rendered
from orchestrator.evaluation.tasks import NoDataError, Row

BLOCK_TOKENS = 1024  # that a device computes at a time


@dataclass(frozen=True)
class Asking:
    rows: tuple[Row, ...]
    asked: Asked
    rendered: tuple[Rendered, ...]
    steps: tuple[tuple[int, ...], ...]  # blocks that are computed together

    @property
    def digest(self) -> str:
        return self.asked.plan.digest()


def open_asking(config: Config, folder: Path) -> Asking:
    """Renders all requests into the run directory. Raises ConfigError: nothing is left out of a curve."""
    data = Path(config.eval.data).expanduser() if config.eval.data else None
    if data is not None and not data.is_dir():
        raise ConfigError(f"eval.data={config.eval.data}: no such folder")
    found = [tasks.read_row(name) for name in named(config.eval.tasks)]
    parts: list[tuple[str, str, Any]] = []
    for row in found:
        try:
            opened = tasks.open_parts(row, data)
        except NoDataError as error:
            raise ConfigError(f"eval.tasks={row.name}: {error}") from error
        for part in opened:
            if part.kind != "choices":
                raise ConfigError(f"eval.tasks={row.name}: its answers are written; launch.evaluate asks for those")
            part.task.build_all_requests(limit=config.eval.limit)
            parts.append((row.name, part.name, part.task))
    coder = tokenizers.load(config.data.tokenizer)
    asked, rendered, absent = requests.ask(parts, coder, config.model.context, BLOCK_TOKENS)
    for name, why in absent.items():
        raise ConfigError(f"eval.tasks={name}: {why}")
    blocks.save(asked.plan, folder / blocks.FILE)
    mesh = config.filled_mesh
    steps = blocks.steps(asked.plan, range(asked.plan.blocks), mesh.replica * mesh.fsdp)
    return Asking(tuple(found), asked, tuple(rendered), tuple(steps))


def named(names: Sequence[str]) -> list[str]:
    """Raises ConfigError."""
    known = tasks.SUITES["card"]
    for name in names:
        if name not in known:
            raise ConfigError(f"eval.tasks={name}: there is no such row; allowed are {', '.join(known)}")
    return list(dict.fromkeys(names))


def values(asking: Asking, found: Sequence[Scores]) -> dict[str, float]:
    """Each row's value in percent."""
    scores: dict[int, tuple[float, bool]] = {}
    for one in found:
        scores |= dict(zip(asking.asked.plan.requests_of(one.block), one.found, strict=True))
    return {
        row.name: judge.judge(row, [one for one in asking.rendered if one.row == row.name], scores, {})[0]["value"]
        for row in asking.rows
    }
