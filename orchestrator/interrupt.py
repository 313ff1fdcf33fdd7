"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import signal
from collections.abc import Callable
from types import FrameType


class Interrupt:
    """Installed for the life of a run, in the main thread."""

    def __init__(self, say: Callable[[str], None]):
        self.count = 0
        self.say = say
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        self.say(f"{signal.Signals(number).name}: finishing the steps in flight, saving, stopping (again: at once)")

    def asked(self) -> bool:
        return self.count > 0
