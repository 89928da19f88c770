"""Find how much memory this process may use: what the machine has free, the limits of its control groups (cgroups), its
address space.

Containers and batch systems set limits by control groups. Beyond such a limit a process is killed, or slowed down
(memory.high), whatever the machine has free. The kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst
describe the files read here. An address space is limited by the size of pointers (32 bits), or by RLIMIT_AS (`ulimit -v`); it
includes mapped files.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
NO_LIMIT = 1 << 63
KERNEL_S_SHARE = 1 << 30  # of the 4 GB that 32 bits can address, as Linux divides them


def available_memory() -> int:
    """Return how many bytes this process can allocate without swapping or dropping anything from memory."""
    return max(0, min(free_memory(), _address_space_left()))


def free_memory() -> int:
    """Return how many bytes fit in memory without swapping, whatever the address space, which counts a mapping already."""
    return max(0, min([_of_the_machine(), *_of_its_cgroups()]))


def address_space() -> int:
    """Return how many bytes this process can address, mapped files included; NO_LIMIT with 64 bits and no limit set."""
    limit = NO_LIMIT if sys.maxsize > 1 << 32 else 1 << 32
    with contextlib.suppress(ImportError, OSError):  # Windows has no such module
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
    return limit


def _address_space_left() -> int:
    used = 0
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        used = int((PROC / "self" / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    usable = NO_LIMIT if sys.maxsize > 1 << 32 else (1 << 32) - KERNEL_S_SHARE
    return min(address_space(), usable) - used


def _of_the_machine() -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return _table(PROC / "meminfo")["MemAvailable:"] * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30  # Windows; a guess on the small side


def _of_its_cgroups() -> Iterator[int]:
    """Yield the bytes that each limit of this process's groups and their parents leaves free; cached files count as free."""
    for folder, limits, used, stat in _folders():
        files = 0
        with contextlib.suppress(OSError, ValueError):  # a limit holds without memory.stat too
            cached = _table(folder / "memory.stat")
            files = sum(cached.get(f"{stat}{kind}_file", 0) for kind in ("active", "inactive"))
        for limit in limits:
            with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max", none
                yield int((folder / limit).read_text()) - int((folder / used).read_text()) + files


def _folders() -> Iterator[tuple[Path, tuple[str, ...], str, str]]:
    """Yield each group's folder, the names of its files of limits and of use, and the prefix of the names in memory.stat."""
    try:
        lines = os.fsdecode((PROC / "self" / "cgroup").read_bytes()).split("\n")
    except OSError:
        return
    names: tuple[tuple[str, ...], str, str]
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, names = CGROUPS, (("memory.high", "memory.max"), "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be the host's, of which only the root, the container's own group, is visible.
        folder = root / path.lstrip("/")
        yield from ((group, *names) for group in (folder, *folder.parents) if group.is_relative_to(root))


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def size_text(n_bytes: int) -> str:
    """Return a size for people to read: 16.1 GB, 0.5 MB, 2.3 kB."""
    unit, size = ("GB", 1e9) if n_bytes >= 1e8 else ("MB", 1e6) if n_bytes >= 1e5 else ("kB", 1e3)
    return f"{n_bytes / size:.1f} {unit}"
