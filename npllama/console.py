"""What commands show while they run: text as it is made, tokens per second, the peak of memory."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from .generation import Step


def write(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class _Collected(logging.Handler):
    """Keeps the messages of warnings, and those of what is only information."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings: list[str] = []
        self.information: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        (self.warnings if record.levelno >= logging.WARNING else self.information).append(record.getMessage())


@contextlib.contextmanager
def collected_log() -> Iterator[_Collected]:
    """Collect what the library logs meanwhile, for a command to show where it fits."""
    logger, handler = logging.getLogger("npllama"), _Collected()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield handler
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Statistics:
    """Counts tokens and seconds of one prompt."""

    def __init__(self, n_prompt: int, note: str = ""):
        self.n_prompt, self.n_made, self.note = n_prompt, 0, note
        self.started = self.first = self.last = time.perf_counter()

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass the steps on, and take down when each came."""
        for step in steps:
            self.last = time.perf_counter()
            if self.n_made == 0:
                self.first = self.last
            self.n_made += 1
            yield step

    def print(self) -> None:
        """One line on standard error, if anything was made."""
        if not self.n_made:
            return
        parts = [f"prefill {self.n_prompt} tokens at {rate(self.n_prompt, self.first - self.started)}"]
        if self.n_made > 1:  # the first token comes from the prefill
            parts.append(f"decode {self.n_made - 1} tokens at {rate(self.n_made - 1, self.last - self.first)}")
        if (peak := peak_memory()) is not None:
            parts.append(f"peak memory {peak / 1e6:,.0f} MB")
        if self.note:
            parts.append(self.note)
        print("; ".join(parts), file=sys.stderr)


def rate(n: int, seconds: float) -> str:
    """Tokens per second, for reading."""
    return f"{n / max(seconds, 1e-9):,.1f} tokens/s"


def peak_memory() -> int | None:
    """The largest resident size of this process so far, in bytes; mapped weights count once they are read."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
