"""Have all ranks make a pass over parameters that are spread over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ...cache import KVCache
from ...config import Config
from ...scope import Ops, Tap
from ..weights import Weight

Forward = TypeVar("Forward", bound=Callable[..., np.ndarray])


class Lead(Protocol):
    """The signature of model.forward without the parameters."""

    def __call__(  # noqa: D102
        self, config: Config, tokens: ArrayLike, cache: KVCache | None, tap: Tap | None, last_only: bool, ops: Ops | None
    ) -> np.ndarray: ...


class Spread(dict[str, Weight]):
    """Rank 0's part of a model's parameters; lead() makes a pass by all ranks."""

    def __init__(self, parts: Mapping[str, Weight], lead: Lead):
        super().__init__(parts)
        self.lead = lead


def by_all_ranks(forward: Forward) -> Forward:
    """Wrap model.forward so that all ranks make the pass where the parameters are spread over them."""

    @functools.wraps(forward)
    def run(
        params: Mapping[str, Weight],
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None = None,
        tap: Tap | None = None,
        last_only: bool = False,
        ops: Ops | None = None,
    ) -> np.ndarray:
        if isinstance(params, Spread):
            return params.lead(config, tokens, cache, tap, last_only, ops)
        return forward(params, config, tokens, cache, tap, last_only, ops)

    typed: Any = run  # it has the signature of `forward`, which type checkers can't follow through `wraps`
    return typed
