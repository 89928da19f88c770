"""Test continuous batching: each text gets the tokens that it gets alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npllama import Model, Sampling, forward, generate_steps
from npllama.sampling import LogitsError
from npllama.text import batching
from npllama.text.batching import Batch, Stalled

from tiny import CONFIGS, random_params, random_tokens, relative_error

CONFIG = CONFIGS["grouped"]
MODEL = Model(CONFIG, random_params(CONFIG, seed=1))
PROMPTS = [random_tokens(CONFIG, i, n).tolist() for i, n in enumerate((3, 40, 1, 17, 90, 8, 25))]


def alone(i: int, n: int, sampling: Sampling) -> list[int]:
    return [step.token for step in generate_steps(MODEL, PROMPTS[i], n, sampling, seed=i)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=9, repetition_penalty=1.3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_texts_that_join_and_leave_are_as_alone(rows, sampling):
    batch = Batch(MODEL, rows, chunk=16)
    waiting, texts, made = list(range(len(PROMPTS))), {}, {i: [] for i in range(len(PROMPTS))}
    lengths = {i: 4 + 5 * (i % 3) for i in made}
    while waiting or texts:
        if waiting and batch.free:  # at most one a step
            i = waiting.pop(0)
            texts[batch.join(PROMPTS[i], sampling, seed=i)] = i
        for row, step in batch.step():
            i = texts[row]
            made[i].append(step.token)
            if len(made[i]) == lengths[i]:
                batch.leave(row)
                del texts[row]
    assert not batch.busy
    assert made == {i: alone(i, n, sampling) for i, n in lengths.items()}


def test_a_chunk_of_a_prompt_and_a_token_of_each_other_text_are_a_step():
    batch, seen = Batch(MODEL, 3, chunk=30), []
    short = batch.join([1, 2])
    assert [row for row, _ in batch.step()] == [short]
    long = batch.join(PROMPTS[4], watch=seen.append)
    assert [[row for row, _ in batch.step()] for _ in range(4)] == [[short], [short], [short, long], [short, long]]
    assert [len(logits) for logits in seen] == [30, 30, 30]
    assert relative_error(np.concatenate(seen), forward(MODEL.params, CONFIG, PROMPTS[4])) < 3e-6


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """Collect the shape of the tokens of each pass that a batch makes."""
    shapes = []

    def recorded(params, config, tokens, *args, **options):
        shapes.append(np.shape(tokens))
        return forward(params, config, tokens, *args, **options)

    monkeypatch.setattr(batching, "forward", recorded)
    return shapes


def test_prompts_that_wait_together_are_read_in_one_pass(passes):
    lengths = [8, 10, 9, 8, 10, 9, 8, 7]
    prompts = [random_tokens(CONFIG, 50 + i, n).tolist() for i, n in enumerate(lengths)]
    batch, seen = Batch(MODEL, 8, chunk=128), []
    for i, prompt in enumerate(prompts):
        batch.join(prompt, watch=seen.append if i == 2 else None)
    steps = [batch.step() for _ in range(5)]
    assert passes == [(8, 10), *[(8, 1)] * 4]
    assert [[row for row, _ in made] for made in steps] == [list(range(8))] * 5
    for row, prompt in enumerate(prompts):
        assert [made[row][1].token for made in steps] == [s.token for s in generate_steps(MODEL, prompt, 5, Sampling())]
    (logits,) = seen
    assert relative_error(logits, forward(MODEL.params, CONFIG, prompts[2])) < 3e-6


@pytest.mark.parametrize(
    ("rests", "rows"),
    [
        ([0, 5, 0], slice(1, 2)),
        ([8, 8, 8, 8], slice(0, 4)),
        ([40, 40, 40], slice(0, 1)),  # two would be more than a chunk
        ([30, 20, 25, 30], slice(1, 3)),  # three would be more than a chunk
        ([64, 3, 3, 64], slice(1, 3)),  # the longer ones would be padded or wait
        ([3, 8, 8, 8], slice(0, 4)),  # 27 of 32 are no padding
        ([3, 8, 0, 8], slice(0, 1)),  # 11 of 16 would be
        ([64, 0, 64, 2], slice(3, 4)),
        ([9, 9, 9, 9, 9, 9, 9, 8, 9], slice(2, 9)),  # seven fit, the shortest among them
    ],
)
def test_rows_to_read_fit_the_chunk_and_have_little_padding(rests, rows):
    assert batching.rows_to_read(rests, 64) == rows


def test_a_row_of_bad_logits_disturbs_no_other():
    params = dict(MODEL.params)
    params["tok_embeddings.weight"] = params["tok_embeddings.weight"].copy()
    params["tok_embeddings.weight"][130] = np.nan
    batch = Batch(Model(CONFIG, params), 2)
    bad, good = batch.join([130]), batch.join(PROMPTS[3], seed=3)
    made = []
    for n in range(6):
        for row, step in batch.step():
            if row == bad:
                assert isinstance(step, LogitsError)
                assert "new token 1: of 131 logits 131 are NaN" in str(step)
            else:
                made.append(step.token)
        if n == 3:
            batch.leave(bad)
            assert batch.join(PROMPTS[0]) == bad
            bad = -1
            assert row == good
    assert made[:3] == alone(3, 3, Sampling())
    batch.leave(0)
    batch.leave(1)
    row = batch.join(PROMPTS[5])
    assert [step.token for _ in range(4) for _, step in batch.step()] == alone(5, 4, Sampling())
    assert row == 0


def test_a_full_context_ends_a_text_and_no_other():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, max_seq_len=20))
    batch = Batch(model, 2)
    full, other = batch.join(PROMPTS[3]), batch.join([5])
    rows = [[row for row, _ in batch.step()] for _ in range(6)]
    assert (
        sum(row.count(full) for row in rows) == 4
    )  # the prompt has 17 tokens, three more are inputs, and the last is never one
    assert rows[-1] == [other]
    assert batch.busy
    batch.leave(other)
    assert not batch.busy
    assert batch.step() == []


def test_a_batch_that_can_not_go_on_says_so():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, max_seq_len=20))
    batch = Batch(model, 2, chunk=6)
    full, other = batch.join(PROMPTS[3]), batch.join([5])
    # Reading a chunk counts as progress, as does a token of the other text.
    rows = [[row for row, _ in batch.advance()] for _ in range(9)]
    assert sum(row.count(full) for row in rows) == 4
    batch.leave(other)
    with pytest.raises(Stalled, match="1 texts have not left, 1 of them with a full context of 20 tokens"):
        batch.advance()
    batch.leave(full)
    batch.join(PROMPTS[1][:13])
    assert [len(batch.advance()) for _ in range(4)] == [0, 0, 1, 1]


def test_what_can_not_join_is_refused_in_one_line():
    batch = Batch(MODEL, 1)
    with pytest.raises(ValueError, match="the prompt has 513 tokens, the model's context holds 512"):
        batch.join([1] * 513)
    with pytest.raises(ValueError, match="seed is -1, expected 0 or more"):
        batch.join([1], seed=-1)
    batch.join([1])
    with pytest.raises(ValueError, match="all 1 rows are taken"):
        batch.join([1])
    with pytest.raises(ValueError, match="found 0 rows and chunks of 512 tokens"):
        Batch(MODEL, 0)
