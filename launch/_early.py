"""SIGTERM and Ctrl-C while a run still starts: imported first, before anything that takes seconds.

Until the training loop catches signals itself there is nothing to save, so the process ends at
once: after SIGTERM with the code upon which schedulers start a run again.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from olmoearth_jax import early as answers

AGAIN = 75
"""Exit code of a run that ended before its time through no fault of its own (EX_TEMPFAIL)."""

ABORTED = 130
"""What shells report for Ctrl-C."""


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process and the readers that it has started."""
    del frame
    name = b"Ctrl-C" if number == signal.SIGINT else b"SIGTERM"
    os.write(2, name + b": ended at once; nothing is lost. Run it again to go on.\n")
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else ():
        child.kill()
    os._exit(ABORTED if number == signal.SIGINT else AGAIN)


def is_program(verb: str) -> bool:
    """Whether this process was started with `python -m launch.<verb>`."""
    spec = sys.modules["__main__"].__spec__
    return getattr(spec, "name", None) == f"{__package__}.{verb}"


if is_program("train"):
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # shells ignore it for "&"
        signal.signal(signal.SIGINT, leave)
    answers.answer("launch.train")
