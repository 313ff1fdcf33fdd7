"""Signals become questions; what was there before comes back."""

import os
import signal
from collections.abc import Iterator

import pytest

from orchestrator.interrupt import SIGNALS, Interrupt


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Tests that were started under nohup ignore SIGHUP, and the command then does so on purpose."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends_at_once(number: signal.Signals) -> None:
    with Interrupt() as interrupt:
        assert not interrupt.asked()
        os.kill(os.getpid(), number)
        assert interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_while_all_is_put_away_a_signal_cuts_nothing_short() -> None:
    with Interrupt() as interrupt:
        interrupt.closing = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.asked()
    finally:
        signal.signal(signal.SIGHUP, before)
