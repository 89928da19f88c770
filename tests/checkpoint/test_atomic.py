"""A file, or a folder, that is written whole or not at all.

How folders are replaced, and what killed runs leave, is in test_checkpoint.py, with the model directory that they are for.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from npllama.checkpoint import atomic, open_model, verify

from killed import at_each_change, write_model
from system import hear_signals

posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and signals are POSIX's")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")
    with atomic.new_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert left_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_vanishes(tmp_path, error):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")

    def half() -> None:
        with atomic.new_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(atomic.FileError if isinstance(error, OSError) else type(error)) as raised:
        half()
    if isinstance(error, OSError):
        assert str(raised.value) == f"{path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["x.npy"]


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, "", tmp_path / "missing" / "x"):
        with pytest.raises(atomic.FileError, match=r"is a folder, expected a file to write|missing/x: No such file"):
            atomic.write_file(path, b"x")
    assert left_in(tmp_path) == []


@posix
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("elsewhere")
    for name, real in (("link", "real"), ("dangling", "elsewhere")):
        atomic.write_file(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / real).read_bytes() == b"new"


@posix
def test_links_in_a_circle_are_an_error_of_ours(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for target in (tmp_path / "circle", tmp_path / "circle" / "model"):
        with pytest.raises(atomic.FolderError), atomic.new_folder(target, True, lambda path: None):
            pass
    with pytest.raises(atomic.FileError, match="symbolic links"), atomic.new_file(tmp_path / "circle" / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["circle"]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    """Keep devices and pipes: `--out /dev/null` must not replace them by a file."""
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    atomic.write_file(tmp_path / "pipe", b"new")
    reader.join(60)
    assert read == [b"new"]
    assert (tmp_path / "pipe").is_fifo()
    assert left_in(tmp_path) == ["pipe"]


def test_a_file_that_another_run_finds_before_it_is_locked(tmp_path, monkeypatch):
    """Survive another run that takes the file for a dead run's and removes it."""
    try_lock, calls = atomic.try_lock, []

    def meanwhile(descriptor: int) -> bool | None:
        calls.append(descriptor)
        if len(calls) == 1:
            atomic.write_file(tmp_path / "x", b"theirs")
        return try_lock(descriptor)

    monkeypatch.setattr(atomic, "try_lock", meanwhile)
    atomic.write_file(tmp_path / "x", b"ours")
    assert (tmp_path / "x").read_bytes() == b"ours"
    assert left_in(tmp_path) == ["x"]


WRITER = """
import sys, time
from npllama.checkpoint.atomic import new_file
with new_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("now", flush=True)
    time.sleep(60)
"""


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_killed_at_work(tmp_path, name):
    path = tmp_path / "x.npy"
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, preexec_fn=hear_signals, **pipes) as process:
        assert process.stdout.readline() == "now\n"
        atomic.write_file(path, b"ours")  # another run's file, at work, is left alone
        assert len(left_in(tmp_path)) == 2
        process.send_signal(getattr(signal, name))
        assert process.wait(60) != 0
    assert len(left_in(tmp_path)) == (2 if name == "SIGKILL" else 1)
    atomic.write_file(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert left_in(tmp_path) == ["x.npy"]


@posix
def test_a_file_is_on_the_disk_before_it_is_put_in_place(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("in place") or replace(*paths))
    atomic.write_file(tmp_path / "x", b"new")
    assert done == [3, "in place"]


# ------------------------------------------------------------------------------------------------------------------- folders


def new(path: Path):
    return atomic.new_folder(path, force=False, foreign=lambda folder: None)


@posix
def test_a_folder_is_on_the_disk_before_it_is_put_in_place(tmp_path, monkeypatch):
    """Sync each file, then the folder that names them, then the one that names it. The inode tells descriptors apart."""
    done, put_in_place = [], atomic.put_in_place
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(atomic, "put_in_place", lambda *paths: done.append("in place") or put_in_place(*paths))
    with new(tmp_path / "m") as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(b"new")
        files = {path.stat().st_ino for path in folder.iterdir()}
    assert set(done[: len(files)]) == files
    assert done[len(files) :] == [(tmp_path / "m").stat().st_ino, "in place", tmp_path.stat().st_ino]


def kind(path: Path) -> str:
    """Name the part that a path has in a folder's replacement: "m", or "partial" or "old" of `.m.old-1a2b3c4d`."""
    return path.name.removeprefix(".m.").partition("-")[0]


@posix
def test_the_old_folder_is_removed_when_the_new_one_is_on_the_disk_in_its_place(tmp_path, monkeypatch):
    """Keep the old folder until then: removed sooner, a power cut could leave neither."""
    (tmp_path / "m").mkdir()
    done, rename, remove = [], Path.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append((kind(path), kind(to))) or rename(path, to))
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, **options: done.append(kind(Path(folder))) or remove(folder, **options)
    )
    with atomic.new_folder(tmp_path / "m", force=True, foreign=lambda folder: None) as folder:
        (folder / "a").write_bytes(b"new")
        file, new, parent = (path.stat().st_ino for path in (folder / "a", folder, tmp_path))
    assert done == [file, new, ("m", "old"), ("partial", "m"), parent, ("old", "partial"), "partial"]


def test_what_was_made_meanwhile_is_kept(tmp_path):
    def meanwhile() -> None:
        with new(tmp_path / "m"):
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "theirs").touch()

    with pytest.raises(atomic.FolderError, match="exists"):
        meanwhile()
    assert left_in(tmp_path) == ["m"]
    assert left_in(tmp_path / "m") == ["theirs"]


def test_what_goes_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch):
    """Ignore files that vanish: without locks the age of files decides, and their writer may remove them meanwhile."""
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / "sub" / "x").touch()
    walk = os.walk

    def removed(path: Path):
        found = list(walk(path))
        shutil.rmtree(path)
        return found

    for path in (tmp_path / "m" / "sub" / "x", tmp_path / "m" / "sub", tmp_path / "m"):
        os.utime(path, (0, 0))
    assert atomic.is_idle(tmp_path / "m")
    os.utime(tmp_path / "m" / "sub" / "x")  # in a folder of the folder, as pip downloads to
    assert not atomic.is_idle(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", removed)
        assert atomic.is_idle(tmp_path / "m")  # all of it has gone


def test_a_scratch_folder_vanishes_and_what_has_its_name_stays(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "theirs").touch()
    with atomic.scratch_folder(tmp_path / "m") as folder:
        (folder / "x").touch()
        with pytest.raises(atomic.FolderError, match="another run is writing it"), atomic.scratch_folder(tmp_path / "m"):
            pass
    assert left_in(tmp_path) == ["m"]
    assert left_in(tmp_path / "m") == ["theirs"]


def test_a_file_of_a_folder_is_named_as_it_will_be(tmp_path):
    with pytest.raises(OSError, match="No space") as raised, atomic.writing(tmp_path / "x", "m/x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == "m/x"
    with pytest.raises(FileNotFoundError) as raised, atomic.writing(tmp_path / "y", "m/y"):
        open(tmp_path / "source")  # noqa: SIM115
    assert raised.value.filename == str(tmp_path / "source")


def ours(path: Path) -> None:
    (path / "sub").mkdir(parents=True)
    for name in ("x", "sub/y", ".shown"):
        (path / name).touch()


def not_ours(path: Path) -> str | None:
    return atomic.not_ours(path, {"x", "sub/y", ".shown", "missing"})


FOREIGN = {
    "a file": lambda path: (path / "z").touch(),
    "a hidden file": lambda path: (path / ".z").touch(),
    "a folder": lambda path: (path / "z").mkdir(),
    "a hidden folder": lambda path: (path / ".z").mkdir(),
    "a file in a folder of ours": lambda path: (path / "sub" / ".z").touch(),
    "a link": lambda path: (path / "z").symlink_to("x"),
    "a link to a folder": lambda path: (path / "z").symlink_to("sub"),
    "a link that leads nowhere": lambda path: (path / "z").symlink_to("nowhere"),
    "a pipe": lambda path: os.mkfifo(path / "z"),
    "a link in place of a file": lambda path: (path / "x").rename(path.parent / "x") and (path / "x").symlink_to("../x"),
    "a folder in place of a file": lambda path: (path / "x").unlink() or (path / "x").mkdir(),
    "a link in place of a folder": lambda path: (path / "sub").rename(path.parent / "s") and (path / "sub").symlink_to("../s"),
}


@posix
@pytest.mark.parametrize("foreign", FOREIGN)
def test_whatever_was_not_written_is_a_reason(tmp_path, foreign):
    ours(tmp_path / "m")
    assert not_ours(tmp_path / "m") is None
    FOREIGN[foreign](tmp_path / "m")
    assert not_ours(tmp_path / "m").startswith("it holds ")


# ------------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def handler():
    """Set SIGTERM's handler, and restore the earlier one."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda handler: signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGTERM, before)


def test_a_program_s_own_handler_stays(tmp_path, handler):
    def own(number, frame) -> None: ...

    handler(own)
    with new(tmp_path / "m"):
        assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGTERM) is own


def test_the_default_is_put_back(tmp_path, handler):
    handler(signal.SIG_DFL)
    with new(tmp_path / "m"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_thread_sets_no_handler(tmp_path, handler):
    """Set signal handlers in the main thread only: Python refuses it elsewhere."""
    handler(signal.SIG_DFL)
    failed = []

    def work() -> None:
        try:
            with new(tmp_path / "m"):
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not failed
    assert (tmp_path / "m").is_dir()


# ---------------------------------------------------------------------------------------------- ended at each of its changes

KEPT = [".m.old-notours", ".m.partial-0123abcd.txt", ".m2.partial-0123abcd", "m2"]  # next to `m`, and left by no run for `m`


def stored_in(path: Path) -> str | None:
    """Return the dtype of the model at `path`, each file of it verified; None where there is no model."""
    if not atomic.survivor(path).exists():
        return None
    assert verify(path) == []
    return open_model(path).manifest["dtype"]


def folder_with(path: Path, model: str | None) -> Path:
    """Make a folder with files that no run may touch and a model stored in a dtype."""
    for name in KEPT:
        (path / name).mkdir(parents=True)
    if model:
        write_model(path / "m", model)
    return path


def check_the_next_run(folder: Path, expected: set[str | None]) -> str | None:
    """Check that one of the expected models is there, before and after the next run repairs the folder; return the model."""
    found = stored_in(folder / "m")
    assert found in expected, folder
    if found:
        with pytest.raises(atomic.FolderError, match="exists"):  # without force
            write_model(folder / "m", "bfloat16")
        assert stored_in(folder / "m") == found
    else:
        write_model(folder / "m", "bfloat16")
        assert stored_in(folder / "m") == "bfloat16"
    assert left_in(folder) == sorted([*KEPT, "m"])
    return found


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("old", [None, "float16"])
def test_a_model_is_whole_whenever_its_writer_ends(tmp_path, monkeypatch, name, old):
    before = folder_with(tmp_path / "before", old)
    folders = at_each_change("model", tmp_path, getattr(signal, name), before)
    monkeypatch.setattr(atomic, "sync", lambda path: None)  # the disk need not keep what only checks
    between = [folder for folder in folders if old and not (folder / "m").exists()]
    assert bool(between) == (old is not None and name == "SIGKILL")  # the only state in which nothing has the model's name
    for folder in between[:1]:  # where the next run ends early too
        left = at_each_change("model", tmp_path / "again", getattr(signal, name), shutil.copytree(folder, tmp_path / "between"))
        assert len(left) > len(folders)
        for again in left:
            check_the_next_run(again, {old, "float32"})
    for folder in (
        folders if name == "SIGKILL" else []
    ):  # what was replaced does not come back in part when the user removes `m`
        if stored_in(folder / "m") == "float32":
            gone = shutil.copytree(folder, tmp_path / "gone" / folder.name)
            shutil.rmtree(gone / "m")
            check_the_next_run(gone, {old, None})
    if name == "SIGTERM":  # whoever has time to clean up leaves nothing, but for a model that has been replaced already
        assert [folder for folder in folders if left_in(folder) != left_in(before) and stored_in(folder / "m") == old] == []
    found = [check_the_next_run(folder, {old, "float32"}) for folder in folders]
    assert found == sorted(found, key=[old, "float32"].index)  # the old one up to some change, the new one from it on
    assert set(found) == {old, "float32"}


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_file_is_whole_whenever_its_writer_ends(tmp_path, name):
    before = folder_with(tmp_path / "before", None)
    (before / "m").write_bytes(b"old")
    found = []
    for folder in at_each_change("file", tmp_path, getattr(signal, name), before):
        found.append((folder / "m").read_bytes())
        assert name == "SIGKILL" or left_in(folder) == left_in(before)
        atomic.write_file(folder / "m", b"next")
        assert (folder / "m").read_bytes() == b"next"
        assert left_in(folder) == sorted([*KEPT, "m"])
    assert found == sorted(found, key=[b"old", b"new"].index)
    assert len(found) >= 5
