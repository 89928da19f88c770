"""Test a source's tensors and their parts; the readers' tests cover whole checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.checkpoint import writing
from npllama.engine.grouped import to_int4
from npllama.engine.weights import widen
from npllama_convert.conversion import Tensor, tie

import tiny
from tiny import uniform


@pytest.fixture(scope="module")
def whole():
    return to_int4(uniform(5, (12, 128)))


@pytest.fixture
def tensor(whole):
    return Tensor.of_grouped((12, 128), whole.grouping, lambda start, stop: whole.rows(slice(start, stop)))


def test_the_rows_of_a_quantised_tensor_are_its_numbers(tensor, whole):
    assert tensor.rows(3, 7).tobytes() == widen(whole)[3:7].tobytes()
    assert tensor.dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 12), (32, 96)), ((5, 9), (0, 128)), ((5, 9), (48, 80)), ((11, 12), (64, 128))]
)
def test_a_part_of_a_quantised_tensor_is_quantised_as_it_was(rows, columns, tensor, whole):
    part = tensor.part(slice(*rows), slice(*columns))
    expected = widen(whole)[slice(*rows), slice(*columns)]
    n = len(expected)
    assert part.shape == expected.shape
    assert part.rows(0, n).tobytes() == expected.tobytes()
    assert part.rows(n - 1, n).tobytes() == expected[n - 1 :].tobytes()
    assert part.quantised(0, n).grouping == part.grouping
    assert part.grouping.bits == 4
    for start in range(n):
        assert widen(part.quantised(start, n)).tobytes() == expected[start:].tobytes()


def test_a_part_of_a_plain_tensor_reads_its_rows_and_columns():
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    part = Tensor.of(array).part(slice(1, None), slice(2, 9))
    assert (part.shape, part.dtype) == ((5, 7), np.float32)
    np.testing.assert_array_equal(part.rows(1, 3), array[2:4, 2:9])


def test_quantised_rows_come_block_by_block(tensor, whole, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_BYTES", 5 * 128 * 4)  # five rows
    blocks = list(tensor.quantised_blocks())
    assert [block.shape[0] for block in blocks] == [5, 5, 2]
    assert b"".join(widen(block).tobytes() for block in blocks) == widen(whole).tobytes()
    assert list(Tensor.of(widen(whole)).quantised_blocks()) == []


@pytest.mark.parametrize(
    ("output", "change", "expected"),
    [
        ("float16", 0, "bit for bit"),
        ("float32", 0, "in value, as float32 and float16"),
        ("float16", 1, None),
        ("float32", 1, None),
    ],
)
def test_an_output_matrix_equal_to_the_embedding_is_stored_once(output, change, expected):
    embedding = uniform(1, (6, 4)).astype(np.float16)
    other = embedding.astype(output)
    other[5, 3] += change
    tensors = {"tok_embeddings.weight": Tensor.of(embedding), "output.weight": Tensor.of(other)}
    lines: list[str] = []
    config, left = tie(tiny.config(), tensors, lines.append)
    assert config.tied_embeddings == (expected is not None)
    assert set(left) == ({"tok_embeddings.weight"} if expected else set(tensors))
    assert lines == (
        [f"tied embeddings: output.weight equals the embedding {expected}, and is stored once"] if expected else []
    )


def test_all_rows_and_columns_are_the_tensor_itself(tensor):
    assert tensor.part(slice(None), slice(None)) is tensor
