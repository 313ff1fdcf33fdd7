"""Which rows a batch holds, and who reads them.

B batch, T time, U = T + 1.
"""

from pathlib import Path

import numpy as np
import pytest

from gemma.config import ConfigError
from gemma.text.order import Order, batch_at, places
from gemma.text.token_cache import Meta, Tokens
from gemma.train import data
from tests.small_text import BATCH, SEQUENCE, config

PLAIN = Order(((0, BATCH),))


def numbered(length: int, seed: int = 0, batch: int = BATCH) -> data.Dataset:
    """A dataset whose every token is its own position in the flat file."""
    flat = np.arange(length, dtype=np.uint32)
    meta = Meta("uint32", length, length, 1, length, {})
    return data.open_dataset(Tokens(meta, flat, flat), config(Path("unread")), batch, seed)


def batch(dataset: data.Dataset, step: int, order: Order = PLAIN) -> np.ndarray:
    """tokens_BU of a step."""
    return dataset.train_rows(places(order, step), 0, batch_at(order, step))


def test_a_batch_depends_on_config_seed_and_step_alone() -> None:
    used, fresh = numbered(4001), numbered(4001)
    for step in (5, 0, 70):  # 31 steps are an epoch
        batch(used, step)
    for step in (0, 3, 70):
        np.testing.assert_array_equal(batch(used, step), batch(fresh, step))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_shares_of_one_global_batch(hosts: int) -> None:
    share = BATCH // hosts
    whole, here = batch(numbered(4001), 3), places(PLAIN, 3)
    parts = [numbered(4001).train_rows(here, host * share, (host + 1) * share) for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("seed, step", [(1, 3), (0, 4)])
def test_another_seed_or_step_is_another_batch(seed: int, step: int) -> None:
    assert not np.array_equal(batch(numbered(4001, seed), step), batch(numbered(4001), 3))


def test_an_epoch_covers_every_row_once_in_a_new_order() -> None:
    dataset = numbered(SEQUENCE * BATCH * 5 + 1)
    epochs = [np.concatenate([batch(dataset, step)[:, 0] for step in steps]) for steps in (range(5), range(5, 10))]
    for starts_B in epochs:
        np.testing.assert_array_equal(np.sort(starts_B), np.arange(5 * BATCH) * SEQUENCE)
    assert not np.array_equal(*epochs)


def test_rows_are_windows_that_overlap_by_one_token() -> None:
    dataset = numbered(SEQUENCE * 40 + 1)
    for row_U in batch(dataset, 2):
        np.testing.assert_array_equal(row_U, row_U[0] + np.arange(SEQUENCE + 1))
        assert row_U[0] % SEQUENCE == 0


@pytest.mark.parametrize("step", [0, 4, 5, 70])  # 31 batches are an epoch
def test_the_ids_of_a_batch_name_the_rows_it_holds(step: int) -> None:
    dataset = numbered(4001)
    starts_B = batch(dataset, step)[:, 0]  # every token is its own position
    assert data.row_ids(dataset, places(PLAIN, step)) == [start // SEQUENCE for start in starts_B]


@pytest.mark.parametrize("length, rows", [(SEQUENCE * 9, 8), (SEQUENCE * 9 + 1, 9), (SEQUENCE * 10, 9)])
def test_only_whole_rows_count(length: int, rows: int) -> None:
    assert len(data.Rows(np.arange(length), SEQUENCE)) == rows


def test_tokens_are_int32(opened: Tokens) -> None:
    assert data.open_dataset(opened, config(Path("unread")), BATCH, 0).train_rows([0], 0, 1).dtype == np.int32


def test_fewer_rows_than_a_batch_are_refused() -> None:
    assert len(numbered(SEQUENCE * 8 + 1, batch=8).train) > 8
    with pytest.raises(ConfigError, match="data.path=unread: 144 training tokens make 8 rows .* train.batch=9"):
        numbered(SEQUENCE * 9, batch=9)
