"""Divide a model among ranks: each has some of the heads, of the feed-forward's channels and of the vocabulary.

    wq, wk, wv, w1, w3, output   rows: a rank computes its own part of the result
    wo, w2                       the columns that multiply the results of those rows: a rank computes one summand of the result
    norms, embedding             whole (a mapped embedding is read only where tokens are looked up)

The products with wo and w2 are summed over the ranks, and the logits are gathered (weights.Shard). A rank's own Config counts
its own heads and channels, so that model.py and KVCache do with a share what they do with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ...config import Config, parameter_shapes
from ...errors import NpllamaError
from ..weights import Form, Shard, Weight, form_of
from .groups import Group

# Channels and rows of the vocabulary are shared out in blocks, of the first of these sizes that gives each rank at least one.
# llama.cpp's K-quants have blocks of 256 columns, other quantised weights groups of 32; 64 numbers of 16 bits fill two cache
# lines. A group can be cut at an even column.
BLOCKS = (256, 64, 32, 2, 1)


@dataclass(frozen=True)
class Share:
    """The parts of one rank.

    own_kv_heads  those of kv_heads that no lower rank has a copy of, so that each key/value head is exactly one rank's own
    """

    rank: int
    size: int
    heads: slice
    kv_heads: slice
    own_kv_heads: slice
    ffn: slice
    vocabulary: slice


def shares(config: Config, size: int) -> list[Share]:
    """Return every rank's share.

    Key/value heads go whole to the ranks, with the query heads that use them. If there are fewer of them than ranks, several
    ranks have a copy of one and share its query heads. Raises ValueError for more ranks than query heads, channels or rows.
    """
    H, G = config.n_heads, config.n_kv_heads
    for count, what in ((H, "query heads"), (config.ffn_dim, "feed-forward channels"), (config.vocab_size, "tokens")):
        if not 1 <= size <= count:
            raise NpllamaError(f"{size} ranks, but the model has {count} {what}: expected 1 to {min(H, count)} ranks")
    return [_share(config, H // G, rank, size) for rank in range(size)]


def _share(config: Config, R: int, rank: int, size: int) -> Share:
    G = config.n_kv_heads
    if size <= G:
        kv = own_kv = _evenly(G, rank, size)
        heads = slice(kv.start * R, kv.stop * R)
    else:
        g = rank * G // size  # the only key/value head here
        first, stop = -(-g * size // G), -(-(g + 1) * size // G)  # the ranks that have it
        kv, own = slice(g, g + 1), _evenly(R, rank - first, stop - first)
        own_kv = kv if rank == first else slice(g, g)
        heads = slice(g * R + own.start, g * R + own.stop)
    return Share(rank, size, heads, kv, own_kv, _evenly(config.ffn_dim, rank, size), _evenly(config.vocab_size, rank, size))


def _evenly(n: int, rank: int, size: int) -> slice:
    """Return a rank's part of n, in whole blocks but for the end of the last rank's."""
    block = next(block for block in BLOCKS if block == 1 or n >= size * block)
    start, stop = (n // block * r // size * block for r in (rank, rank + 1))
    return slice(start, n if rank + 1 == size else stop)


def length(part: slice) -> int:
    """Return how many there are in a slice of a share."""
    return part.stop - part.start


def own_config(config: Config, share: Share) -> Config:
    """Return the constants of a rank's share, as model.py takes them."""
    counts = {"n_heads": length(share.heads), "n_kv_heads": length(share.kv_heads), "ffn_dim": length(share.ffn)}
    return replace(config, **counts)  # type: ignore[arg-type]  # mypy takes the counts for any of the fields


def parts_of(config: Config, share: Share) -> dict[str, tuple[str, slice, slice]]:
    """Return a rank's part of each parameter: the name of the whole one, the rows and the columns; slice(None) is all.

    The output matrix has its own name, `output.weight`, also where it is the embedding.
    """
    K, everything = config.head_dim, slice(None)
    q, kv = (slice(heads.start * K, heads.stop * K) for heads in (share.heads, share.kv_heads))
    rows = {"wq": q, "wk": kv, "wv": kv, "w1": share.ffn, "w3": share.ffn}
    columns = {"wo": q, "w2": share.ffn}
    found = {}
    for name in parameter_shapes(replace(config, tied_embeddings=True)):
        leaf = name.split(".")[-2]
        found[name] = (name, rows.get(leaf, everything), columns.get(leaf, everything))
    output = "tok_embeddings.weight" if config.tied_embeddings else "output.weight"
    return found | {"output.weight": (output, share.vocabulary, everything)}


def part_shapes(config: Config, share: Share) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each of a rank's parts."""
    own = replace(own_config(config, share), tied_embeddings=False)
    rows = {"tok_embeddings.weight": config.vocab_size, "output.weight": length(share.vocabulary)}
    return {name: (rows.get(name, shape[0]), *shape[1:]) for name, shape in parameter_shapes(own).items()}


def cut(params: Mapping[str, Weight], config: Config, share: Share) -> dict[str, Weight]:
    """Return a rank's part of the parameters, as parts_of() names them."""
    parts: dict[str, Weight] = {}
    for name, (whole, rows, columns) in parts_of(config, share).items():
        weight = params[whole]
        if rows != slice(None):
            parts[name] = _as_given(weight, form_of(weight).rows(rows))
        elif columns != slice(None):
            parts[name] = _as_given(weight, form_of(weight).columns(columns))
        else:
            parts[name] = weight
    return parts


def _as_given(weight: Weight, part: Form) -> Weight:
    """Return a part of a weight as an array where the weight was given as one."""
    return part.values if isinstance(weight, np.ndarray) else part


def joined(parts: Mapping[str, Weight], config: Config, group: Group) -> dict[str, Weight]:
    """Return a rank's parameters for a pass: its parts, the products of which are combined with the other ranks'."""
    sizes = [length(share.vocabulary) for share in shares(config, group.size)]
    params = dict(parts)
    for name, weight in parts.items():
        if name.endswith((".wo.weight", ".w2.weight")):
            params[name] = Shard(form_of(weight), group.total)
    gather: Callable[[np.ndarray], np.ndarray] = partial(group.gather, sizes=sizes)
    output = params.pop("output.weight")
    if config.tied_embeddings:
        params["tok_embeddings.weight"] = Shard(form_of(output), gather, form_of(parts["tok_embeddings.weight"]))
    else:
        params["output.weight"] = Shard(form_of(output), gather)
    return params


def along(x: np.ndarray, axis: int, part: slice) -> np.ndarray:
    """Return a part of an array along an axis counted from the end."""
    return x[(Ellipsis, part) + (slice(None),) * (-axis - 1)]


def gathered(x: np.ndarray, axis: int, group: Group, own: slice | None, sizes: Sequence[int]) -> np.ndarray:
    """Return every rank's x side by side along an axis; `own` is the part of x that is this rank's own, None if all of it."""
    x = x if own is None else along(x, axis, own)
    return np.ascontiguousarray(np.moveaxis(group.gather(np.moveaxis(x, axis, -1), sizes), -1, axis))
