"""Held-out loss: a fixed sample of rows of each set, whatever batch, mesh and seed the run has.

B batch, U = T + 1, T time. Without a Trainer, so that a checkpoint of any run can be judged the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from gemma.config import OWN_SPLIT, ConfigError, Program
from gemma.text.corpus import Texts
from gemma.text.token_cache import Checked
from gemma.text.tokenizer import PAD
from gemma.train import data

SEED = 0  # of every sample: never train.seed, so that runs are judged on the same rows


@dataclass(frozen=True)
class EvalSet:
    name: str
    sample: grain.MapDataset  # rows of U tokens, in the fixed order in which they are drawn
    rows: int  # of the sample, from its start: what is evaluated


def eval_sets(program: Program, texts: Texts) -> list[EvalSet]:
    """The run's own held-out split, then eval.sets by name. Raises ConfigError where one has not a single row."""
    sequence, rows = program.data.sequence, program.eval.rows
    own = texts.own.tokens
    if len(own.eval) <= sequence:
        raise ConfigError(
            f"data.path={program.data.path}: {len(own.eval)} held-out tokens, less than one row of"
            f" data.sequence={sequence}; raise data.eval_fraction={program.data.eval_fraction} or give more text"
        )
    found = [sampled(OWN_SPLIT, own.eval, sequence, rows)]
    for name, text in texts.sets.items():
        all_of_it = text.tokens.train
        if len(all_of_it) <= sequence:
            raise ConfigError(
                f"{text.setting}={text.data.path}: {len(all_of_it)} tokens, less than one row of"
                f" data.sequence={sequence}"
            )
        found.append(sampled(name, all_of_it, sequence, rows))
    return found


def sampled(name: str, tokens: np.ndarray | Checked, sequence: int, rows: int) -> EvalSet:
    """`rows` rows drawn over the whole of the tokens; all of them, each once, where there are no more."""
    source = data.Rows(tokens, sequence)
    drawn = grain.MapDataset.source(source).seed(SEED).shuffle()
    return EvalSet(name, drawn, min(rows, len(source)))


def batch_rows(one: EvalSet, first: int, start: int, stop: int) -> np.ndarray:
    """tokens_bU, int32: rows start..stop-1 of the batch that begins at row `first` of the sample.

    Past the end come rows of padding, which weigh nothing.
    """
    blank = np.full_like(one.sample[0], PAD)
    return np.stack([one.sample[row] if row < one.rows else blank for row in range(first + start, first + stop)])


def loss(evaluate: Any, params: Any, batch: jax.ShapeDtypeStruct, one: EvalSet) -> tuple[float, float]:
    """The mean loss in nats over the targets of a set's sample, and their number.

    evaluate: (params, tokens_BU) -> (loss sum, target count), compiled for arrays like `batch`. Every host calls this
    with the same set.
    """
    total = count = 0.0
    for first in range(0, one.rows, batch.shape[0]):
        total_, count_ = evaluate(params, data.place(batch, partial(batch_rows, one, first)))
        total, count = total + float(total_), count + float(count_)
    return total / max(count, 1.0), count


def losses(
    evaluate: Any, params: Any, batch: jax.ShapeDtypeStruct, sets: Sequence[EvalSet]
) -> tuple[tuple[str, float, float], ...]:
    """Name, mean loss and number of targets of each set."""
    return tuple((one.name, *loss(evaluate, params, batch, one)) for one in sets)
