"""Lead the other ranks: rank 0 announces each pass, and they make it on the same tokens, with caches in the same state.

The message before a pass:

    cache      the number of rank 0's cache; each rank keeps a cache under that number
    rows       the shape of all its rows
    at, active the rows that the pass is over, and which of these it extends: see KVCache.view
    lengths    the number of committed slots of each row, to which every rank truncates its cache
    tokens, last_only, ops, tapped    the arguments of model.forward; of the tap only whether there is one
    arithmetic the name of the precision to compute in, in place of the operations; None for the parameters' own
    forget     caches that rank 0 no longer has

Only rank 0 draws tokens, so that a rank on another processor, which rounds differently, can't choose other ones.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ...activations import TABLE
from ...cache import KVCache
from ...config import Config
from ...errors import NpllamaError
from ...model import FAST, PLAIN, check_tokens, forward
from ...scope import Ops, Tap
from ..weights import Weight
from . import shares
from .groups import Abandoned, Following, Group, Leading, Message, RankError
from .passes import Arithmetic
from .shares import Share, along, length

OPS = {"FAST": FAST, "PLAIN": PLAIN}  # a set of operations is sent by its name


@dataclass(eq=False)
class Part:
    """One rank's part of a model, and the group that computes with it."""

    whole: Config
    params: Mapping[str, Weight]  # as shares.joined returns them
    group: Group
    config: Config = field(init=False)  # of this rank's share

    def __post_init__(self) -> None:
        self.shares = shares.shares(self.whole, self.group.size)
        self.share = self.shares[self.group.rank]
        self.config = shares.own_config(self.whole, self.share)

    def forward(
        self,
        tokens: np.ndarray,
        cache: KVCache,
        last_only: bool,
        ops: str | None,
        arithmetic: Arithmetic | None,
        tap: Tap | None,
    ) -> np.ndarray:
        """Make this rank's part of a pass; the logits are the whole model's, on every rank."""
        if arithmetic is not None:
            params = arithmetic.params(self.params)
            return forward(params, self.config, tokens, cache, tap, last_only, arithmetic.ops)
        return forward(self.params, self.config, tokens, cache, tap, last_only, None if ops is None else OPS[ops])


class Leader:
    """Rank 0; passes.Spread calls its forward() in place of model.forward."""

    def __init__(self, part: Part, group: Leading):
        self.part, self.group, self.lock = part, group, threading.Lock()
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self._gone: list[int] = []  # numbers of caches that no longer exist
        self._finalizer = weakref.finalize(self, self.group.close)

    def close(self) -> None:
        """End the other ranks."""
        self._finalizer()

    def check(self) -> None:
        """Raise RankLost if another rank has ended."""
        with self.lock:
            self.group.check()

    def forward(
        self,
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None,
        tap: Tap | None,
        last_only: bool,
        ops: Ops | None,
        arithmetic: Arithmetic | None = None,
    ) -> np.ndarray:
        """Make a pass as model.forward does, with all ranks. Raises RankError for a rank that fails or has ended."""
        part = self.part
        if config != part.whole:
            raise NpllamaError("the constants are not those of the model that is spread over ranks")
        tokens = check_tokens(tokens, config)
        cache = KVCache(config, tokens.shape[:-1]) if cache is None else cache
        name = operations_name(ops, tap, arithmetic)
        before = cache.lengths
        cache.extend(tokens >= 0)  # a ValueError is raised here, before the other ranks begin
        cache.truncate(before)
        with self.lock:
            memory, at, active = cache.view
            message: Message = {
                "cache": self._number(cache),
                "rows": memory.batch_shape,
                "at": [[i.start, i.stop, i.step] if isinstance(i, slice) else int(i) for i in at],
                "active": None if active is None else active.tolist(),
                "lengths": before.tolist(),
                "shape": list(tokens.shape),
                "tokens": tokens.ravel().tolist(),
                "last_only": last_only,
                "ops": name,
                "arithmetic": arithmetic and arithmetic.profile,
                "tapped": tap is not None,
                "forget": self._gone.copy(),
            }
            try:
                self.group.running = True
                self.group.send(message)
                shared = None if tap is None else SharedTap(part, tap)
                logits = part.forward(tokens, cache, last_only, name, arithmetic, shared)
            except BaseException:
                cache.truncate(before)  # the other ranks do so before the next pass
                self.group.abandon()
                raise
            finally:
                self.group.running = False
            del self._gone[: len(message["forget"])]
        return logits

    def _number(self, cache: KVCache) -> int:
        memory, *_ = cache.view
        if memory not in self._numbers:
            if cache.length:
                raise NpllamaError("the cache was filled by another model: expected a new one")
            self._numbers[memory] = number = next(self._next)
            weakref.finalize(memory, self._gone.append, number)
        return self._numbers[memory]


def operations_name(ops: Ops | None, tap: Tap | None, arithmetic: Arithmetic | None) -> str | None:
    """Return the name by which the other ranks find these operations; None for those of the arithmetic."""
    if arithmetic is not None and ops is arithmetic.ops:
        return None
    if ops is None:
        return "FAST" if tap is None else "PLAIN"
    for name, known in OPS.items():
        if ops is known:
            return name
    raise NpllamaError("only model.PLAIN and model.FAST can be computed by several ranks: expected a model of one process")


def follow(part: Part, group: Following, named: Callable[[str], Arithmetic]) -> None:
    """Make each pass that rank 0 announces, as another rank, until rank 0 ends; `named` finds an arithmetic by its name."""
    caches: dict[int, KVCache] = {}
    while (message := group.receive()) is not None:
        for number in message["forget"]:
            caches.pop(number, None)
        tokens = np.array(message["tokens"], np.int64).reshape(message["shape"])
        tap = SharedTap(part) if message["tapped"] else None
        try:
            cache = _viewed(caches.setdefault(message["cache"], KVCache(part.whole, tuple(message["rows"]))), message)
            arithmetic = named(message["arithmetic"]) if message["arithmetic"] else None
            part.forward(tokens, cache, message["last_only"], message["ops"], arithmetic, tap)
        except Abandoned:
            continue
        except Exception as error:
            group.report(error)


def _viewed(cache: KVCache, message: Message) -> KVCache:
    """Return the rows of this rank's cache that the pass is over, truncated to the lengths of rank 0's."""
    for index in message["at"]:
        cache = cache[slice(*index) if isinstance(index, list) else index]
    if message["active"] is not None:
        cache = cache.only(message["active"])
    cache.truncate(lengths := np.array(message["lengths"], np.int64))
    if (cache.lengths != lengths).any():
        raise RankError(f"the cache's rows hold {cache.lengths.tolist()} slots, rank 0's {lengths.tolist()}")
    return cache


class SharedTap:
    """The tap on every rank: rank 0's tap is shown whole activations, and each rank continues with its part of the result.

    Activations that are split along H, G or F of the activation table are gathered first. (Logits are whole already.)
    """

    def __init__(self, part: Part, tap: Tap | None = None):
        self.group, self.tap = part.group, tap
        kv = _own(part.share)
        parts = {"H": [s.heads for s in part.shares], "G": [s.own_kv_heads for s in part.shares]}
        parts["F"] = [s.ffn for s in part.shares]
        self._sizes = {axis: [length(p) for p in each] for axis, each in parts.items()}
        self._own = {"H": None, "G": kv, "F": None}
        self._mine = {"H": part.share.heads, "G": part.share.kv_heads, "F": part.share.ffn}

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return this rank's part of what rank 0's tap returns for the whole activation."""
        axes = TABLE[_in_table(name)].axes
        split = next((axis for axis in "HGF" if axis in axes), None)
        at = axes.index(split) - len(axes) if split else 0
        if split:
            x = shares.gathered(x, at, self.group, self._own[split], self._sizes[split])
        if self.tap is not None:
            y = self.tap(name, x)
            if not isinstance(y, np.ndarray) or y.shape != x.shape:
                found = f"an array of shape {y.shape}" if isinstance(y, np.ndarray) else repr(y)[:60]
                raise ValueError(f"the tap returned {found} for {name}, expected an array of shape {x.shape}")
            x = y
        x = self.group.broadcast(x)
        return along(x, at, self._mine[split]) if split else x


def _own(share: Share) -> slice | None:
    """Return which of a rank's key/value heads no lower rank has, counted from its first; None if all."""
    if share.own_kv_heads == share.kv_heads:
        return None
    first = share.kv_heads.start
    return slice(share.own_kv_heads.start - first, share.own_kv_heads.stop - first)


def _in_table(name: str) -> str:
    """Return the activation's name in the table: without `layers.N.`"""
    with contextlib.suppress(ValueError):
        layers, number, rest = name.split(".", 2)
        if layers == "layers" and number.isdigit():
            return rest
    return name
