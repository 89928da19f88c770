"""Exercise 12, byte_pair: bytes merged to tokens, the pair learned first before all others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ...tokenizer import ids_of
from .exercise import Exercise

Choose = Callable[[Sequence[tuple[int, int]]], tuple[int, int]]  # of the candidates (rank, place) -> the one that merges

MERGES = [(b"h", b"e"), (b"t", b"h"), (b"t", b"he"), (b" ", b"the"), (b"a", b"a"), (b"aa", b"aa"), (b"e", b"r"), (b"o", b"the")]


def merges() -> np.ndarray:
    """Return MERGES as pairs of ids.    int [M, 2]"""
    ids = {bytes([byte]): byte for byte in range(256)}
    pairs = []
    for left, right in MERGES:
        pairs.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return np.array(pairs)


def cases() -> list[tuple]:
    """Return a text whose pairs compete, one that overlaps with itself, one of a single byte, and one without any pair."""
    texts = (b"the other the", b"aaaaaaa", b"t", b"xyz")
    return [(np.array(list(text)), merges()) for text in texts]


def reference(ids: np.ndarray, merges: np.ndarray) -> np.ndarray:
    """Call tokenizer.ids_of(), which takes pieces and their ranks."""
    pieces = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    return np.array(ids_of(bytes(ids.tolist()), {piece: id for id, piece in enumerate(pieces)}))


def merged(choose: Choose, rounds: int = 1000) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a byte_pair() that merges the pair that `choose` takes, at most `rounds` times."""

    def byte_pair(ids: np.ndarray, merges: np.ndarray) -> np.ndarray:
        ranks, parts = {tuple(pair): rank for rank, pair in enumerate(merges.tolist())}, ids.tolist()
        for _ in range(rounds):
            pairs = itertools.pairwise(parts)
            found = [(ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks]
            if not found:
                break
            rank, place = choose(found)
            parts[place : place + 2] = [256 + rank]
        return np.array(parts)

    return byte_pair


def small() -> list[tuple]:
    """Return two pairs that overlap; a pair that occurs twice; a pair that overlaps with itself."""
    return [
        (np.array([1, 2, 3]), np.array([[2, 3], [1, 2]])),
        (np.array([1, 2, 1, 2]), np.array([[1, 2]])),
        (np.array([5, 5, 5]), np.array([[5, 5]])),
    ]


EXERCISE = Exercise(
    name="byte_pair",
    arguments="ids, merges",
    statement="""\
Merge adjacent tokens until no pair of neighbours is in the list of merges.

    row i of merges, (left, right), was learned i-th: the two become the token 256 + i
    in each round the pair that was learned first merges, of equal pairs the leftmost; then all pairs are looked up again

    ids int [N], merges int [M, 2] -> int [at most N]

Ids below 256 are bytes. A merge may join tokens that earlier merges made.""",
    real="tokenizer.merge_rounds",
    reference=reference,
    cases=cases,
    variants={
        "the leftmost pair merges first: take the one that was learned first, wherever it is": merged(
            lambda found: min(found, key=lambda pair: pair[1])
        ),
        "the pair learned last merges first: take the lowest row": merged(max),
        "only one pair merges: repeat until no pair is in the list": merged(min, rounds=1),
        "of equal pairs the rightmost merges first: take the leftmost": merged(
            lambda found: min(found, key=lambda pair: (pair[0], -pair[1]))
        ),
    },
    small=small,
)
