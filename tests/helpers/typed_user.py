"""A typed user's program, which test_typing.py checks with mypy. It is never run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import npllama
from npllama.golden.compare import compare
from npllama.model import PLAIN
from npllama.scope import Ops, Scope


def run(folder: Path) -> str:
    model = npllama.load(folder, dtype="float32")
    config: npllama.Config = model.config
    tokenizer = model.tokenizer
    if tokenizer is None:
        return f"{config.dim} wide, with {npllama.n_parameters(config):,} parameters"
    ids: list[int] = tokenizer.encode("text", bos=True)
    cache = npllama.KVCache(config)
    logits: np.ndarray = npllama.forward(model.params, config, ids, cache, last_only=True)
    sampling = npllama.Sampling(temperature=0.8, top_p=0.95)
    for row in npllama.generate_batch(model, [ids, np.array(ids)], max_tokens=4, sampling=sampling):
        ended: list[bool] = [id is None for id in row]
    for step in npllama.generate_steps(model, ids, 4, sampling, cache=cache):
        top: list[tuple[int, float]] = step.top(5)
    completion: npllama.Completion = npllama.complete(model, "text", max_tokens=4, stop=["\n"], logprobs=2)
    logprobs: list[npllama.TokenLogprobs] | None = completion.logprobs
    texts: list[str] = [done.text for done in npllama.complete(model, ["one", "two"], temperature=0.5, seed=3)]
    pieces: list[str] = list(npllama.complete(model, ids, stop=texts, logprobs=len(logprobs or []), stream=True))
    chat = npllama.Conversation(model, "Be brief.", sampling=sampling)
    pieces += [chat.say("Hello"), *chat.stream("And now?"), chat.messages[-1]["content"]]
    made: list[int] = list(npllama.generate(model, np.array(ids), max_tokens=len(pieces) + len(top) + len(ended) + len(logits)))
    return tokenizer.decode(made)


def port(folder: Path, tokens: list[int]) -> bool:
    model = npllama.load(folder)
    seen: dict[str, np.ndarray] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        seen[name] = x
        return x

    precision = npllama.Precision("bfloat16", "hf")
    precision.forward(model.params, model.config, tokens, tap=tap)
    npllama.write_trace(model, tokens, folder / "trace", precision=precision)
    trace: npllama.Trace = npllama.read_trace(folder / "trace")
    return compare(trace.path, folder / "mine").exit_status == 0


def own_operations(model: npllama.Model, tokens: list[int]) -> np.ndarray:
    def softmax(x: np.ndarray) -> np.ndarray:
        return PLAIN.softmax(x - x.max())

    def feed_forward(x: np.ndarray, s: Scope) -> np.ndarray:
        gate, up = s.ops.linears(s.ops.rms_norm(x, s["ffn_norm"], s.config.norm_eps), s["w1"], s["w3"])
        return s.ops.linear(s.ops.swiglu(gate, up), s["w2"])

    ops: Ops = replace(PLAIN, softmax=softmax, feed_forward=feed_forward)
    return npllama.forward(model.params, model.config, tokens, ops=ops)
