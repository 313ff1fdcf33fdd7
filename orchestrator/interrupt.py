"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Installed for the life of a run, in the main thread."""

    def __init__(self, say: Callable[[str], None]):
        self.count = 0
        self.say = say
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        self.say(f"{signal.Signals(number).name}: finishing the steps in flight, saving, stopping (again: at once)")

    def asked(self) -> bool:
        return self.count > 0


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
