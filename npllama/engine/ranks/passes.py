"""Have all ranks make a pass over parameters that are spread over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ...cache import KVCache
from ...config import Config
from ...errors import NpllamaError
from ...scope import Ops, Params, Tap
from ..weights import Weight

Forward = TypeVar("Forward", bound=Callable[..., np.ndarray])


class Arithmetic(Protocol):
    """A way to compute that every rank can find by its name: a golden.precision.Precision."""

    @property
    def profile(self) -> str:
        """Return the name."""

    @property
    def ops(self) -> Ops | None:
        """Return the operations; None for forward()'s own."""

    def params(self, params: Params) -> Params:
        """Return a rank's parameters as they are computed with."""


class Lead(Protocol):
    """The signature of model.forward without the parameters; they are computed with in the given arithmetic."""

    def __call__(  # noqa: D102
        self,
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None,
        tap: Tap | None,
        last_only: bool,
        ops: Ops | None,
        arithmetic: Arithmetic | None = None,
    ) -> np.ndarray: ...


class Spread(dict[str, Weight]):
    """Rank 0's part of a model's parameters; lead() makes a pass by all ranks.

    whole  the parameters of the whole model, memory-mapped; None where rank 0 has a directory of its own share
    check  raises RankLost if another rank has ended
    """

    def __init__(
        self,
        parts: Mapping[str, Weight],
        lead: Lead,
        whole: Params | None = None,
        check: Callable[[], object] = lambda: None,
    ):
        super().__init__(parts)
        self.lead, self.whole, self.check = lead, whole, check

    def computed_in(self, arithmetic: Arithmetic) -> Spread:
        """Return the same parameters, over which each rank computes in an arithmetic."""
        return Spread(self, functools.partial(self.lead, arithmetic=arithmetic), self.whole, self.check)


def whole_params(params: Params) -> Params:
    """Return every parameter whole, also of a model that is spread over ranks. Raises NpllamaError if rank 0 has a share."""
    if not isinstance(params, Spread):
        return params
    if params.whole is None:
        raise NpllamaError("rank 0 has a directory of its own share, but whole weights are needed: expected the whole model")
    return params.whole


def check_ranks(params: Params) -> None:
    """Raise RankLost if the parameters are spread over ranks, of which one has ended."""
    if isinstance(params, Spread):
        params.check()


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
