"""Render chat templates in the process that child.py runs in, and read the templates of a model directory.

A template may loop for ever or fill the memory. Its process is killed after SECONDS, or when it uses more than MEMORY bytes:
Linux enforces that limit, elsewhere memory is measured 20 times a second. The first rendering starts the process, which takes a
few tenths of a second; each rendering after that takes about a millisecond.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import marshal
import os
import pkgutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from ..checkpoint.foreign import JSON_LIMIT, read_bytes
from ..checkpoint.format import read_json
from ..errors import NpllamaError

FILE = "chat_template.jinja"  # in a model directory; a template called NAME is in chat_template.NAME.jinja
SECONDS = 10  # for one rendering; a long conversation takes a hundredth of one
STARTING = 120  # for Python and jinja2 to start, on a machine that is busy
MEMORY = 512 << 20
MEASURES = sys.platform != "linux"  # whether the memory is measured from outside: Linux limits it from inside
LONGEST = 16 << 20  # bytes of a rendered conversation; a context of 131,072 tokens is about half a million
OLDEST = (3, 1, 6)  # of jinja2: earlier versions have known sandbox escapes
# Special tokens that templates get as variables, where the tokenizer has them (transformers 5.23, tokenization_utils_base.py).
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_S_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class TemplateError(NpllamaError):
    """A chat template can't be rendered, or refuses a conversation; the message is one line."""


def missing_package() -> str | None:
    """Return one line that says what is missing to render templates; None if nothing is."""
    if importlib.util.find_spec("jinja2") is None:
        return "a chat template needs the package jinja2: pip install 'npllama[convert]'"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("jinja2")
        if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
            return f"jinja2 is {version}, expected {'.'.join(map(str, OLDEST))} or later: pip install -U jinja2"
    if not sys.executable:
        return "a chat template needs a separate Python process, and sys.executable names no interpreter"
    return None


class Renderer:
    """A process that renders templates, started at first use. Threads may share it; after a fork the child starts its own."""

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY, measures: bool = MEASURES):
        self.seconds, self.memory, self.measures = seconds, memory, measures
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = os.getpid()

    def render(self, template: str, variables: Mapping[str, object], now: datetime | None = None) -> str:
        """Return the rendered text. Raises TemplateError for an error in the template, and at the limits.

        variables consist of dicts, lists, texts, numbers and None. now is the time for strftime_now.
        """
        request = marshal.dumps((template, dict(variables), (now or datetime.now()).isoformat(), self.seconds + 1))
        with self._lock:
            try:
                kind, data = self.exchange(self._started(), request, self.seconds)
            except BaseException:  # an interrupt: the late answer would be read as that of the next request
                self._end()
                raise
            if kind == "ended":
                self._end()
            if kind != "text":
                raise TemplateError(" ".join(data.decode("utf-8", "replace").split())[:300])
        return data.decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Kill the process, if there is one."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.owner != os.getpid():  # after a fork: the process belongs to the parent
            self.process, self.owner = None, os.getpid()
        if self.process is None or self.process.poll() is not None:
            if (missing := missing_package()) is not None:
                raise TemplateError(missing)
            self._end()
            source = pkgutil.get_data(__package__, "child.py") or b""
            code = f"import sys; sys.path[:] = {[str(path) for path in sys.path if path]!r}\n"
            code += f"exec(compile({source!r}, 'npllama/templates/child.py', 'exec'))\n"
            code += f"main({0 if self.measures else self.memory})"
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # it gets no signal from the terminal
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
            kind, data = self.exchange(self.process, b"", STARTING)
            if kind != "text":
                self._end()
                raise TemplateError(f"the process that runs chat templates can't be started: {data.decode()}")
        return self.process

    def exchange(self, process: subprocess.Popen[bytes], request: bytes, seconds: int) -> tuple[str, bytes]:
        """Send a request and return the kind and the data of the answer; `ended`: the process has ended, or must be killed."""
        assert process.stdin is not None
        assert process.stdout is not None
        answered, ended = threading.Event(), []

        def watch() -> None:
            end = time.monotonic() + seconds
            while not answered.wait(min(0.05, max(0.0, end - time.monotonic()))):
                used = _memory_of(process) if self.measures else None
                if used is not None and used > self.memory:
                    ended.append("it takes too much memory")
                elif time.monotonic() >= end:
                    ended.append(f"it takes longer than {seconds} seconds")
                if ended:
                    process.kill()
                    return

        watcher = threading.Thread(target=watch, daemon=True, name="npllama-template")
        watcher.start()
        kind, data = "", b""
        try:
            process.stdin.write(request)
            process.stdin.flush()
            kind, _, size = process.stdout.readline(64).decode("latin-1").partition(" ")
            if kind in ("text", "error", "ended") and size.strip().isdecimal():
                if (n := int(size)) > LONGEST:
                    return "ended", f"it writes {n:,} bytes, expected at most {LONGEST:,}".encode()
                data = process.stdout.read(n)
                if len(data) == n:
                    return kind, data
        except (OSError, ValueError):  # the process has ended
            pass
        finally:
            answered.set()
            watcher.join()
        return "ended", (ended[0] if ended else "its process has ended").encode()

    def _end(self) -> None:
        if (process := self.process) is not None:
            self.process = None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # unsent data
                    if pipe is not None:
                        pipe.close()


_SHARED = Renderer()
atexit.register(_SHARED.close)


def render(template: str, variables: Mapping[str, object], now: datetime | None = None) -> str:
    """Render a template in the process that this whole program shares."""
    return _SHARED.render(template, variables, now)


def _memory_of(process: subprocess.Popen[bytes]) -> int | None:
    """Return the resident size of a process in bytes, or None where it is unknown."""
    if sys.platform == "win32":
        return _memory_on_windows(int(process._handle))  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, ValueError, IndexError):
        if Path("/proc/self/statm").exists():
            return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        command = ["ps", "-o", "rss=", "-p", str(process.pid)]
        return int(subprocess.run(command, capture_output=True, timeout=5).stdout) * 1024
    return None


def _memory_on_windows(handle: int) -> int | None:
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = [  # PROCESS_MEMORY_COUNTERS of psapi.h
            ("cb", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            *[(f"size_{i}", ctypes.c_size_t) for i in range(8)],  # the second is WorkingSetSize
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    library = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    found = library.K32GetProcessMemoryInfo(ctypes.c_void_p(handle), ctypes.byref(counters), counters.cb)
    return counters.size_1 if found else None


# --------------------------------------------------------------------------------------------------------- the model directory


def file_of(name: str) -> str:
    """Return the file name of a template; `default` is the model's main one."""
    return FILE if name == "default" else FILE.replace(".", f".{name}.")


def read_templates(folder: Path, files: Mapping[str, object]) -> dict[str, str]:
    """Return a model directory's templates, name -> text, `default` first. Raises TemplateError for a file that isn't text.

    files are those of the manifest. Directories of older versions have their template in tokenizer_config.json instead.
    """
    start, _, end = FILE.partition(".")
    names = sorted(file for file in files if file.startswith(f"{start}.") and file.endswith(f".{end}"))
    found: dict[str, str] = {}
    for file in sorted(names, key=lambda file: file != FILE):
        name = "default" if file == FILE else file[len(start) + 1 : -len(end) - 1]
        try:
            found[name] = read_bytes(folder / file, JSON_LIMIT, TemplateError).decode()
        except UnicodeDecodeError:
            raise TemplateError(f"{folder / file} is not UTF-8, expected a chat template") from None
    if not found and "tokenizer_config.json" in files:
        found = named_templates(read_json(folder / "tokenizer_config.json").get("chat_template"))
    return found


def named_templates(value: object) -> dict[str, str]:
    """Return the templates in a tokenizer_config.json's chat_template, name -> text: one, named `default`, or a list."""
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def template_variables(folder: Path) -> dict[str, str]:
    """Return the special tokens that templates get as variables, name -> text, found as transformers finds them."""
    paths = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config, special = (read_json(path) if path.is_file() else {} for path in paths)
    values = config if "added_tokens_decoder" in config else {**config, **special}
    # A config without a class was written from a GGUF file's metadata, which are complete: nothing is to be added.
    if str(config.get("tokenizer_class") if config else "Llama").startswith(("Llama", "CodeLlama")):
        values = {**LLAMA_S_TOKENS, **values}
    tokens = {name: values.get(name) for name in NAMED_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
