"""Standard input and output: text as it is made, tokens per second, errors in a line; and output that nobody takes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from ..generation import Step
from ..text.completion import Completion

FORESEEN = (ValueError, OSError, ImportError, MemoryError)  # ours, the system's, a package that is missing


def open_streams() -> None:
    """Open the standard streams so that nothing written to them is lost unnoticed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `npllama chat <&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # Python runs unbuffered, and then a write that a full disk cuts short passes for a whole one.
        sys.stdout = open(sys.stdout.fileno(), "w", 1, sys.stdout.encoding, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character shows another


def flush_output() -> None:
    """Write what the streams still hold, before Python does it on its way out with a status of its own.

    That the reader of standard output has gone is no error. Raises OSError, which names the stream, where it can't be written.
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
    """Let a stream that can't be written go nowhere, with what it holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    stream.flush()


def tell(line: str) -> None:
    """Print a line of a verdict at once. The verdict is found even if the reader has gone: it is the exit status too."""
    try:
        write(line + "\n")
    except BrokenPipeError:
        _discard(sys.stdout)


def say_error(line: str) -> None:
    """Print a line on standard error, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # full, or its reader has gone
        _discard(sys.stderr)


def error_text(error: BaseException) -> str:
    """Return an error as one line, which asks to report an unforeseen one. NPLLAMA_DEBUG=1 prints the traceback before it."""
    if os.environ.get("NPLLAMA_DEBUG", "0") not in ("", "0"):
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # without Python's "[Errno 2]"
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "npllama_convert":
        return "needs the package npllama_convert, which installing npllama brings: pip install . in its checkout"
    if isinstance(error, FORESEEN):
        return text or type(error).__name__
    kind = type(error).__name__
    return f"unforeseen {kind}{text and ': '}{text}; please report it, with what NPLLAMA_DEBUG=1 shows"


def write(text: str) -> None:
    """Show text at once. Raises OSError, which names the stream, where it can't be written."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def in_colour() -> bool:
    """Tell whether standard output is a terminal whose user hasn't set NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def read_text(path: Path | str) -> str:
    """Return the text of a file, or of standard input for `-`. Raises ValueError unless it is UTF-8."""
    data = Path(path).read_bytes() if path != "-" else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise ValueError(f"{name}: found the byte 0x{data[error.start]:02x} at {error.start:,}, expected UTF-8") from None


class _Collected(logging.Handler):
    """Keeps the messages of warnings, and those that only inform."""

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
        """Pass the steps on, and note when each came, from the first that is asked for."""
        self.started = time.perf_counter()
        for step in steps:
            self.last = time.perf_counter()
            if self.n_made == 0:
                self.first = self.last
            self.n_made += 1
            yield step

    def timings(self) -> dict[str, float]:
        """Return what print() says, in seconds; the first token comes from the prefill."""
        return {
            "prefill_tokens": self.n_prompt,
            "prefill_seconds": round(self.first - self.started, 6),
            "decode_tokens": max(0, self.n_made - 1),
            "decode_seconds": round(self.last - self.first, 6),
        }

    def print(self) -> None:
        """Print one line on standard error, if anything was made."""
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
    """Say on standard error that a text didn't end by itself."""
    if reason == "length" and n_made:
        print(f"[cut at {n_made:,} tokens: -n]", file=sys.stderr)
    elif reason == "context":
        print("[context full]", file=sys.stderr)


def as_json(done: Completion, timings: dict[str, float] | None = None) -> str:
    """Return a completion as one line of JSON; what is no number is null."""

    def entry(token: int, piece: str, logprob: float) -> dict[str, object]:
        return {"token": token, "piece": piece, "logprob": logprob if math.isfinite(logprob) else None}

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
    """Return tokens per second, for people to read."""
    return f"{n / max(seconds, 1e-9):,.1f} tokens/s"


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, in bytes; mapped weights count once they are read."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
