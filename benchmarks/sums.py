"""Measure how long two ranks take for one sum of 4,096 float32, the width of Llama 3 8B: a model needs two in each layer.

    python -m benchmarks.sums                  over shared memory
    mpiexec -n 2 python -m benchmarks.sums     over MPI

Prints a line of JSON with medians in seconds:

    together  both ranks compute one sum after the other, so that each finds the other about to arrive
    late      rank 1 sleeps before each sum, and rank 0 waits: from rank 1's arrival until rank 0 has the sum
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from npllama.engine.ranks import local, mpi

NUMBERS = 4096
BLOCKS, SUMS = 9, 50  # both at once: the number of blocks, and of sums in each
WAITS, LATE = 25, 3e-3  # the number of sums, and seconds by which rank 1 is late; over shared memory a wait blocks after 0.6 ms
OTHER = "import sys; sys.path[:] = filter(None, sys.path); from benchmarks.sums import follow; follow()"


def together(group: Any) -> float:
    """Return the seconds of a sum for which both ranks arrive at about the same time."""
    x, seconds = np.ones(NUMBERS, np.float32), []
    for _ in range(BLOCKS):
        started = time.perf_counter()
        for _ in range(SUMS):
            group.total(x)
        seconds.append((time.perf_counter() - started) / SUMS)
    return statistics.median(seconds)


def late(group: Any) -> float:
    """Return the seconds from the arrival of a late rank 1 until rank 0 has the sum; processes share perf_counter()'s clock."""
    x, arrived, done = np.ones(NUMBERS, np.float32), np.empty(WAITS), np.empty(WAITS)
    for i in range(WAITS):
        if group.rank:
            time.sleep(LATE)
        arrived[i] = time.perf_counter()
        group.total(x)
        done[i] = time.perf_counter()
    arrivals = group.gather(arrived, [WAITS, WAITS])[WAITS:]
    return statistics.median((done - arrivals).tolist())


def measured(group: Any) -> dict[str, float]:
    """Return both figures; every rank calls this, and those of rank 0 count."""
    return {"together": together(group), "late": late(group)}


def follow() -> None:
    """Run as rank 1 over shared memory."""
    rank, size, descriptor, *bells = map(int, sys.argv[1:])
    group = local.Worker(rank, size, descriptor, bells)
    local.pin(rank, size)
    group.receive()
    group.loaded()
    while group.receive() is not None:
        measured(group)


def main() -> None:
    """Print the figures, as rank 0."""
    if (world := mpi.world()) is not None:
        if world.size != 2:
            raise SystemExit(f"found {world.size} processes, expected mpiexec -n 2")
        found = measured(world)
        if world.rank == 0:
            print(json.dumps(found))
        return
    local.WORKER = OTHER
    group = local.Workers(2, {"measure": False})
    group.wait_until_loaded()
    try:
        group.running = True
        group.send({"measure": True})
        print(json.dumps(measured(group)))
    finally:
        group.close()


if __name__ == "__main__":
    main()
