"""Find the available memory, of the machine and within control groups, from files as the kernel writes them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from npllama import checkpoint
from npllama.checkpoint import reading
from npllama.engine import memory

import tiny

try:
    import resource
except ImportError:  # Windows
    resource = None

GB = 10**9
MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\nHugePages_Total:       0\n"
V1 = "9:cpuacct,cpu:/docker/7\n4:memory:/docker/7\n1:name=systemd:/\n0::/\n"
V2 = "0::/user.slice/job\n"


def limits(monkeypatch, soft: int | None = None, bits: int = 64) -> None:
    """Set RLIMIT_AS, and the size of a pointer."""
    monkeypatch.setattr(sys, "maxsize", (1 << bits - 1) - 1)
    if resource:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY if soft is None else soft, 0))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that writes files of /proc and /sys/fs/cgroup: machine(path=text, ...)."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    limits(monkeypatch)

    def write(files: dict[str, object]) -> None:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    write({"proc/meminfo": MEMINFO})
    return write


def group(folder: str, limit: object, used: int, active: int = 0, inactive: int = 0, version: int = 2) -> dict[str, object]:
    names, part = ("memory.max", "memory.current"), ""
    if version == 1:
        names, part = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
    stat = f"anon 12\n{part}inactive_file {inactive}\n{part}active_file {active}\nthp 0"
    return {f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": used, f"{folder}/memory.stat": stat}


def test_without_groups_it_is_what_the_machine_has(machine):
    assert memory.available_memory() == 20_480_000_000


def test_the_smallest_group_counts(machine):
    machine({"proc/self/cgroup": V2.strip(), **group("cgroup/user.slice/job", "max", GB)})
    assert memory.available_memory() == 20_480_000_000
    machine(group("cgroup/user.slice", 5 * GB, GB))
    assert memory.available_memory() == 4 * GB
    machine(group("cgroup/user.slice/job", 3 * GB, GB))
    assert memory.available_memory() == 2 * GB


def test_files_in_memory_are_free(machine):
    """Count cached files as free: the kernel drops them when memory is needed, and a model just read is cached."""
    machine({"proc/self/cgroup": V2.strip(), **group("cgroup/user.slice/job", 8 * GB, 6 * GB, active=2 * GB, inactive=3 * GB)})
    assert memory.available_memory() == 7 * GB


def test_version_1(machine):
    machine({"proc/self/cgroup": V1.strip(), **group("cgroup/memory/docker/7", 4 * GB, 3 * GB, GB, 0, version=1)})
    assert memory.available_memory() == 2 * GB


def test_version_1_s_other_controllers_are_no_groups_of_memory(machine):
    lines = "9:cpuacct,cpu:/other\n4:hugetlb,memory:/job\n1:name=memory:/other"
    machine({"proc/self/cgroup": lines, **group("cgroup/memory/job", 4 * GB, GB, version=1)})
    machine(group("cgroup/memory/other", 2 * GB, GB, version=1))
    assert memory.available_memory() == 3 * GB


@pytest.mark.parametrize("stat", [None, "anon 12\nactive_file many"])
def test_a_limit_holds_whatever_memory_stat_is(machine, tmp_path, stat):
    machine({"proc/self/cgroup": V2.strip(), **group("cgroup/user.slice/job", GB, GB // 4)})
    (tmp_path / "cgroup/user.slice/job/memory.stat").unlink()
    if stat:
        machine({"cgroup/user.slice/job/memory.stat": stat})
    assert memory.available_memory() == GB - GB // 4


@pytest.mark.parametrize(("high", "free"), [("max", 4 * GB), (3 * GB, 2 * GB), (8 * GB, 4 * GB)])
def test_the_limit_beyond_which_a_group_is_slowed_down_is_one(machine, high, free):
    machine({"proc/self/cgroup": V2.strip(), **group("cgroup/user.slice/job", 5 * GB, GB)})
    machine({"cgroup/user.slice/job/memory.high": high})
    assert memory.available_memory() == free


def test_odd_lines_are_passed_over(machine, tmp_path):
    (tmp_path / "proc/self").mkdir()
    lines = b"\nodd\n7:\n1:name=\xff:/\xff\n0::/user.slice/job\n\n"
    (tmp_path / "proc/self/cgroup").write_bytes(lines)
    machine(group("cgroup/user.slice/job", 5 * GB, GB))
    assert memory.available_memory() == 4 * GB


@pytest.mark.skipif(os.name == "nt", reason="a file's name is any bytes on POSIX")
def test_a_group_s_name_need_not_be_utf_8(machine, tmp_path):
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/job\xff\n")
    try:
        machine(group(os.fsdecode(b"cgroup/job\xff"), 5 * GB, GB))
    except OSError:  # macOS has no such names
        pytest.skip("this file system's names are UTF-8")
    assert memory.available_memory() == 4 * GB


def test_a_container_sees_its_own_group_as_the_root(machine):
    machine({"proc/self/cgroup": V1.strip(), **group("cgroup/memory", 4 * GB, GB, version=1)})
    assert memory.available_memory() == 3 * GB


def test_a_group_that_is_over_its_limit_has_nothing(machine):
    machine({"proc/self/cgroup": V2.strip(), **group("cgroup/user.slice/job", GB, 2 * GB)})
    assert memory.available_memory() == 0


def test_without_proc_it_is_half_of_what_is_built_in_or_a_guess(tmp_path, monkeypatch):
    limits(monkeypatch)
    monkeypatch.setattr(memory, "PROC", tmp_path / "no")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "no")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__, raising=False)
    assert memory.available_memory() == 2_048_000
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_memory() == 4 << 30


def test_an_address_space_ends(machine, monkeypatch):
    """Subtract mappings, of files too, from the address space."""
    page = os.sysconf("SC_PAGE_SIZE")
    machine({"proc/self/statm": f"{GB // page} 9 9 9 0 9 0"})
    used = GB // page * page
    assert memory.available_memory() == 20_480_000_000
    limits(monkeypatch, soft=3 * GB)
    assert memory.address_space() == 3 * GB
    assert memory.available_memory() == 3 * GB - used
    assert memory.free_memory() == 20_480_000_000
    limits(monkeypatch, bits=32)
    assert memory.address_space() == 1 << 32
    assert memory.available_memory() == (3 << 30) - used
    limits(monkeypatch, soft=2 * GB, bits=32)
    assert memory.available_memory() == 2 * GB - used
    limits(monkeypatch, soft=used // 2)
    assert memory.available_memory() == 0


UNDER_A_LIMIT = """
import resource, sys
import npllama
config = npllama.checkpoint.open_model(sys.argv[1]).config  # everything is imported
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
model = npllama.load(sys.argv[1])
print(model.params["output.weight"].dtype, list(npllama.generate(model, [1, 2, 3], max_tokens=1)) != [])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc/self/statm")
@pytest.mark.parametrize(("room", "dtype"), [(100 << 20, "uint16"), (900 << 20, "float32")])
def test_auto_stays_packed_within_a_limit_of_the_address_space(tmp_path, room, dtype):
    """Keep 20 MB of mapped weights as stored where the 40 to widen them fit the machine, but not half of what is left."""
    config = tiny.config(vocab_size=60_000, n_layers=1)
    with checkpoint.create(tmp_path / "m", config, "bfloat16", source={"kind": "test"}) as writer:
        for name, x in tiny.random_params(config, seed=1).items():
            writer.add(name, x)
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path / "m"), str(room)]
    environment = {**os.environ, "NPLLAMA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"{dtype} True\n", done.stderr[-500:]


@pytest.mark.parametrize(("bits", "why"), [(32, "a 64-bit Python has no such limit"), (64, "`ulimit -v` sets that limit")])
def test_weights_that_no_address_space_holds_are_said(tmp_path, bits, why, monkeypatch):
    config = tiny.CONFIGS["grouped"]
    with checkpoint.create(tmp_path / "m", config, "float32", source={"kind": "test"}) as writer:
        for name, x in tiny.random_params(config, seed=1).items():
            writer.add(name, x)
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.npy"))
    monkeypatch.setattr(reading, "address_space", lambda: n_bytes)
    checkpoint.open_model(tmp_path / "m")
    monkeypatch.setattr(reading, "address_space", lambda: n_bytes - 1)
    with monkeypatch.context() as patch:
        limits(patch, bits=bits)
        with pytest.raises(checkpoint.CheckpointError, match=rf"m: the weights take .* MB, but .* can address .* MB: {why}$"):
            checkpoint.open_model(tmp_path / "m")


def test_a_mapping_without_address_space_says_what_it_needs(tmp_path, monkeypatch):
    config = tiny.CONFIGS["grouped"]
    with checkpoint.create(tmp_path / "m", config, "float32", source={"kind": "test"}) as writer:
        for name, x in tiny.random_params(config, seed=1).items():
            writer.add(name, x)

    def full(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(np, "memmap", full)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"\.npy: Cannot allocate memory: 50\.3 kB of address space are needed$"
    ):
        checkpoint.open_model(tmp_path / "m")


def test_this_machine_has_some():
    assert 1 << 20 < memory.available_memory() < 1 << 50
