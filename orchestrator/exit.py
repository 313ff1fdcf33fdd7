"""What a command leaves with."""

from enum import IntEnum


class Exit(IntEnum):
    FINISHED = 0
    MISTAKE = 1  # the user's
    GAVE_UP = 2
    STOPPED = 3  # by a signal; resumable


HOW = {Exit.FINISHED: "finished", Exit.GAVE_UP: "gave up", Exit.STOPPED: "stopped, resumable"}
