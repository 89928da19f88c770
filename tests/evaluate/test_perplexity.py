"""Perplexity as llama.cpp defines it, and two models' predictions compared."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

import npllama.evaluate.perplexity
from npllama import Model, checkpoint, forward
from npllama.cli import main
from npllama.evaluate.perplexity import Mean, Perplexity, compare, make_windows, perplexity

from tiny import CONFIGS, random_params, random_tokens

CONFIG = CONFIGS["grouped"]
MODEL = Model(CONFIG, random_params(CONFIG, seed=1))
OTHER = Model(CONFIG, {name: x * np.float32(1.01) for name, x in MODEL.params.items()})
TOKENS = random_tokens(CONFIG, seed=2, shape=103).tolist()


def with_bos(model: Model, bos: int | None) -> Model:
    """Return the same model with a tokenizer that puts this BOS before a text, or has one it doesn't."""
    model = Model(model.config, model.params)
    model.__dict__["tokenizer"] = SimpleNamespace(bos_id=9 if bos is None else bos, adds_bos=bos is not None)
    return model


@pytest.mark.torch
@pytest.mark.parametrize("context", [3, 16, 17, 50])
@pytest.mark.parametrize("bos", [None, 5])
def test_it_is_what_torch_computes(context: int, bos: int | None) -> None:
    import torch

    pytest.importorskip("transformers", reason="transformers is not installed")
    import hf_reference as hf

    judge, other = (hf.hf_model(CONFIG, model.params) for model in (MODEL, OTHER))
    nll, kl, same_top = [], [], []
    for start in range(0, len(TOKENS) - context + 1, context):
        window = list(TOKENS[start : start + context])
        if bos is not None:
            window[0] = bos
        logprobs = [
            torch.log_softmax(torch.from_numpy(np.array(hf.hf_logits(m, np.array(window)))).double(), dim=-1)
            for m in (judge, other)
        ]
        for position in range(context // 2 + 1, context):  # the tokens that are scored, by their place in the window
            ours, base = (p[position - 1] for p in logprobs)
            nll.append(-ours[window[position]].item())
            kl.append(torch.nn.functional.kl_div(ours, base, reduction="sum", log_target=True).item())
            same_top.append((ours.argmax() == base.argmax()).item())

    found = compare(with_bos(MODEL, bos), OTHER, TOKENS, context)
    np.testing.assert_allclose(found.model.nll, nll, rtol=6e-6)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(found.same_top, same_top)
    alone = perplexity(with_bos(MODEL, bos), TOKENS, context)
    np.testing.assert_array_equal(alone.nll, found.model.nll)
    assert alone.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    # llama.cpp: the variance is E[x²] - E[x]², the error sqrt(variance / (count - 1)) · perplexity.
    variance = np.mean(np.square(nll)) - np.mean(nll) ** 2
    assert alone.error == pytest.approx(math.sqrt(variance / (len(nll) - 1)) * alone.value, rel=1e-4)


def test_a_uniform_model_has_the_vocabulary_s_size() -> None:
    params = {name: x * 0 for name, x in MODEL.params.items()}
    found = perplexity(Model(CONFIG, params), TOKENS, 16)
    assert found.value == pytest.approx(CONFIG.vocab_size)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert len(found.nll) == 6 * 7  # six whole windows; of 16 tokens, 9 to 15 are scored


def test_windows() -> None:
    assert make_windows(MODEL, range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_windows(with_bos(MODEL, 5), range(11), 4).tolist() == [[5, 1, 2, 3], [5, 5, 6, 7]]
    assert make_windows(with_bos(MODEL, None), range(8), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    tokens = np.arange(8)
    make_windows(with_bos(MODEL, 5), tokens, 4)
    assert tokens.tolist() == list(range(8))  # the caller's are not written to


@pytest.mark.parametrize(("chunk", "rows"), [(1, 64), (3, 2), (512, 1)])
def test_blocks_do_not_matter(chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = perplexity(MODEL, TOKENS, 50).nll
    monkeypatch.setattr(npllama.evaluate.perplexity, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(npllama.evaluate.perplexity, "ROWS", rows)
    np.testing.assert_allclose(perplexity(MODEL, TOKENS, 50).nll, expected, rtol=5e-6)


def test_only_what_is_scored_meets_the_output_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def watched(*args, **options):
        logits = forward(*args, **options)
        widths.append(len(logits))
        return logits

    monkeypatch.setattr(npllama.evaluate.perplexity, "forward", watched)
    monkeypatch.setattr("npllama.generation.forward", watched)
    perplexity(MODEL, TOKENS[:20], 20)
    assert widths == [1, 9]


def test_a_model_is_no_distance_from_itself() -> None:
    found = compare(MODEL, MODEL, TOKENS, 16)
    assert np.abs(found.kl).max() == 0
    assert found.same_top.all()
    np.testing.assert_array_equal(found.model.nll, found.base.nll)


def test_the_divergence_is_from_the_base() -> None:
    one, other = compare(MODEL, OTHER, TOKENS, 16), compare(OTHER, MODEL, TOKENS, 16)
    assert (one.kl > 0).all()
    assert not np.allclose(one.kl, other.kl, rtol=1e-3)
    np.testing.assert_array_equal(one.model.nll, other.base.nll)


def test_means() -> None:
    assert Mean.of(np.array([1.0, 2.0, 3.0, 6.0])) == Mean(3.0, pytest.approx(math.sqrt(3.5 / 3)))
    assert Mean.of(np.array([2.0])) == Mean(2.0, 0.0)
    assert Perplexity(np.array([1e4])).value == math.inf


def test_progress_counts_tokens() -> None:
    done = []
    perplexity(MODEL, TOKENS, 16, done.append)
    assert done == [16] * 6


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        (TOKENS[:15], 16, "the text has 15 tokens, expected at least one window of 16"),
        (TOKENS, 2, "a window of 2 tokens: expected 3 to 512, the model's context"),
        (TOKENS, 513, "a window of 513 tokens: expected 3 to 512"),
        ([*TOKENS[:9], 131], 10, "token id 131 is outside the vocabulary"),
    ],
)
def test_bad_input_is_refused(tokens: list[int], context: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, tokens, context)
    with pytest.raises(ValueError, match=message):
        compare(MODEL, OTHER, tokens, context)


def test_logits_that_are_no_numbers_are_no_perplexity() -> None:
    params = dict(MODEL.params)
    params["norm.weight"] = np.full_like(params["norm.weight"], np.nan)
    with pytest.raises(ValueError, match="are NaN, expected numbers"):
        perplexity(Model(CONFIG, params), TOKENS, 16)


def test_models_of_different_vocabularies_do_not_compare() -> None:
    config = CONFIGS["grouped"].__class__.from_dict({**CONFIG.to_dict(), "vocab_size": 130})
    with pytest.raises(ValueError, match="the models' vocabularies have 131 and 130 tokens"):
        compare(MODEL, Model(config, random_params(config, seed=1)), TOKENS, 16)


# ------------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_tiktoken_file, tiny_sentencepiece_file):
    """Write model directories of one tokenizer, the second with weights a little larger, and one of another."""
    path = tmp_path_factory.mktemp("models")
    for name, tokenizer, n, factor in [
        ("one", tiny_tiktoken_file, 532, 1),
        ("other", tiny_tiktoken_file, 532, 1.01),
        ("foreign", tiny_sentencepiece_file, 532, 1),
        ("bare", None, 532, 1),
    ]:
        config = CONFIG.__class__.from_dict({**CONFIG.to_dict(), "vocab_size": n})
        with checkpoint.create(path / name, config, "float32", source={"kind": "test"}) as writer:
            for parameter, array in random_params(config, seed=1).items():
                writer.add(parameter, array * np.float32(factor))
            if tokenizer:
                writer.add_file("tokenizer.model", tokenizer)
    (path / "text.txt").write_bytes("hello hello wor é\r\n".encode() * 30)
    (path / "latin1.txt").write_bytes("hello é".encode("latin-1"))
    return path


def test_command(directories, capsys) -> None:
    assert main(["perplexity", "-m", str(directories / "one"), str(directories / "text.txt"), "--context", "32"]) == 0
    out, err = capsys.readouterr()
    model = npllama.load(directories / "one")
    text = (directories / "text.txt").read_bytes().decode()
    assert "\r\n" in text
    expected = perplexity(model, model.tokenizer.encode(text, bos=True), 32)
    assert out == f"perplexity          {expected.value:.4f} +/- {expected.error:.4f}\n"
    assert f"{len(expected.nll):,} of {len(expected.nll) // 15 * 32:,} tokens scored at " in err
    assert err.count("\n") == 1


def test_a_terminal_sees_a_bar(directories, capsys, monkeypatch) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    command = ["perplexity", "-m", str(directories / "one"), str(directories / "text.txt"), "--context", "32"]
    main(command)
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    main(command)
    out, err = capsys.readouterr()
    assert out == expected
    assert "%|" in err


def test_command_with_a_base(directories, capsys) -> None:
    names = ["-m", str(directories / "one"), "--base", str(directories / "other")]
    assert main(["perplexity", *names, str(directories / "text.txt"), "--context", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines] == [
        *["perplexity", "base perplexity", "mean KL divergence"],
        *["1 %", "5 %", "10 %", "50 %", "90 %", "95 %", "99 %", "99.9 %", "100 %", "same top token"],
    ]
    values = [float(line[20:].split()[0]) for line in lines]
    assert values[3:12] == sorted(values[3:12])
    assert 0 < values[2] < values[11]
    assert 50 < values[12] <= 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-m", "one", "none.txt"], "none.txt: No such file"),
        (["-m", "one", "latin1.txt"], "latin1.txt: found the byte 0xe9 at 6, expected UTF-8"),
        (["-m", "bare", "text.txt"], "has no tokenizer"),
        (["-m", "one", "text.txt"], "text.txt has 241 tokens, expected at least one window of 512 (--context)"),
        (["-m", "one", "text.txt", "--context", "0"], "a window of 0 tokens"),
        (["-m", "one", "text.txt", "--base", "foreign", "--context", "32"], "tokenize text.txt differently"),
    ],
)
def test_command_refuses(directories, capsys, monkeypatch, args: list[str], message: str) -> None:
    monkeypatch.chdir(directories)
    assert main(["perplexity", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
