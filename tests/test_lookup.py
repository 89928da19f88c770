"""Lookup: the same greedy tokens in fewer passes, and the cache as plain decoding leaves it."""

from __future__ import annotations

import dataclasses

import pytest

import npllama.generation
from npllama import KVCache, Model, Sampling, forward, generate, generate_steps, load
from npllama.generation import _Lookup

from tiny import CONFIGS, random_params, random_tokens, relative_error

CONFIG = CONFIGS["grouped"]
MODEL = Model(CONFIG, random_params(CONFIG, seed=1))
PROMPTS = [random_tokens(CONFIG, seed=2, shape=9).tolist(), [1, 2, 3, 4] * 5, [7], [5, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("k", [1, 2, 7, 30])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["random", "repeating", "one", "same"])
def test_the_tokens_are_those_without(prompt, k):
    for n in (0, 1, 2, 40):
        assert list(generate(MODEL, prompt, max_tokens=n, lookup=k)) == list(generate(MODEL, prompt, max_tokens=n))


def test_the_logits_are_those_without():
    plain = list(generate_steps(MODEL, PROMPTS[1], 40, Sampling()))
    looked_up = list(generate_steps(MODEL, PROMPTS[1], 40, Sampling(), lookup=5))
    for a, b in zip(plain, looked_up, strict=True):
        assert relative_error(b.logits, a.logits) < 3e-6


def test_the_embedded_model_copies_its_prompt_in_fewer_passes(monkeypatch):
    model, passes = load(), []
    monkeypatch.setattr(npllama.generation, "forward", lambda *a, **k: passes.append(len(a[2])) or forward(*a, **k))
    ids = model.tokenizer.encode("ROMEO:\nIs the day so young?\n\nBENVOLIO:\nBut new struck nine.\n\n" * 3, bos=True)
    plain = list(generate(model, ids, max_tokens=48))
    n_plain = len(passes)
    passes.clear()
    assert list(generate(model, ids, max_tokens=48, lookup=7)) == plain
    assert len(passes) < n_plain / 1.5
    assert max(passes[1:]) == 8  # the last token and seven proposals; the first pass is the prompt's


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 11, 40])
def test_a_cache_is_left_as_plain_decoding_leaves_it(taken):
    caches = []
    for lookup in (0, 6):
        cache = KVCache(CONFIG)
        tokens = generate(MODEL, PROMPTS[1], max_tokens=40, cache=cache, lookup=lookup)
        made = [next(tokens) for _ in range(taken)]
        if taken == 40:
            assert next(tokens, None) is None
        tokens.close()
        caches.append(cache)
    assert caches[0].length == caches[1].length
    if taken:
        after = [forward(MODEL.params, CONFIG, made[-1:], cache) for cache in caches]
        assert relative_error(after[1], after[0]) < 3e-6


def test_it_ends_before_a_stop_id_and_with_the_context():
    plain = list(generate(MODEL, PROMPTS[1], max_tokens=40))
    for stop in set(plain):
        ends = plain[: plain.index(stop)]
        assert list(generate(MODEL, PROMPTS[1], max_tokens=40, stop_ids=[stop], lookup=6)) == ends
    short = Model(dataclasses.replace(CONFIG, max_seq_len=24), MODEL.params)
    for k in (1, 6, 100):
        assert list(generate(short, PROMPTS[1], 40, lookup=k)) == list(generate(short, PROMPTS[1], 40))


@pytest.mark.parametrize("k", [1, 3, 100])
def test_wrong_proposals_change_nothing_and_never_pass_the_end(k, monkeypatch):
    """Stop at the context's end and at that of the tokens asked for."""
    monkeypatch.setattr(_Lookup, "propose", lambda self, k: [3] * k)
    short = Model(dataclasses.replace(CONFIG, max_seq_len=24), MODEL.params)
    for model, n in ((short, 40), (MODEL, 10)):
        assert list(generate(model, PROMPTS[1], n, lookup=k)) == list(generate(model, PROMPTS[1], n))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.5, "lookup": 3}, "^lookup works only at temperature 0, found 0.5$"),
        ({"lookup": -1}, "^lookup is -1, expected 0 or more$"),
        ({"temperature": 0.5, "lookup": -1}, "^lookup is -1, expected 0 or more$"),
    ],
)
def test_it_is_for_greedy_decoding(settings, line):
    with pytest.raises(ValueError, match=line):
        generate(MODEL, PROMPTS[0], **settings)


def test_the_longest_match_is_proposed_and_of_those_the_latest():
    known = _Lookup()
    for token in (1, 2, 3, 9, 2, 3, 8, 1, 2, 3):
        known.add(token)
    assert known.propose(3) == [9, 2, 3]  # 1 2 3 came before; 2 3 alone later
    known.add(4)
    assert known.propose(3) == []
    first = _Lookup()
    for token in (1, 2, 3, 1, 2):  # the text's first two
        first.add(token)
    assert first.propose(2) == [3, 1]
    for token in (2, 3):
        known.add(token)
    assert known.propose(2) == [4, 2]
    assert known.propose(0) == []
