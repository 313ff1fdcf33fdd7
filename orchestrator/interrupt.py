"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(Exception):
    """The user asked to stop while something was being waited for."""


class Interrupt:
    """Signals as a question that the run asks itself. Open from before anything is made until all is put away."""

    def __init__(self) -> None:
        self.count = 0
        self.closing = False  # nothing is left to be cut short
        self.check: Callable[[], None] = lambda: None  # raises what ends every wait of the run: its cluster is gone

    def __enter__(self) -> "Interrupt":
        # A command under nohup ignores SIGHUP, and goes on doing so.
        self.before = {s: signal.getsignal(s) for s in SIGNALS if s != signal.SIGHUP or not ignored(s)}
        for number in self.before:
            signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if self.closing:
            return
        if self.count > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        # Not print: the signal may come amid a write to the same stream.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing the steps in flight, saving, stopping (again: at once)\n".encode())

    def asked(self) -> bool:
        self.check()
        return self.count > 0


def ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Around `ray.init`, which puts handlers of its own in place of ours: signals wait meanwhile, ours are put back."""
    ours = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Around what must not be cut short. Not by a mask of this thread: another one would be given the signal."""
    if threading.current_thread() is not threading.main_thread():  # only that one is cut short
        yield
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        signal.raise_signal(heard[0])
