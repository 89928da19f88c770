"""Entry point of `npllama` and `python -m npllama`: handles Ctrl-C before anything takes time."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> int:
    """Run the command that sys.argv names and return its exit status."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore SIGINT
    if listens:
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as run

    try:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:  # just before run() handles it, or just after
        return INTERRUPTED
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, an interrupt would be a traceback


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: no file is open yet, and an exception during an import may be replaced by another one."""
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
