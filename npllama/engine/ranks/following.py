"""Run any rank but 0: load its part of the model and make each pass that rank 0 announces."""

from __future__ import annotations

import contextlib
import signal
import sys

from ...checkpoint.reading import load_part
from ..threads import set_threads
from . import local, mpi
from .groups import RankError
from .leading import Part, follow
from .passes import Arithmetic


def arithmetic_named(name: str) -> Arithmetic:
    """Return the precision of this name."""
    from ...golden.precision import named  # few runs need it

    return named(name)


def main() -> None:
    """Run as a rank: sys.argv is its number, that of all, the file descriptor of the shared memory, and those of the bells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 handles it, and ends the others
    rank, size, descriptor, *bells = map(int, sys.argv[1:])
    group = local.Worker(rank, size, descriptor, bells)
    order = group.receive()
    if order is None:
        return
    try:
        local.pin(rank, size)
        set_threads(order["threads"])
        part = load_part(order["path"], order["dtype"], group)
    except Exception as error:
        group.loaded(error)
        return
    group.loaded()
    follow(part, group, arithmetic_named)


def follow_world(group: mpi.World) -> None:
    """Follow rank 0 of an MPI run until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (order := group.receive()) is None:
        return
    part: Part | None = None
    fault: Exception | None = None
    try:
        set_threads(group.threads(order["threads"]))
        part = load_part(order["path"], order["dtype"], group)
    except Exception as error:
        fault = error
    with contextlib.suppress(RankError):  # rank 0 reports it
        group.agree(fault)
    if part is None:
        group.receive()  # returns when rank 0 ends
    else:
        follow(part, group, arithmetic_named)
