"""Write a folder, or a file, whole or not at all, however the process ends. Standard library only.

    with new_folder("model", force=False, foreign=reason_to_refuse) as folder: ...write files into folder...

The protocol. A run holds the lock of its target, the file `.model.npllama-lock`, so that there is one run at a time. It writes
into `.model.partial-1a2b3c4d`, waits until the disk has it, and renames it to `model`; a `model` that is there is renamed to
`.model.old-5e6f7a8b` first, and to a partial name at the end, to be removed. An exception removes the partial folder, and so do
SIGTERM and SIGHUP. A killed process leaves it, but the system releases the lock: the next run that holds the lock removes what
is partial, and renames the old folder back if `model` is missing. So `model` or the old folder is complete at every moment: a
reader opens the one that exists (survivor), and only partial folders have their files removed.

A file is written to `.file.partial-1a2b3c4d`, which is locked itself, and then renamed; of several runs the last one wins.
Where files can't be locked (Windows, some network disks), a partial folder that changed recently counts as another run's.

Paths are resolved by os.path.realpath: for links in a circle, Path.resolve() raises RuntimeError before Python 3.13.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import BinaryIO

from ..errors import NpllamaError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows: the age distinguishes a dead run from a live one

DEAD_AFTER_SECONDS = 600.0  # where files can't be locked, a partial folder unchanged for so long is a dead run's


class FolderError(NpllamaError):
    """The folder can't be written: it exists, is foreign, or another run is writing it."""


class FileError(NpllamaError):
    """The file can't be written."""


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _siblings(target: Path, kind: str, files: bool = False) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]{{8}}")
    with os.scandir(target.parent) as entries:
        found = [entry for entry in entries if pattern.fullmatch(entry.name)]
    return [Path(e.path) for e in found if (e.is_file if files else e.is_dir)(follow_symlinks=False)]


def try_lock(descriptor: int) -> bool | None:
    """Lock a file. Return True if we hold it now, False if another run does, None where locks don't work."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _claim(target: Path, cleanup: contextlib.ExitStack) -> bool:
    """Hold the target's lock until the cleanup. Return False where files can't be locked."""
    if fcntl is None:
        return False
    lock = target.parent / f".{target.name}.npllama-lock"
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
        locked = try_lock(descriptor)
        if locked and _is_at(lock, descriptor):
            cleanup.callback(os.close, descriptor)
            cleanup.callback(lock.unlink, missing_ok=True)
            return True
        os.close(descriptor)
        if locked is None:
            lock.unlink(missing_ok=True)
            return False
        if not locked:
            raise FolderError(f"{target}: another run is writing it")
        # The run that held it has ended meanwhile, and has removed it.


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_idle(partial: Path) -> bool:
    """Return whether a file, or a folder and its files, has not changed for so long that its writer must be dead."""
    newest = 0.0
    for path in (partial, *(Path(folder, file) for folder, _, files in os.walk(partial) for file in files)):
        with contextlib.suppress(FileNotFoundError):  # its writer has removed it meanwhile
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest > DEAD_AFTER_SECONDS


def _clean_up_after_killed_runs(target: Path, own: Path, locked: bool) -> None:
    for partial in _siblings(target, "partial"):
        if partial != own and not locked and not is_idle(partial):
            raise FolderError(f"{target}: another run is writing it, into {partial.name}")
    for old in _siblings(target, "old"):
        old.rename(_sibling(target, "partial") if target.exists() else target)
    for partial in _siblings(target, "partial"):
        if partial != own:
            shutil.rmtree(partial, ignore_errors=True)


def survivor(target: Path) -> Path:
    """Return the folder that holds what `target` did, if a run was killed between its two renames; else `target`."""
    target = Path(target)
    if not target.exists() and target.name and target.parent.is_dir() and (old := _siblings(target, "old")):
        return old[0]
    return target


def check_target(target: Path, force: bool, foreign: Callable[[Path], str | None]) -> None:
    """Raise FolderError if the target exists and must not be replaced; `foreign` as in new_folder()."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FolderError(f"{target} is a file, expected a folder to make")
    if not force:
        raise FolderError(f"{target} exists: choose another name, or replace it with --force")
    if any(target.iterdir()) and (reason := foreign(target)):
        raise FolderError(f"{target} is not replaced: {reason}")


def not_ours(folder: Path, written: Collection[str]) -> str | None:
    """Return the reason not to replace a folder of ours: it holds something other than the files `written`. Else None.

    written  the files' paths in the folder, with `/`; folders on the way to them are ours too
    """
    ours = {parent.as_posix() for file in written for parent in PurePosixPath(file).parents}
    folders = [""]
    for inside in folders:
        with os.scandir(folder / inside) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if name not in ours:
                    return f"it holds {name}, a folder that npllama did not write"
                folders.append(name + "/")
            elif name not in written:
                return f"it holds {name}, which npllama did not write"
            elif not entry.is_file(follow_symlinks=False):
                return f"it holds {name}, which is not a plain file, as npllama writes them"
    return None


@contextlib.contextmanager
def writing(path: Path, shown: Path | str) -> Iterator[BinaryIO]:
    """Open a new file in a folder that is being written. An OSError without a file name gets `shown`, its final name."""
    try:
        with open(path, "xb") as file:
            yield file
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(shown)) from None


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename the complete new folder to its target, the old one out of the way first and back if that fails."""
    old = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
    finally:  # an interrupt may come between any two of these lines
        if old.exists():
            old.rename(partial if target.exists() else target)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, after cleaning up, unless the program handles them."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    numbers = [number for number in numbers if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def new_folder(path: str | Path, force: bool, foreign: Callable[[Path], str | None]) -> Iterator[Path]:
    """Provide a folder to write plain files into. It becomes `path` when the block ends, and is removed on an exception.

    Missing parent folders are made. An existing `path` is replaced only with force, and only if it is empty or `foreign(path)`
    gives no reason against it. Raises FolderError, a ValueError.
    """
    target = Path(os.path.realpath(path))
    with scratch_folder(target) as partial:
        check_target(target, force, foreign)
        yield partial
        try:
            for written in (*sorted(partial.rglob("*"), reverse=True), partial):  # each folder after what it names
                sync(written)
        except OSError as error:
            raise FolderError(f"{target}: {error.strerror or error}") from None
        check_target(target, force, foreign)  # someone may have made it meanwhile
        put_in_place(partial, target)


@contextlib.contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """Provide a folder next to `path` to work in. It is removed when the block ends, unless it was renamed.

    Remains of a killed run with the same `path` are removed. Raises FolderError if another run is writing `path`.
    """
    target = Path(os.path.realpath(path))
    partial = _sibling(target, "partial")
    with _signals_unwind(), contextlib.ExitStack() as cleanup:
        try:
            for parent in reversed([parent for parent in target.parents if not parent.exists()]):
                cleanup.callback(_remove_if_empty, parent)
                parent.mkdir(exist_ok=True)
            locked = _claim(target, cleanup)
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise FolderError(f"{target} can't be made: {error.strerror or error}") from None
        _clean_up_after_killed_runs(target, partial, locked)
        yield partial


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Provide a file to write into. It becomes `path` when the block ends, and is removed on an exception.

    A symbolic link stays, and its target is replaced; a device or a pipe is written to directly. Remains of killed runs with
    the same `path` are removed. Raises FileError, a ValueError, where it can't be written.
    """
    if os.path.isdir(path or "."):
        raise FileError(f"{path} is a folder, expected a file to write")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # not resolved: /dev/stdout may lead to a pipe without a name
            with open(path, "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        with _signals_unwind(), contextlib.ExitStack() as cleanup:
            while True:
                partial = _sibling(target, "partial")
                cleanup.callback(partial.unlink, missing_ok=True)
                file = cleanup.enter_context(open(partial, "xb"))
                if try_lock(file.fileno()) is not False and partial.exists():
                    break  # else another run found it unlocked, and has removed it as a dead run's
            for left in _siblings(target, "partial", files=True):
                if left != partial and _is_dead_file(left):
                    left.unlink(missing_ok=True)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(partial, target)
    except BrokenPipeError:  # its reader has exited, which is no error of the file
        raise
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def _is_dead_file(partial: Path) -> bool:
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        locked = try_lock(file.fileno())
        return is_idle(partial) if locked is None else locked
    return False


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, as new_file() does. Raises ValueError where it can't be written."""
    with new_file(path) as file:
        file.write(data)
