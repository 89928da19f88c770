"""A folder, or a file, that is written whole or not at all, however the process ends. Standard library only.

    with new_folder("model", force=False, foreign=reason_to_refuse) as folder: ...write files into folder...

The files are written into `.model.partial-1a2b3c4d` beside `model`, which is renamed when the block ends; an exception removes
it. A killed process leaves it behind, unlocked, and the next run to the same target removes it. With force the old folder is
moved aside, to `.model.old-1a2b3c4d`, and removed once the new one is in place: at every moment one of the two is complete.
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
except ImportError:  # Windows: age tells a dead run from a live one
    fcntl = None

LOCK = ".lock"  # inside the partial folder, held while its writer lives
DEAD_AFTER_SECONDS = 600.0  # where files can't be locked, a partial folder that has not changed for so long is a dead run's


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


def _try_lock(descriptor: int) -> bool | None:
    """True: locked by us now. False: another run holds it. None: locks don't work here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _claim(target: Path) -> tuple[Path, int | None]:
    """Make a partial folder that other runs see as alive."""
    while True:
        partial = _sibling(target, "partial")
        partial.mkdir()
        try:
            descriptor = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # another run took the still empty folder for a leftover
            continue
        locked = _try_lock(descriptor)
        if locked:
            return partial, descriptor
        os.close(descriptor)
        if locked is None:
            return partial, None
        # Another run locked it first, in order to remove it.


def _is_dead(partial: Path) -> bool:
    try:
        descriptor = os.open(partial / LOCK, os.O_RDWR)
    except FileNotFoundError:  # the lock is the first file made and the last one removed: only an empty folder lacks it
        return True
    try:
        locked = _try_lock(descriptor)
    finally:
        os.close(descriptor)
    if locked is None:
        try:
            newest = max(map(_changed, (partial, *partial.iterdir())))
        except FileNotFoundError:  # all of it has gone meanwhile
            return True
        return time.time() - newest > DEAD_AFTER_SECONDS
    return locked


def _changed(path: Path) -> float:
    """When it was, or long ago for what has gone meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _remove(folder: Path) -> None:
    """Remove as much as can be, the lock last, so that a half-removed folder is still known as dead."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name != LOCK:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _clean_up_after_killed_runs(target: Path, own: Path) -> None:
    for partial in _siblings(target, "partial"):
        if partial != own:
            if not _is_dead(partial):
                raise FolderError(f"{target}: another run is writing it, into {partial.name}")
            _remove(partial)
    for old in _siblings(target, "old"):
        if target.exists():
            _remove(old)
        else:  # killed between the two renames
            old.rename(target)


def survivor(target: Path) -> Path:
    """The folder that holds what `target` did, should a run have been killed just between its two renames; else `target`."""
    target = Path(target)
    if not target.exists() and target.name and target.parent.is_dir() and (old := _siblings(target, "old")):
        return old[0]
    return target


def check_target(target: Path, force: bool, foreign: Callable[[Path], str | None]) -> None:
    """Raise FolderError if the target exists and is not to be replaced; `foreign` is as new_folder has it."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FolderError(f"{target} is a file, expected a folder to make")
    if not force:
        raise FolderError(f"{target} exists: choose another name, or replace it with --force")
    if any(target.iterdir()) and (reason := foreign(target)):
        raise FolderError(f"{target} is not replaced: {reason}")


def not_ours(folder: Path, written: Collection[str]) -> str | None:
    """The reason not to replace a folder of ours: it holds something that is none of the files `written`. Else None.

    written  the files' paths in the folder, with `/`; folders on the way to them are ours too, and a lock that was left
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
            elif name not in written and not (name == LOCK and entry.stat(follow_symlinks=False).st_size == 0):
                return f"it holds {name}, which npllama did not write"
            elif not entry.is_file(follow_symlinks=False):
                return f"it holds {name}, which is not a plain file, as npllama writes them"
    return None


@contextlib.contextmanager
def writing(path: Path, shown: Path | str) -> Iterator[BinaryIO]:
    """Open a new file in a folder that is being made. An OSError that names no file then names `shown`, what it will be."""
    try:
        with open(path, "xb") as file:
            yield file
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(shown)) from None


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    else:
        old = _sibling(target, "old")
        try:
            target.rename(old)
            partial.rename(target)
            _sync(target.parent)
        finally:  # an interrupt may come between any two of these lines
            if target.exists():
                _remove(old)
            else:
                old.rename(target)
    _sync(target.parent)
    (target / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, through the cleaning up, unless the program handles them."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python lets only the main thread set handlers
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def new_folder(path: str | Path, force: bool, foreign: Callable[[Path], str | None]) -> Iterator[Path]:
    """Give a folder to write plain files into, which becomes `path` when the block ends, and vanishes on an exception.

    Missing parent folders are made. An existing `path` is replaced only with force, and only if it is empty or `foreign(path)`
    finds no reason not to. Raises FolderError, a ValueError.
    """
    target = Path(path).resolve()
    with scratch_folder(target) as partial:
        check_target(target, force, foreign)
        yield partial
        try:
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
        except OSError as error:
            raise FolderError(f"{target}: {error.strerror or error}") from None
        check_target(target, force, foreign)  # someone may have made it meanwhile
        _put_in_place(partial, target)


@contextlib.contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder beside `path` to work in, which vanishes when the block ends, unless it was renamed.

    What a killed run left that had the same `path` is removed. Raises FolderError where another run is at work on it.
    """
    target = Path(path).resolve()
    with _signals_unwind(), contextlib.ExitStack() as cleanup:
        try:
            for parent in reversed([parent for parent in target.parents if not parent.exists()]):
                parent.mkdir(exist_ok=True)
                cleanup.callback(_remove_if_empty, parent)
            partial, descriptor = _claim(target)
        except OSError as error:
            raise FolderError(f"{target} can't be made: {error.strerror or error}") from None
        if descriptor is not None:
            cleanup.callback(os.close, descriptor)
        cleanup.callback(_remove, partial)
        _clean_up_after_killed_runs(target, own=partial)
        yield partial
        # Where it was renamed, the cleanup finds only the lock to let go: the partial folder is gone, and no parent is empty.


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write into, which becomes `path` when the block ends, and vanishes on an exception.

    A symbolic link stays, and what it points to is replaced; a device or a pipe is written to as it is. What a killed run left
    beside is removed. Raises ValueError where it can't be written.
    """
    if os.path.isdir(path or "."):
        raise FileError(f"{path} is a folder, expected a file to write")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # not resolved: /dev/stdout may lead to a pipe without a name
            with open(path, "wb") as file:
                yield file
            return
        target = Path(path).resolve()
        partial = _sibling(target, "partial")
        with _signals_unwind(), contextlib.ExitStack() as cleanup:
            cleanup.callback(partial.unlink, missing_ok=True)
            file = cleanup.enter_context(open(partial, "xb"))
            _try_lock(file.fileno())
            for left in _siblings(target, "partial", files=True):
                if left != partial and _is_dead_file(left):
                    left.unlink(missing_ok=True)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(partial, target)
    except BrokenPipeError:  # its reader has gone: no error of the file's
        raise
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def _is_dead_file(partial: Path) -> bool:
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        locked = _try_lock(file.fileno())
        return time.time() - partial.stat().st_mtime > DEAD_AFTER_SECONDS if locked is None else locked
    return False


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, as new_file() does. Raises ValueError where it can't be written."""
    with new_file(path) as file:
        file.write(data)
