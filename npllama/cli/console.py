"""Standard input and output: streamed text, statistics, errors on one line, and output whose reader has exited."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from ..engine.ranks.groups import RankLost
from ..engine.ranks.passes import Spread, check_ranks
from ..generation import Step
from ..scope import Params
from ..text.completion import Completion, in_json

FORESEEN = (ValueError, OSError, ImportError, MemoryError)  # bad input, the system, a missing package, too little memory
CHECKED = 1.0  # seconds from one check of the ranks to the next while a command waits for input


def open_streams() -> None:
    """Open the standard streams so that no output is lost unnoticed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `npllama chat <&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # Python runs unbuffered (-u): then a write that a full disk cuts short would count as complete.
        sys.stdout = open(sys.stdout.fileno(), "w", 1, sys.stdout.encoding, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for characters that the terminal's encoding lacks


def flush_output() -> None:
    """Flush the standard streams, before Python does so at exit with an exit status of its own.

    That the reader of standard output has exited is no error. Raises OSError, which names the stream, for any other failure.
    """
    for name, stream in (("standard output", sys.stdout), ("standard error", sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)
        except OSError as error:
            _discard(stream)
            raise OSError(error.errno, error.strerror, name) from None


def _discard(stream: TextIO) -> None:
    """Redirect a stream that can't be written to the null device, and drop its buffer there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    stream.flush()


def tell(line: str) -> None:
    """Print a line of a verdict at once. If the reader has exited, go on: the exit status carries the verdict too."""
    try:
        write(line + "\n")
    except BrokenPipeError:
        _discard(sys.stdout)


def say_error(line: str) -> None:
    """Print a line on standard error, if possible."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # a full disk, or the reader has exited
        _discard(sys.stderr)


def error_text(error: BaseException) -> str:
    """Return an error as one line; an unforeseen one asks for a report. NPLLAMA_DEBUG=1 prints the traceback first."""
    if os.environ.get("NPLLAMA_DEBUG", "0") not in ("", "0"):
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # without Python's "[Errno 2]"
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "npllama_convert":
        return "needs the package npllama_convert, which is installed with npllama: pip install . in its checkout"
    if isinstance(error, FORESEEN):
        return text or type(error).__name__
    kind = type(error).__name__
    return f"unforeseen {kind}{text and ': '}{text}; please report it, with the output of NPLLAMA_DEBUG=1"


def write(text: str) -> None:
    """Write text and flush. Raises OSError, which names the stream, if that fails."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def in_colour() -> bool:
    """Return whether standard output is a terminal and NO_COLOR isn't set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@contextlib.contextmanager
def watched_ranks(params: Params | None) -> Iterator[None]:
    """Raise RankLost within a wait for input if the parameters are spread over ranks, of which one ends meanwhile.

    A timer's signal interrupts the wait: its handler runs in the waiting thread, where no pass is under way, and can end it.
    """
    if not isinstance(params, Spread) or not hasattr(signal, "setitimer"):
        yield
        return

    def check(*_: object) -> None:
        try:
            check_ranks(params)
        except RankLost:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, CHECKED, CHECKED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_text(path: Path | str, params: Params | None = None) -> str:
    """Return the text of a file, or of standard input for `-`. Raises ValueError unless it is UTF-8.

    `params` are those of a model that is loaded already: if one of its ranks ends during the wait, RankLost is raised.
    """
    with watched_ranks(params):
        data = Path(path).read_bytes() if path != "-" else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise ValueError(f"{name}: found the byte 0x{data[error.start]:02x} at {error.start:,}, expected UTF-8") from None


class _Collected(logging.Handler):
    """Collect log messages: warnings, and others."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings: list[str] = []
        self.information: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        (self.warnings if record.levelno >= logging.WARNING else self.information).append(record.getMessage())


@contextlib.contextmanager
def collected_log() -> Iterator[_Collected]:
    """Collect the library's log messages, for a command to print where they fit."""
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
    """Count the tokens and seconds of one prompt."""

    def __init__(self, n_prompt: int, note: str = ""):
        self.n_prompt, self.n_made, self.note = n_prompt, 0, note
        self.started = self.first = self.last = time.perf_counter()

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass the steps on and record their times; the clock starts when the first is requested."""
        self.started = time.perf_counter()
        for step in steps:
            self.last = time.perf_counter()
            if self.n_made == 0:
                self.first = self.last
            self.n_made += 1
            yield step

    def timings(self) -> dict[str, float]:
        """Return token counts and seconds; the first token comes from the prefill."""
        return {
            "prefill_tokens": self.n_prompt,
            "prefill_seconds": round(self.first - self.started, 6),
            "decode_tokens": max(0, self.n_made - 1),
            "decode_seconds": round(self.last - self.first, 6),
        }

    def print(self) -> None:
        """Print one line on standard error, if any token was generated."""
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


def say_if_cut(reason: str | None, n_made: int) -> None:
    """Print on standard error that a text was cut at -n or at the end of the context."""
    if reason == "length" and n_made:
        print(f"[cut at {n_made:,} tokens: -n]", file=sys.stderr)
    elif reason == "context":
        print("[context full]", file=sys.stderr)


def as_json(done: Completion, timings: dict[str, float] | None = None) -> str:
    """Return a completion as one line of JSON; infinite and NaN log-probabilities are null."""

    def entry(token: int, piece: str, logprob: float) -> dict[str, object]:
        return {"token": token, "piece": piece, "logprob": in_json(logprob)}

    fields: dict[str, object] = {
        "text": done.text,
        "tokens": done.tokens,
        "finish_reason": done.finish_reason,
        "logprobs": [
            {**entry(x.token, x.piece, x.logprob), "top": [entry(*other) for other in x.top]} for x in done.logprobs or []
        ],
        "prompt_tokens": done.prompt_tokens,
    }
    return json.dumps(fields | ({"timings": timings} if timings else {}), allow_nan=False)


def rate(n: int, seconds: float) -> str:
    """Return tokens per second as text."""
    return f"{n / max(seconds, 1e-9):,.1f} tokens/s"


def peak_memory() -> int | None:
    """Return this process's peak resident size in bytes; memory-mapped weights count once they have been read."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
