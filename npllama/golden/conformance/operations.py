"""Define the operations of the suite: name, arguments and results of a port's function, and npllama's implementation.

A `Program` computes them in a precision, and with a mistake where a wrong result is needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import model, ops
from ...cache import KVCache
from ...config import Config, LinearRopeScaling, RopeScaling
from ...engine import linear
from ...engine.weights import Weight, widen
from ...errors import NpllamaError
from ...sampling import Sampling, probabilities
from ...scope import Ops
from ..mistakes import Mistake, Port, to_halves, to_pairs
from ..precision import Precision, round_bfloat16, round_float16
from .chat_templates import as_outputs, rendered
from .chats import as_array, ids_of, wrong_ids
from .config_files import CONSTANTS, config_files, constants_of
from .model_files import model_at
from .texts import TEXTS, TOKENIZERS, ids

Arguments = Mapping[str, Any]  # arrays and constants by name
Outputs = dict[str, np.ndarray]
Compute = Callable[["Program", Arguments], "np.ndarray | tuple[np.ndarray, ...]"]

# Constants that a case does not state; none of its operations reads them.
BASE = Config(
    dim=96,
    n_layers=1,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=64,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=131072,
    tied_embeddings=False,
)


class DoesNotApply(NpllamaError):
    """Raised when the case can't show the mistake."""


@dataclass(frozen=True, eq=False)
class Program:
    """Compute the operations as npllama does in a precision, or with one mistake."""

    precision: Precision
    mistake: Mistake | None = None

    @functools.cached_property
    def ops(self) -> Ops:
        """Return its operations, the wrong ones included."""
        made = self.precision.ops or model.PLAIN
        return replace(made, **self.mistake.ops) if self.mistake else made

    def constants(self, **stated: Any) -> Config:
        """Return the constants that it computes with, given those that the case states."""
        config = replace(BASE, **stated)
        if self.mistake is None:
            return config
        if not self.mistake.applies(config):
            raise DoesNotApply
        try:
            return self.mistake.constants(config)
        except (TypeError, ValueError) as error:  # the config has no scaling
            raise DoesNotApply from error

    def weight(self, weight: np.ndarray) -> Weight:
        """Return the weight matrix that it computes with."""
        if self.mistake is None or self.mistake.parameters is None:
            return weight
        try:
            return self.mistake.parameters("output.weight", {"output.weight": weight}, BASE)
        except KeyError as error:  # the mistake uses another weight, which a single operation doesn't have
            raise DoesNotApply from error

    def passes(
        self,
        params: Mapping[str, np.ndarray],
        config: Config,
        passes: Sequence[np.ndarray],
        kept: Sequence[Any] = (),
        positions: np.ndarray | None = None,
        activation: str = "logits",
    ) -> np.ndarray:
        """Return an activation of successive forward passes with one cache, concatenated; NaN where a token is padding.

        kept       how many slots of the cache, or of each of its rows, are kept before each pass; None for all
        positions  of the tokens, instead of 0, 1, ...; for a single pass
        """
        if self.mistake is not None and not self.mistake.applies(config):
            raise DoesNotApply
        names, computed = [self.mistake.name] if self.mistake else [], self.precision
        if self.mistake is not None and self.mistake.precision != "float32":
            computed = Precision(self.mistake.precision)
        port = Port(*names, computed=computed)
        if positions is not None:
            rotation, given = port.made.rope_rotation, positions

            def rope_rotation(_: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, ...]:
                return rotation(given, frequencies)

            port = Port(*names, computed=computed, rope_rotation=rope_rotation)
        cache, found = KVCache(config, passes[0].shape[:-1]), []
        truncate = _wrong(self, "truncate", KVCache.truncate)

        def tap(name: str, x: np.ndarray) -> np.ndarray:
            if name == activation:
                found.append(np.where((tokens >= 0)[..., None], x, np.asarray(np.nan, x.dtype)))
            return x

        for i, tokens in enumerate(passes):
            if i < len(kept) and kept[i] is not None:
                truncate(cache, kept[i])
            rows = (tokens >= 0).any(axis=-1)
            port.forward(params, config, tokens, cache if rows.all() else cache.only(rows), tap)
        return np.concatenate(found, axis=-2)


@dataclass(frozen=True)
class Operation:
    """Describe one operation.

    arguments  names of the function's arguments, in order
    outputs    names of its results; several are returned as a tuple
    compute    npllama's implementation
    text       formula and shapes
    exact      it doesn't round: results are equal in every precision
    rounded    its result is rounded to 16 bits in a 16-bit precision
    relative   its numbers differ much in size, so that each is compared relative to its own magnitude
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Compute
    text: str
    exact: bool = False
    rounded: bool = True
    relative: bool = False

    @property
    def source(self) -> str:
        """Return the paper, standard or program that defines it."""
        return SOURCES[self.name]

    @property
    def signature(self) -> str:
        """Return the signature of a port's function."""
        return f"{self.name}({', '.join(self.arguments)}) -> {', '.join(self.outputs)}"

    def inputs(self, arguments: Arguments, precision: Precision) -> list[Any]:
        """Return the arguments for a port's function: copies of arrays, floats in the precision's dtype."""
        dtype = precision.dtype if not self.exact else np.dtype(np.float32)

        def given(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                return x.astype(dtype if x.dtype == np.float32 else x.dtype)
            if isinstance(x, Mapping):
                return {key: given(value) for key, value in x.items()}
            return copy.deepcopy(x)

        return [given(arguments[name]) for name in self.arguments]

    def run(self, program: Program, arguments: Arguments) -> Outputs:
        """Compute it."""
        given = dict(zip(self.arguments, self.inputs(arguments, program.precision), strict=True))
        with np.errstate(all="ignore"):
            found = self.compute(program, given)
        found = found if isinstance(found, tuple) else (found,)
        if self.rounded and not self.exact:
            found = tuple(program.precision.round(x) for x in found)
        return dict(zip(self.outputs, found, strict=True))


def scaling_of(value: Mapping[str, Any] | None) -> RopeScaling | LinearRopeScaling | None:
    """Return the scaling that a case's JSON states: null, or an object of `factor` alone or of all four."""
    if value is None:
        return None
    return LinearRopeScaling(**value) if set(value) == {"factor"} else RopeScaling(**value)


def _doc(function: Callable) -> str:
    return inspect.getdoc(function) or ""


def _frequencies(p: Program, head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> np.ndarray:
    config = p.constants(rope_theta=theta, rope_scaling=scaling_of(scaling))
    return p.ops.rope_frequencies(head_dim, config.rope_theta, config.rope_scaling, p.precision.dtype)


def _rope_at(p: Program, a: Arguments) -> np.ndarray:
    frequencies = _frequencies(p, a["x"].shape[-1], a["theta"], a["scaling"])
    return p.ops.rope(a["x"], *p.ops.rope_rotation(a["positions"], frequencies))


def _linear(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.linear(a["x"], p.weight(a["weight"]))


def _widened(p: Program, a: Arguments, weight: np.ndarray) -> np.ndarray:
    return p.ops.linear(a["x"], p.weight(weight.astype(p.precision.dtype)))


def _silu(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.swiglu(a["x"], np.ones_like(a["x"]))


def _mask(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.causal_mask(a["query_positions"], a["slot_positions"], p.precision.dtype)


def _rms_norm(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.rms_norm(a["x"], a["weight"], p.constants(norm_eps=a["eps"]).norm_eps)


def _wrong(p: Program, name: str, right: Callable[..., Any]) -> Callable[..., Any]:
    """Return the program's version of a function that is not an operation of a pass."""
    return p.mistake.outside.get(name, right) if p.mistake else right


def _of(*rows: Any, **facts: Any) -> Operation:
    name, arguments, outputs, compute, text = rows
    return Operation(name, tuple(arguments.split()), tuple(outputs.split()), compute, text, **facts)


HALF_SPLIT = """\
Rotate each pair (x[j], x[j + K/2]) of a head's numbers: RoPE in Hugging Face's order of a head.

y[j] + i·y[j + K/2] = (x[j] + i·x[j + K/2]) · e^(i·m·θ_j)        x [..., T, heads, K], cos, sin [..., T, 1, K/2] -> like x"""
ROPE_AT = """\
Rotate each adjacent pair of a head's numbers by the angles of its position: rope_frequencies, rope_rotation and rope in one.

y[2j] + i·y[2j+1] = (x[2j] + i·x[2j+1]) · e^(i·m·θ_j)        x [T, heads, K], positions [T] -> like x"""
LINEAR = """\
Multiply by a weight matrix as torch.nn.Linear stores it.

y = x Wᵀ        x [..., in], weight [out, in] -> [..., out]"""
OF_BFLOAT16 = """\
Multiply by a weight matrix that is stored in bfloat16: the upper 16 bits of a float32, given as uint16.

y = x Wᵀ        x [..., in], weight uint16 [out, in] -> [..., out]"""
OF_INT8 = """\
Multiply by a weight matrix that is stored in 8 bits, with a scale for each row.

y = x Wᵀ,  W[i, j] = weight[i, j] · scale[i]        x [..., in], weight int8 [out, in], scale [out] -> [..., out]"""
OF_GROUPS = """\
Multiply by a weight matrix that is stored in 8 bits, with a scale for each group of 32 numbers of a row, as Q8_0 has.

y = x Wᵀ,  W[i, j] = weight[i, j] · scale[i, j // 32]

x [..., in], weight int8 [out, in], scale [out, in / 32] -> [..., out]"""

L1 = {
    operation.name: operation
    for operation in (
        _of("embed", "tokens weight", "y", lambda p, a: p.ops.embed(a["tokens"], a["weight"]), _doc(linear.embed), exact=True),
        _of("linear", "x weight", "y", _linear, LINEAR),
        _of("linear_bfloat16", "x weight", "y", lambda p, a: _widened(p, a, widen(a["weight"])), OF_BFLOAT16),
        _of(
            *("linear_int8", "x weight scale", "y"),
            lambda p, a: _widened(p, a, a["weight"] * _wrong(p, "scale_of_rows", _scale_of_rows)(a["scale"], a["weight"])),
            OF_INT8,
        ),
        _of(
            *("linear_groups", "x weight scale", "y"),
            lambda p, a: _widened(p, a, a["weight"] * _wrong(p, "scale_of_groups", _scale_of_groups)(a["scale"], a["weight"])),
            OF_GROUPS,
        ),
        _of("rms_norm", "x weight eps", "y", _rms_norm, _doc(ops.rms_norm)),
        _of("softmax", "x", "y", lambda p, a: p.ops.softmax(a["x"]), _doc(ops.softmax)),
        _of("silu", "x", "y", _silu, _doc(ops.silu)),
        _of("swiglu", "gate up", "y", lambda p, a: p.ops.swiglu(a["gate"], a["up"]), _doc(ops.swiglu)),
        _of(
            *("rope_frequencies", "head_dim theta scaling", "frequencies"),
            lambda p, a: _frequencies(p, a["head_dim"], a["theta"], a["scaling"]),
            _doc(ops.rope_frequencies),
            rounded=False,
            relative=True,
        ),
        _of(
            *("rope_rotation", "positions frequencies", "cos sin"),
            lambda p, a: p.ops.rope_rotation(a["positions"], a["frequencies"]),
            _doc(ops.rope_rotation),
            rounded=False,
        ),
        _of("rope", "x cos sin", "y", lambda p, a: p.ops.rope(a["x"], a["cos"], a["sin"]), _doc(ops.rope)),
        _of(
            *("rope_half_split", "x cos sin", "y"),
            lambda p, a: to_halves(p.ops.rope(to_pairs(a["x"]), a["cos"], a["sin"])),
            HALF_SPLIT,
        ),
        _of("rope_at", "x positions theta scaling", "y", _rope_at, ROPE_AT),
        _of("causal_mask", "query_positions slot_positions", "mask", _mask, _doc(ops.causal_mask), exact=True),
        _of(
            *("attention_scores", "q keys mask", "scores"),
            lambda p, a: p.ops.attention_scores(a["q"], a["keys"], a["mask"]),
            _doc(ops.attention_scores),
        ),
        _of(
            *("attention_heads", "weights values", "heads"),
            lambda p, a: p.ops.attention_heads(a["weights"], a["values"]),
            _doc(ops.attention_heads),
        ),
        _of(
            *("round_bfloat16", "x", "y"),
            lambda p, a: _wrong(p, "round_bfloat16", round_bfloat16)(a["x"]),
            _doc(round_bfloat16),
            exact=True,
        ),
        _of(
            *("round_float16", "x", "y"),
            lambda p, a: _wrong(p, "round_float16", round_float16)(a["x"]),
            _doc(round_float16),
            exact=True,
        ),
    )
}


def _scale_of_rows(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spread the scales of rows over a matrix.    scale [out], weight [out, in] -> [out, 1]"""
    return scale[:, None]


def _scale_of_groups(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spread the scales of groups over a matrix.    scale [out, in / 32], weight [out, in] -> [out, in]"""
    return np.repeat(scale, weight.shape[-1] // scale.shape[-1], axis=-1)


def _attention(p: Program, a: Arguments) -> np.ndarray:
    r = p.precision.round
    weights = r(p.ops.softmax(r(p.ops.attention_scores(a["q"], a["keys"], a["mask"]))))
    return p.ops.attention_heads(weights, a["values"])


def _feed_forward(p: Program, a: Arguments) -> np.ndarray:
    r, prefix = p.precision.round, "layers.0.feed_forward."
    params: Mapping[str, Weight] = {f"{prefix}{name}.weight": a[name] for name in ("w1", "w2", "w3")}
    if p.mistake is not None:
        params = p.mistake.params(params, BASE)
    try:
        gate, up = (r(x) for x in p.ops.linears(a["x"], params[f"{prefix}w1.weight"], params[f"{prefix}w3.weight"]))
        return p.ops.linear(r(p.ops.swiglu(gate, up)), params[f"{prefix}w2.weight"])
    except KeyError as error:
        raise DoesNotApply from error


def _block(p: Program, a: Arguments) -> np.ndarray:
    """Compute a layer as the first of a model whose embedding is x."""
    if p.mistake is not None and set(p.mistake.at) <= {"tok_embeddings", "norm", "logits"} and p.mistake.precision == "float32":
        raise DoesNotApply  # outside of a block
    T = len(a["x"])
    config = replace(Config.from_dict(a["config"]), n_layers=1, vocab_size=T, tied_embeddings=True)
    params = {f"layers.0.{name}": x for name, x in a["params"].items()}
    params |= {"tok_embeddings.weight": a["x"], "norm.weight": np.ones(config.dim, a["x"].dtype)}
    return p.passes(params, config, [np.arange(T)], positions=a["positions"], activation="layers.0.out")


def _resolve_config(p: Program, a: Arguments) -> np.ndarray:
    file = config_files()[a["path"]]
    config = file.config
    if p.mistake is not None:
        if not p.mistake.applies(config) or p.mistake.at == ("logits",):  # a missing layer is not a wrong constant
            raise DoesNotApply
        try:
            config = p.mistake.outside.get("resolve_config", p.mistake.constants)(config)
        except (TypeError, ValueError) as error:
            raise DoesNotApply from error
    return constants_of(config).astype(np.float32 if file.path.endswith("gguf") else np.float64) * file.known


def _probabilities(p: Program, a: Arguments) -> np.ndarray:
    logits, temperature, top_k, top_p, min_p = a["logits"], a["temperature"], a["top_k"], a["top_p"], a["min_p"]
    if p.mistake is not None and (wrong := p.mistake.outside.get("probabilities")):
        return wrong(logits, temperature, top_k, top_p, min_p)
    if p.mistake is not None and p.mistake.sampling is not None:
        if top_k or min_p or not temperature:
            raise DoesNotApply
        return p.mistake.sampling(logits, temperature, top_p)
    return probabilities(logits, Sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p))


def _chat(p: Program, a: Arguments) -> np.ndarray:
    if p.mistake is None:
        return as_array(ids_of(a["format"], a["messages"], a["specials"]))
    if (wrong := p.mistake.outside.get("chat")) is None:
        raise DoesNotApply
    return as_array(wrong_ids(wrong, a["format"], a["messages"], a["specials"]))


def _chat_template(p: Program, a: Arguments) -> tuple[np.ndarray, np.ndarray]:
    text = rendered(a["template"], a["messages"], p.mistake.name if p.mistake else "right")
    if text is None:
        raise DoesNotApply
    return as_outputs(text, a["specials"])


def _encode(p: Program, a: Arguments) -> np.ndarray:
    tokenizer = next(name for name, (_, sha256) in TOKENIZERS.items() if sha256 == a["tokenizer"])
    text = next(name for name, (_, text) in TEXTS.items() if text == a["text"])
    found = ids(tokenizer, text, p.mistake.name if p.mistake else "right")
    if found is None:
        raise DoesNotApply
    return found


def _forward_file(p: Program, a: Arguments) -> np.ndarray:
    tiny = model_at(a["path"])
    params = {name: x.astype(p.precision.dtype) for name, x in tiny.params.items()}
    return p.passes(params, tiny.config, [a["tokens"]])


def _forward(p: Program, a: Arguments) -> np.ndarray:
    passes = a["passes"] if "passes" in a else [a["tokens"]]
    tokens = [np.asarray(part, np.int64) for part in passes]
    return p.passes(a["params"], Config.from_dict(a["config"]), tokens, a.get("kept", ()), a.get("positions"))


RESOLVE_CONFIG = f"""\
Read a file that states a model's constants: config.json, params.json, or a .gguf file without weights.

Return a vector of {", ".join(CONSTANTS)}.
In Python a mapping of these names may be returned, with `rope_scaling` null or a mapping. tied_embeddings is 0 or 1. The four
numbers of a scaling are 0 without one; in a linear one all but the factor are 0.        -> [14]"""
PROBABILITIES = """\
Return the distribution that the next token is drawn from.

p = softmax(logits / temperature); then top_k keeps the most likely (0: all), top_p the fewest of them that together reach that
share of the remaining probability, min_p those at least min_p times as likely as the likeliest. The others get 0, and the sum
is 1 again. At temperature 0 the largest logit gets all the probability.        logits [V] -> [V]"""
ENCODE = """\
Return the ids of a text in a published tokenizer, without BOS or EOS.

tokenizer: the sha256 of its file. Raise NotImplementedError for a tokenizer that you don't have.        -> [n]"""
CHAT = """\
Write a conversation in a chat format, up to where the answer begins.

format: one of llama3, llama2, chatml, mistral, zephyr. messages: a list of {"role", "content"}. specials: the special tokens.
Return the ids of the prompt in a vocabulary of bytes: a text's UTF-8 bytes, and 256 + n for special token n. Tags such as
[INST]
and <<SYS>> of Llama 2 and Mistral are text unless they are among the specials.        -> [n]"""
CHAT_TEMPLATE = """\
Render a conversation with a Jinja chat template, as Hugging Face's apply_chat_template does with add_generation_prompt.

variables: the special tokens that the template refers to by name. messages, specials and ids as in `chat`.
Return the text as UTF-8 bytes (in Python a str will do), and its ids.        -> [bytes], [n]"""
ATTENTION = """\
Average the values of the tokens up to each token, weighted by how well its query matches their keys, as a fused kernel does.

heads = softmax(q·k / sqrt(K) + mask) v

q [..., T, H, K], keys, values [..., G, S, K], mask [..., 1, T, S] -> [..., T, H, K]; query head h uses key head h // (H/G)"""
FEED_FORWARD = """\
Transform each token by itself.

y = w2 (silu(w1 x) ⊙ w3 x)        x [T, D], w1, w3 [F, D], w2 [D, F] -> [T, D]"""
BLOCK = """\
Apply one layer; params has its weights by Meta's names, config its constants. RoPE pairs are adjacent.

h = x + attention(rms_norm(x));  out = h + feed_forward(rms_norm(h))        x [T, D], positions [T] -> [T, D]"""
FORWARD = """\
Return the logits of the token that follows each token; params has the weights by Meta's names, config the constants.

tokens [T] -> [T, V]"""
FORWARD_FILE = """\
Load a model and return the logits of the token that follows each token.

path: a folder with config.json and model.safetensors, or with params.json and consolidated.00.pth, or a .gguf file. Raise
NotImplementedError for a form that your loader can't read.        tokens [T] -> [T, V]"""
FORWARD_AT = """\
Return the logits of tokens at given positions, each of which sees itself and the tokens before it.

tokens, positions [T] -> [T, V]"""
FORWARD_PASSES = """\
Return the logits of several forward passes, concatenated along T, that share a cache of keys and values.

passes: a list of token ids [..., T]. An id of -1 is padding: its logits may be anything, and it shifts no position. A row that
is all padding takes no part in the pass, and no slots.
kept: for each pass the number of slots (padding included) to which the cache is cut back before it, or a list of one number per
row; null, or None, keeps all.
Raise NotImplementedError for what your cache can't do.        -> [..., T₁ + T₂ + ..., V]"""

BEYOND = {
    operation.name: operation
    for operation in (
        _of("resolve_config", "path", "constants", _resolve_config, RESOLVE_CONFIG, rounded=False, relative=True),
        _of(
            *("probabilities", "logits temperature top_k top_p min_p", "p", _probabilities, PROBABILITIES),
            rounded=False,
            relative=True,
        ),
        _of("encode", "tokenizer text", "ids", _encode, ENCODE, exact=True),
        _of("chat", "format messages specials", "ids", _chat, CHAT, exact=True),
        _of("chat_template", "template messages variables specials", "text ids", _chat_template, CHAT_TEMPLATE, exact=True),
        _of("attention", "q keys values mask", "heads", _attention, ATTENTION),
        _of("feed_forward", "x w1 w2 w3", "y", _feed_forward, FEED_FORWARD),
        _of("block", "x positions params config", "out", _block, BLOCK),
        _of("forward", "params config tokens", "logits", _forward, FORWARD),
        _of("forward_file", "path tokens", "logits", _forward_file, FORWARD_FILE),
        _of("forward_passes", "params config passes kept", "logits", _forward, FORWARD_PASSES),
        _of("forward_at", "params config tokens positions", "logits", _forward, FORWARD_AT),
    )
}
OPERATIONS = {**L1, **BEYOND}

VASWANI = "Vaswani et al. 2017, arXiv:1706.03762"
GROUPS = f"{VASWANI}; Ainslie et al. 2023, arXiv:2305.13245, for grouped queries"
SU = "Su et al. 2021, arXiv:2104.09864"
LLAMA = "Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783"
SOURCES = {
    "embed": "torch.nn.Embedding",
    "linear": "torch.nn.Linear",
    "linear_bfloat16": "torch.nn.Linear; bfloat16 is the upper half of an IEEE 754 binary32",
    "linear_int8": "torch.nn.Linear; Dettmers et al. 2022, arXiv:2208.07339, for a scale of each row",
    "linear_groups": "torch.nn.Linear; block_q8_0 in llama.cpp's ggml-common.h",
    "rms_norm": "Zhang & Sennrich 2019, arXiv:1910.07467",
    "softmax": "torch.nn.functional.softmax",
    "silu": "Elfwing et al. 2017, arXiv:1702.03118",
    "swiglu": "Shazeer 2020, arXiv:2002.05202",
    "rope_frequencies": f"{SU}; apply_scaling in Meta's llama-models for Llama 3.1",
    "rope_rotation": SU,
    "rope": SU,
    "rope_half_split": f"{SU}; rotate_half in Hugging Face transformers' modeling_llama.py",
    "rope_at": SU,
    "causal_mask": VASWANI,
    "attention_scores": GROUPS,
    "attention_heads": GROUPS,
    "round_bfloat16": "IEEE 754-2019, roundTiesToEven, to the upper half of a binary32",
    "round_float16": "IEEE 754-2019, roundTiesToEven, to binary16",
    "resolve_config": "Hugging Face transformers' LlamaConfig; Meta's params.json; the GGUF specification",
    "probabilities": "Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751 (top-p); "
    "Nguyen et al. 2024, arXiv:2407.01082 (min-p)",
    "encode": "the tokenizer's own file, as tiktoken, sentencepiece or Hugging Face tokenizers read it",
    "chat": "the formats that the models' publishers document",
    "chat_template": "apply_chat_template of Hugging Face transformers",
    "attention": GROUPS,
    "feed_forward": "Shazeer 2020, arXiv:2002.05202",
    "block": LLAMA,
    "forward": LLAMA,
    "forward_file": f"{LLAMA}; the formats of safetensors, GGUF and torch",
    "forward_passes": LLAMA,
    "forward_at": LLAMA,
}
