"""Prefill and decode, alone and in batches; the text as it grows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npllama.generation
from npllama import KVCache, Model, Sampling, forward, generate, generate_batch, generate_steps
from npllama.generation import prefill, stream_text

from tiny import CONFIGS, random_params, random_tokens

CONFIG = CONFIGS["grouped"]
MODEL = Model(CONFIG, random_params(CONFIG, seed=1))
PROMPT = random_tokens(CONFIG, seed=2, shape=9).tolist()


def greedy(prompt: list[int], n: int) -> list[int]:
    """Generate by definition: a forward pass over all tokens for each new token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(forward(MODEL.params, CONFIG, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_the_whole_pass():
    assert list(generate(MODEL, PROMPT, max_tokens=20)) == greedy(PROMPT, 20)


def test_tokens_come_one_by_one():
    """Check that asking for one token does no more work than one token takes."""
    cache = KVCache(CONFIG)
    tokens = generate(MODEL, PROMPT, max_tokens=20, cache=cache)
    assert cache.length == 0
    for n in range(3):
        next(tokens)
        assert cache.length == len(PROMPT) + n


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prefill_in_chunks_is_the_same(chunk, monkeypatch):
    monkeypatch.setattr(npllama.generation, "PREFILL_CHUNK", chunk)
    assert list(generate(MODEL, PROMPT, max_tokens=20)) == greedy(PROMPT, 20)


def test_a_long_prompt_s_scores_are_never_whole(monkeypatch):
    monkeypatch.setattr(npllama.generation, "PREFILL_CHUNK", 16)
    widest = []
    real = npllama.generation.forward

    def watched(params, config, tokens, cache, **options):
        widest.append(np.shape(tokens)[-1])
        return real(params, config, tokens, cache, **options)

    monkeypatch.setattr(npllama.generation, "forward", watched)
    prefill(MODEL, np.zeros(300, int), KVCache(CONFIG))
    assert max(widest) == 16
    assert sum(widest) == 300


def test_the_same_seed_gives_the_same_tokens_and_another_others():
    def draw(seed):
        return list(generate(MODEL, PROMPT, max_tokens=30, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_what_is_not_given_is_greedy_with_seed_0():
    assert list(generate(MODEL, PROMPT, 5)) == greedy(PROMPT, 5)
    assert [id for (id,) in generate_batch(MODEL, [PROMPT], 5)] == greedy(PROMPT, 5)
    hot = Sampling(3.0)
    expected = [step.token for step in generate_steps(MODEL, PROMPT, 8, hot, seed=0)]
    assert [step.token for step in generate_steps(MODEL, PROMPT, 8, hot)] == expected
    assert list(generate(MODEL, PROMPT, 8, temperature=3.0)) == expected
    assert list(generate_batch(MODEL, [PROMPT], 8, hot)) == list(generate_batch(MODEL, [PROMPT], 8, hot, seed=0))
    assert len(list(generate(MODEL, PROMPT))) == len(list(generate_batch(MODEL, [PROMPT]))) == 64


def test_it_ends_before_a_stop_id():
    tokens = greedy(PROMPT, 20)
    stop = tokens[7]
    assert list(generate(MODEL, PROMPT, max_tokens=20, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def test_it_ends_where_the_context_is_full():
    config = dataclasses.replace(CONFIG, max_seq_len=12)
    assert len(list(generate(Model(config, MODEL.params), PROMPT, max_tokens=50))) == 12 - 9 + 1  # the last need not be read


def test_a_cache_goes_on_where_it_was():
    first = greedy(PROMPT, 5)
    cache = KVCache(CONFIG)
    list(generate(MODEL, PROMPT, max_tokens=5, cache=cache))
    assert cache.length == len(PROMPT) + 4  # the last token was not needed
    more = [3, 1, 4]
    expected = greedy(PROMPT + first + more, 6)
    assert list(generate(MODEL, first[-1:] + more, max_tokens=6, cache=cache)) == expected


def test_a_truncated_cache_forgets():
    cache = KVCache(CONFIG)
    list(generate(MODEL, PROMPT, max_tokens=5, cache=cache))
    cache.truncate(4)
    assert list(generate(MODEL, PROMPT[4:], max_tokens=5, cache=cache)) == greedy(PROMPT, 5)


def test_each_prompt_of_a_batch_gets_the_tokens_it_gets_alone():
    prompts = [random_tokens(CONFIG, seed, n).tolist() for seed, n in enumerate((9, 1, 30))]
    stop = greedy(prompts[0], 6)[-1]  # the first row ends early
    rows: list[list[int]] = [[], [], []]
    for step in generate_batch(MODEL, prompts, max_tokens=12, stop_ids=[stop]):
        for row, id in zip(rows, step, strict=True):
            row += [] if id is None else [id]
    alone = [list(generate(MODEL, prompt, max_tokens=12, stop_ids=[stop])) for prompt in prompts]
    assert rows == alone
    assert len(rows[0]) < 6


def test_each_row_of_a_batch_ends_where_its_context_is_full():
    short = Model(dataclasses.replace(CONFIG, max_seq_len=12), MODEL.params)
    prompts = [random_tokens(CONFIG, seed, n).tolist() for seed, n in enumerate((9, 4))]
    rows = zip(*generate_batch(short, prompts, 50), strict=True)
    for row, prompt in zip(rows, prompts, strict=True):
        assert [id for id in row if id is not None] == list(generate(short, prompt, 50))


def test_a_row_that_has_ended_is_padding_and_no_pass_is_in_vain(monkeypatch):
    prompts, passes = [[1, 2, 3], [7, 8, 9]], []
    alone = [list(generate(MODEL, prompt, 4)) for prompt in prompts]
    stop = next(id for id in alone[0] if id not in alone[1])

    def watched(params, config, tokens, *args, **options):
        passes.append(np.array(tokens).tolist())
        return forward(params, config, tokens, *args, **options)

    monkeypatch.setattr(npllama.generation, "forward", watched)
    steps = list(generate_batch(MODEL, prompts, 4, stop_ids=[stop]))
    assert len(steps) == 4
    assert passes == [prompts] + [[[-1 if id is None else id] for id in step] for step in steps[:-1]]
    passes.clear()
    assert list(generate(MODEL, prompts[1], 4)) == alone[1]
    assert passes == [prompts[1]] + [[id] for id in alone[1][:-1]]


def test_a_batch_ends_when_all_its_rows_have():
    first = next(generate(MODEL, [1, 2, 3]))
    assert list(generate_batch(MODEL, [[1, 2, 3]] * 2, 5, stop_ids=[first])) == []


def test_a_row_s_draws_do_not_depend_on_its_batch():
    prompts = [random_tokens(CONFIG, seed, 5).tolist() for seed in range(3)]
    sampling = Sampling(1.2, top_p=0.9)
    together = list(generate_batch(MODEL, prompts, 8, sampling, seed=4))
    assert [step[0] for step in together] == [step[0] for step in generate_batch(MODEL, prompts[:1], 8, sampling, seed=4)]
    assert len({tuple(row) for row in zip(*together, strict=True)}) == 3


def test_log_probabilities_are_the_model_s_whatever_the_sampling():
    steps = list(generate_steps(MODEL, PROMPT, 4, Sampling(2.0, top_k=5), seed=1))
    ids = PROMPT + [step.token for step in steps]
    logits = forward(MODEL.params, CONFIG, ids).astype(np.float64)
    for i, step in enumerate(steps):
        row = logits[len(PROMPT) - 1 + i]
        expected = row - np.log(np.exp(row).sum())
        assert step.logprob == pytest.approx(expected[step.token], abs=1e-5)
        top = step.top(3)
        assert [id for id, _ in top] == np.argsort(-expected)[:3].tolist()
        assert [p for _, p in top] == pytest.approx(np.sort(expected)[::-1][:3].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ([], "at least one"),
        ([1, -1], "token id -1 is outside the vocabulary: expected 0 to 130"),
        ([1, 131], "token id 131 is outside the vocabulary"),
        ([1] * 513, "the prompt has 513 tokens, the model's context holds 512"),
    ],
    ids=["empty", "negative", "too-large", "too-long"],
)
def test_a_bad_prompt_is_refused_in_one_line(tokens, line):
    with pytest.raises(ValueError, match=line):
        list(generate(MODEL, tokens))


def test_a_prompt_that_fills_the_context_has_one_token_more():
    assert len(list(generate(MODEL, [1] * 512, 5, stop_ids=[]))) == 1


def test_id_0_is_an_id_as_any():
    assert list(generate(MODEL, [0, 5], 3)) == greedy([0, 5], 3)


def test_id_0_came_before_as_any(monkeypatch):
    real, seen = npllama.generation.draw, []

    def draw(logits, sampling, rng, name, before=()):
        seen.append(list(before))
        return real(logits, sampling, rng, name, before)

    monkeypatch.setattr(npllama.generation, "draw", draw)
    next(generate_batch(MODEL, [[0, 5, 0], [7]]))
    assert seen == [[0, 5, 0], [7]]


def test_prefill_refuses_what_does_not_fit_before_it_computes(monkeypatch):
    monkeypatch.setattr(npllama.generation, "forward", lambda *args, **options: pytest.fail("computed"))
    cache = KVCache(CONFIG)
    with pytest.raises(ValueError, match="the prompt has 513 tokens, the model's context holds 512"):
        prefill(MODEL, np.ones(513, int), cache)
    assert cache.length == 0


class Letters:
    """A stand-in for StreamDecoder: id 97 is "a"."""

    def push(self, id: int) -> str:
        return chr(id)

    def flush(self) -> str:
        return ""


def shown(text: str, stop: list[str]) -> list[str]:
    return list(stream_text(map(ord, text), Letters(), stop))


def test_text_streams_letter_by_letter():
    assert shown("hello", []) == list("hello")


@pytest.mark.parametrize(
    ("stop", "held"), [([], 0), (["x"], 0), (["ox"], 1), (["lox"], 2), (["helloworld"], 5), (["o!", "lo!"], 2)]
)
def test_no_more_is_held_back_than_might_begin_a_stop_string(stop, held):
    """Yield after "hello", before another id is asked for."""
    asked = []

    def ids():
        for letter in "hello":
            yield ord(letter)
        asked.append("a sixth")
        yield ord("?")

    shown = ""
    for part in stream_text(ids(), Letters(), stop):
        if asked:
            break
        shown += part
    assert shown == "hello"[: 5 - held]


def test_a_stop_string_of_any_length_takes_no_time():
    """Count the beginnings that are compared: no more than letters have come, however long the stop string is."""
    compared = []

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, letters):
            compared.append(letters.stop)
            return str.__getitem__(self, letters)

    assert "".join(shown("hello", [Counted("ox" * 1000)])) == "hello"
    assert compared
    assert max(compared) <= 2


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("ENEND", ["END"], "EN"),
        ("EEN", ["END"], "EEN"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("aab", ["ab", "b"], "a"),
        ("abc", ["x"], "abc"),
    ],
)
def test_a_stop_string_ends_the_text_and_its_beginning_is_held_back(text, stop, expected):
    parts = shown(text, stop)
    assert "".join(parts) == expected


@settings(deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_up_to_the_first_stop_string_always(text, stop):
    ends = [text.find(s) + len(s) for s in stop if s in text]
    seen = text[: min(ends)] if ends else text  # a stop string is seen when its last letter comes
    cut = min((i for s in stop if (i := seen.find(s)) >= 0), default=len(seen))
    assert "".join(shown(text, stop)) == text[:cut]


def test_a_batch_takes_prompts_and_nothing_else():
    """Refuse prompts with padding, which is the batch's own: they would silently get other tokens."""
    model = npllama.load()
    for prompts, line in (
        ([[1, 2], [3, -1]], "token id -1 is outside the vocabulary"),
        ([[1, 2], [3, 2256]], "token id 2256 is outside the vocabulary"),
        ([[1.5, 2.0]], "dtype float64: expected a list or an array of at least one whole number"),
        ([[1], []], "expected a list or an array of at least one whole number"),
        ([1, 2], r"tokens of shape \(\) and dtype int64"),
        ([[[1, 2]]], r"a prompt of shape \(1, 2\): expected the ids of one text"),
        ([], "there is no prompt, expected at least one"),
    ):
        with pytest.raises(ValueError, match=line):  # at once, and not at the first token
            npllama.generate_batch(model, prompts)
    ours = list(npllama.generate_batch(model, (prompt for prompt in ([1, 2], [3])), max_tokens=3))
    assert [row[1] for row in ours] == list(npllama.generate(model, [3], max_tokens=3))


@pytest.mark.parametrize("options", [{"max_tokens": -1}, {"seed": -1}])
def test_negative_counts_are_refused_at_once(options):
    (name,) = options
    for function, prompt in ((generate, [1]), (generate_batch, [[1]])):
        with pytest.raises(ValueError, match=f"{name} is -1, expected 0 or more"):
            function(npllama.load(), prompt, **options)


def test_a_cache_is_not_cut_to_less_than_nothing():
    with pytest.raises(ValueError, match="length is -1, expected 0 or more"):
        npllama.KVCache(npllama.load().config).truncate(-1)


def test_a_model_shows_itself_in_a_line_and_is_only_itself():
    model = npllama.load()
    assert repr(model) == f"<npllama.Model {model.path}: 2,794,944 parameters>"
    assert model == model
    assert model != npllama.load()


@pytest.fixture(params=[np.nan, np.inf], ids=str)
def overflowing(monkeypatch, request):
    """Make one logit NaN or infinite from the fourth new token on; of a batch, only in the last row."""

    def overflow(params, config, tokens, cache, **options):
        logits = forward(params, config, tokens, cache, **options)
        positions = np.arange(cache.length - logits.shape[-2], cache.length)
        rows = logits[-1] if logits.ndim == 3 else logits
        rows[positions >= len(PROMPT) + 2, 7] = request.param
        return logits

    monkeypatch.setattr(npllama.generation, "forward", overflow)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"lookup": 3}], ids=str)
def test_logits_that_are_no_numbers_name_their_step(overflowing, options):
    tokens, made = generate(MODEL, PROMPT, max_tokens=20, **options), []
    with pytest.raises(npllama.NpllamaError, match=r"^new token 4: of 131 logits 1 are (NaN|inf), expected numbers"):
        made.extend(tokens)
    assert len(made) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_name_their_prompt(overflowing, temperature):
    rows = generate_batch(MODEL, [PROMPT, PROMPT[1:]], 20, Sampling(temperature))
    made = []
    with pytest.raises(npllama.NpllamaError, match=r"^new token 4 of prompt 2: of 131 logits 1 are (NaN|inf)"):
        made.extend(rows)
    assert len(made) == 3


@pytest.mark.parametrize("lookup", [0, 4])
def test_a_repetition_penalty_is_on_all_that_came_before(lookup):
    """Compare with the definition, without a cache; also where the cache holds a part of it."""
    sampling, ids, expected = Sampling(repetition_penalty=1.5), list(PROMPT), []
    for _ in range(25):
        logits = forward(MODEL.params, CONFIG, ids)[-1]
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.5, logits[seen] / 1.5)
        ids.append(int(np.argmax(logits)))
        expected.append(ids[-1])
    assert [step.token for step in generate_steps(MODEL, PROMPT, 25, sampling, lookup=lookup)] == expected
    assert expected != list(generate(MODEL, PROMPT, 25))
    assert [row[0] for row in generate_batch(MODEL, [PROMPT, [5]], 25, sampling)] == expected
    cache = KVCache(CONFIG)
    prefill(MODEL, np.array(PROMPT[:-2]), cache)
    rest = PROMPT[-2:]
    with pytest.raises(ValueError, match=r"found 0 ids for 7 tokens in the cache: a repetition penalty needs them all"):
        generate(MODEL, rest, cache=cache, repetition_penalty=1.5)
    steps = generate_steps(MODEL, rest, 25, sampling, cache=cache, lookup=lookup, before=PROMPT[:-2])
    assert [step.token for step in steps] == expected
