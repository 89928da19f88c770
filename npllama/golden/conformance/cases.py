"""List the cases: inputs chosen so that right and wrong programs differ.

Sizes that a program may confuse differ: K² is not D, H/G is not G. Inputs are exact in every precision (numbers.py)
unless the purpose says otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...cache import PADDING
from .chat_templates import TEMPLATES, recorded_texts
from .chats import CONVERSATIONS, SPECIALS, messages_of
from .config_files import config_files
from .model_files import files_of, forms_of, model_at, path_of
from .models import GROUPED, MODELS, SCALING, params_of
from .numbers import Floats, Integers
from .operations import BEYOND, L1, OPERATIONS, Operation, Outputs, Program
from .texts import TEXTS, TOKENIZERS

# The suite's rounding profiles, each with the precisions in which a correct port may round.
PROFILES: dict[str, tuple[str, ...]] = {
    "float64": ("float64",),
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "bfloat16-hf"),
    "float16": ("float16", "float16-hf"),
    "float16-cache": ("float16-cache",),
    "int8-activations": tuple(f"int8-activations{size}{more}" for size in ("", "-256") for more in ("", "+float16-cache")),
}
T, D, F, H, G, K = 5, 80, 48, 6, 2, 16
ALL: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """Describe one call of an operation.

    level, operation, name   its path: L1/rms_norm/small_rows
    purpose                  what it tests
    arguments                arrays and constants by name
    profiles                 the rounding profiles it applies to; empty: all
    """

    level: str
    operation: Operation
    name: str
    purpose: str
    arguments: Mapping[str, Any]
    profiles: tuple[str, ...] = field(default=ALL)

    @property
    def path(self) -> str:
        """Return the path of its files, in the suite and among a port's results."""
        return f"{self.level}/{self.operation.name}/{self.name}"

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arguments that are arrays, and the parameters by their own names."""
        found = {name: x for name, x in self.arguments.items() if isinstance(x, np.ndarray)}
        return found | self.arguments.get("params", {})

    @property
    def constants(self) -> dict[str, Any]:
        """Return the other arguments, which JSON can hold."""
        return {name: x for name, x in self.arguments.items() if name not in self.arrays and name != "params"}

    def run(self, program: Program) -> Outputs:
        """Compute the outputs with a program, which may be wrong."""
        return self.operation.run(program, self.arguments)

    @property
    def files(self) -> dict[str, bytes]:
        """Return the files that its argument `path` names, by their paths in the suite."""
        path = self.arguments.get("path", "")
        if path in config_files():
            return {path: config_files()[path].data}
        return files_of(model_at(path), next(f for f in FORMS if path_of(model_at(path), f) == path)) if path else {}

    def sha256(self) -> str:
        """Return the hash of the inputs: each one's name, type and shape, and its little-endian bytes or its text."""
        digest = hashlib.sha256()
        for name, x in (self.constants | self.arrays).items():
            if isinstance(x, np.ndarray):
                little = x.astype(x.dtype.newbyteorder("<"))
                digest.update(f"{name} {x.dtype.name} {list(x.shape)}\n".encode() + little.tobytes())
            else:
                digest.update(f"{name} {x!a}\n".encode())  # ASCII: what repr() escapes depends on the version of Unicode
        return digest.hexdigest()


def _case(level: str, operation: Operation, name: str, purpose: str, *profiles: str, **arguments: Any) -> Case:
    """Make a case; its random arguments are drawn with their names as seeds."""
    drawn = {}
    for argument in operation.arguments:
        x = arguments.pop(argument)
        seed = f"{level}/{operation.name}/{name}/{argument}"
        drawn[argument] = x.draw(seed) if isinstance(x, Floats | Integers) else x
    if arguments:
        raise TypeError(f"{operation.name} has no {', '.join(arguments)}")
    return Case(level, operation, name, purpose, drawn, profiles)


def _l1(operation: str, name: str, purpose: str, *profiles: str, **arguments: Any) -> Case:
    return _case("L1", L1[operation], name, purpose, *profiles, **arguments)


LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
ROPES: dict[str, tuple[str, int, float, dict[str, Any] | None]] = {  # name -> purpose, head_dim, theta, scaling
    "llama_2": ("the formula, with the θ of LLaMA 1 and 2", 128, 10000.0, None),
    "llama_3": ("the θ of Llama 3", 128, 500000.0, None),
    "head_dim_64": ("the exponent's denominator is head_dim, whatever it is", 64, 500000.0, None),
    "llama_3_1": ("Llama 3.1's scaling: kept, blended and divided frequencies", 128, 500000.0, LLAMA_3_1),
    "llama_3_2": ("scale factor 32, where Meta's code has 8, and head_dim 64", 64, 500000.0, LLAMA_3_2),
    "linear": ("linear scaling divides every frequency", 32, 10000.0, {"factor": 4.0}),
}
FORMS = {
    "safetensors": "config.json as transformers 5 writes it, wq and wk in Hugging Face's order",
    "gguf": "metadata, and the scaling of RoPE as a tensor of divisors",
    "pth": "Meta's params.json and consolidated.00.pth",
}
LONG = [0, 1, 2, 63, 4095, 4096, 8191, 8192, 8193, 16384, 65537, 131071, 131072, 200003]
DYADIC = np.ldexp(np.float32(1), np.array([0, -2, -5, -9, -13, -17])).astype(np.float32)  # frequencies whose angles are exact


def _causal(T: int, S: int) -> np.ndarray:
    visible = np.tri(T, S, S - T, dtype=bool)
    return np.where(visible, np.float32(0), np.float32(-np.inf))[None]


def _positions(*rows: int | list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def _linears() -> Iterator[Case]:
    yield _l1(
        *("embed", "rows", "the first, the last and a repeated id"),
        tokens=_positions(0, 10, 3, 3, 9),
        weight=Floats((11, D)),
    )
    yield _l1("embed", "batch", "ids of a batch", tokens=Integers((2, 4), 0, 11), weight=Floats((11, 24)))
    for name, purpose, n_in, n_out, rows in (
        ("square", "a square weight, which can be transposed without an error", D, D, (T, D)),
        ("wide", "more outputs than inputs", 32, 77, (T, 32)),
        ("narrow", "a single row, more inputs than outputs: decode", 160, 12, (1, 160)),
        ("batch", "a batch of sequences", 48, 20, (2, 3, 48)),
    ):
        yield _l1("linear", name, purpose, x=Floats(rows), weight=Floats((n_out, n_in), -3))
    yield _l1(
        *("linear", "float32_weights", "weights and inputs with all 24 bits of a float32, which no 16-bit format keeps"),
        *("float64", "float32"),
        x=Floats((T, D), bits=24),
        weight=Floats((D, D), -3, bits=24),
    )
    weight = (Floats((24, 64), -3).draw("L1/linear_bfloat16") * np.float32(2.0**-6)).view(np.uint32) >> np.uint32(16)
    purpose = "a stored weight is widened by 16 bits, exactly"
    yield _l1("linear_bfloat16", "stored", purpose, x=Floats((T, 64)), weight=weight.astype(np.uint16))
    x = Floats((T, 40))
    scale = np.ldexp(np.float32(1), np.arange(40, dtype=np.int32) % 7 - 9).astype(np.float32)
    purpose = "each row has its own scale; the weight is square, so that scaling columns raises no error"
    yield _l1("linear_int8", "rows", purpose, x=x, weight=Integers((40, 40), -127, 128, "int8"), scale=scale)
    purpose = "each group has its own scale, and its 32 numbers are adjacent"
    scale = Floats((24, 3), -7)
    yield _l1("linear_groups", "groups", purpose, x=Floats((T, 96)), weight=Integers((24, 96), -127, 128, "int8"), scale=scale)


def _norms() -> Iterator[Case]:
    weight = Floats((D,), above=0.0)
    for name, purpose, x, eps in (
        ("unit", "the formula, on rows of ordinary size", Floats((T, D)), 1e-5),
        ("small_rows", "mean(x²) below eps, so that its place inside the root shows", Floats((T, D), -9), 1e-5),
        ("eps_1e-6", "the eps of LLaMA 1, on rows of its size", Floats((T, D), -10), 1e-6),
        ("large_eps", "eps as large as mean(x²)", Floats((T, D)), 0.5),
        (
            "offset",
            "a mean far from zero, which RMSNorm does not subtract",
            Floats((T, D), -1, 6, above=2.0),
            1e-5,
        ),
        ("one_row", "a single token", Floats((1, D), -8), 1e-5),
        ("batch", "a batch: every token's mean is its own", Floats((2, 3, D), -2), 1e-5),
    ):
        yield _l1("rms_norm", name, purpose, x=x, weight=weight, eps=eps)
    zero = Floats((3, D), -8).draw("L1/rms_norm/zero_row/x")
    zero[1] = 0
    yield _l1("rms_norm", "zero_row", "a row of zeros is zeros, not NaN", x=zero, weight=weight, eps=1e-5)


def _softmaxes() -> Iterator[Case]:
    yield _l1("softmax", "scores", "the formula", x=Floats((3, 4, 7), 1))
    x = Floats((2, T, T), 1).draw("L1/softmax/masked/x")
    yield _l1("softmax", "masked", "-inf becomes exactly 0", x=x + _causal(T, T))
    yield _l1(
        "softmax", "large", "scores whose exp is infinite, unless the row's maximum is subtracted", x=Floats((2, 4, 9), 7)
    )
    x = Floats((3, 8), 1).draw("L1/softmax/rows_apart/x") + np.array([[0], [192], [-192]], np.float32)
    yield _l1(
        "softmax", "rows_apart", "rows of very different size: the maximum is each row's own", x=np.round(x).astype(np.float32)
    )
    for name, purpose, exponent in (
        ("gate", "the formula", 1),
        ("large", "exp(-x) and exp(x) are infinite, and silu is not", 8),
        ("small", "near zero silu is x/2", -6),
    ):
        yield _l1("silu", name, purpose, x=Floats((T, F), exponent))
        up = Floats((T, F))
        yield _l1("swiglu", name, f"{purpose}; which of the two is gated", gate=Floats((T, F), exponent), up=up)


def _ropes() -> Iterator[Case]:
    for name, (purpose, head_dim, theta, scaling) in ROPES.items():
        yield _l1("rope_frequencies", name, purpose, head_dim=head_dim, theta=theta, scaling=scaling)
    for name, purpose, positions in (
        ("short", "a prompt's positions, counted from 0", _positions(0, 1, 2, 3, 4, 5)),
        ("long", "positions past 8192 and 131072", _positions(*LONG)),
        ("batch", "a position for each token of a batch", _positions([0, 1, 2], [100, 101, 102])),
    ):
        yield _l1("rope_rotation", name, purpose, positions=positions, frequencies=DYADIC)
    halves = ("rope", "adjacent pairs, x[2j] with x[2j + 1]"), ("rope_half_split", "halves, x[j] with x[j + K/2]")
    for operation, what in halves:
        for name, purpose, rows in (
            ("queries", f"which numbers are a pair: {what}", (T, H, K)),
            ("one_token", "a single token, as in decode", (1, G, K)),
            ("batch", "a batch, each sequence with its own angles", (2, 3, G, 8)),
        ):
            angles = Floats((*rows[:-2], 1, rows[-1] // 2), -1)
            yield _l1(operation, name, purpose, x=Floats(rows), cos=angles, sin=angles)
    for name, purpose, where, theta, scaling in (
        ("prompt", "frequencies, angles and rotation at once", list(range(T)), 10000.0, None),
        ("decode", "a single token at a position that is not 0", [37], 500000.0, None),
        ("scaled_8", "Llama 3.1's scaling, at positions up to 8192", [0, 3, 500, 4096, 8192], 500000.0, LLAMA_3_1),
        ("scaled_32", "Llama 3.2's scaling, at positions up to 8192", [0, 3, 500, 4096, 8192], 500000.0, LLAMA_3_2),
    ):
        x = Floats((len(where), G, 64))
        yield _l1("rope_at", name, purpose, x=x, positions=_positions(*where), theta=theta, scaling=scaling)


def _attentions() -> Iterator[Case]:
    padding = [PADDING, PADDING, 0, 1, 2]
    own: list[tuple[str, str, list[Any], list[Any]]] = [
        ("prompt", "a prompt: each token sees itself and those before it", list(range(T)), list(range(T))),
        ("decode", "a single token after six others sees them all", [6], list(range(7))),
        ("chunk", "three tokens after four others: a triangle that starts in the middle", [4, 5, 6], list(range(7))),
        ("padding", "slots of padding hold a position that no query reaches", [0, 1, 2], padding),
        (
            "batch",
            "a sequence padded on the left next to one that is not",
            [[0, 1, 2], [3, 4, 5]],
            [[*padding, 3], [*range(6)]],
        ),
    ]
    for name, purpose, queries, slots in own:
        rows = {"query_positions": _positions(*queries), "slot_positions": _positions(*slots)}
        yield _l1("causal_mask", name, purpose, **rows)
    for group, heads, shared in ((1, 4, 4), (3, 6, 2), (8, 8, 1), (2, 8, 4)):
        purpose = f"H/G = {group}: which key head a query head uses, and the scale 1/sqrt(K)"
        q, keys = Floats((T, heads, 8)), Floats((shared, T, 8))
        yield _l1("attention_scores", f"shared_by_{group}", purpose, q=q, keys=keys, mask=_causal(T, T))
        purpose = f"H/G = {group}: which value head a query head uses"
        weights = Floats((heads, T, T), -2, 6, above=0.75)
        yield _l1("attention_heads", f"shared_by_{group}", purpose, weights=weights, values=Floats((shared, T, 8)))
    q, keys = Floats((1, H, K)), Floats((G, 9, K))
    yield _l1("attention_scores", "decode", "a single query and nine keys", q=q, keys=keys, mask=_causal(1, 9))
    mask = Floats((1, T, T), 1)
    purpose = "a mask with finite numbers is added after scaling"
    yield _l1("attention_scores", "finite_mask", purpose, q=Floats((T, H, K)), keys=Floats((G, T, K)), mask=mask)
    q, keys, padded = Floats((2, 3, H, K)), Floats((2, G, 3, K)), np.stack([_causal(3, 3), _causal(3, 3)])
    padded[1, :, :, 0] = -np.inf
    padded[1, :, 0, 0] = 0
    yield _l1(
        "attention_scores", "padded_batch", "the argument `mask` is used, which also hides padding", q=q, keys=keys, mask=padded
    )
    weights, values = Floats((H, 1, 9), -2, 6, above=0.75), Floats((G, 9, K))
    yield _l1("attention_heads", "decode", "a single query and nine values", weights=weights, values=values)


def _roundings() -> Iterator[Case]:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0x3FFF8000, 0x7F7F7FFF, 0x00008000], np.uint32)
    bits = np.concatenate([bits, np.array([0x00018000, 0x00008001, 0x80000001, 0x7F7FFFFF, 0x00000000], np.uint32)])
    purpose = "ties, subnormals, a carry into the exponent, and what rounds to infinity"
    yield _l1("round_bfloat16", "edges", purpose, x=bits.view(np.float32))
    yield _l1("round_bfloat16", "numbers", "numbers with all bits of a float32", x=Floats((64,), bits=24))
    edges = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 65504.0, 65519.0, 65520.0, 2**-14, 2**-24, 2**-25, 3 * 2**-25]
    edges += [2**-15 + 2**-25, 2**-15 + 3 * 2**-25, -(2**-14) + 2**-25, 0.0]
    yield _l1("round_float16", "edges", purpose, x=np.array(edges, np.float32))
    yield _l1("round_float16", "numbers", "numbers with all bits of a float32", x=Floats((64,), bits=24))


def _blocks() -> Iterator[Case]:
    def l2(operation: str, name: str, purpose: str, **arguments: Any) -> Case:
        return _case("L2", BEYOND[operation], name, purpose, **arguments)

    for group, heads, shared in ((1, 4, 4), (3, 6, 2), (8, 8, 1)):
        q, keys, values = Floats((T, heads, 8), 1), Floats((shared, T, 8)), Floats((shared, T, 8))
        purpose = f"H/G = {group}, from queries, keys and values to heads, as a fused kernel computes it"
        yield l2("attention", f"shared_by_{group}", purpose, q=q, keys=keys, values=values, mask=_causal(T, T))
    q, keys, values = Floats((1, H, K), 1), Floats((G, 9, K)), Floats((G, 9, K))
    yield l2("attention", "decode", "a single query", q=q, keys=keys, values=values, mask=_causal(1, 9))
    q, keys, values = Floats((3, H, K), 1), Floats((G, 7, K)), Floats((G, 7, K))
    yield l2("attention", "chunk", "three queries after four tokens", q=q, keys=keys, values=values, mask=_causal(3, 7))
    q, keys, values = Floats((4, H, K), 5), Floats((G, 4, K), 3), Floats((G, 4, K))
    purpose = "scores whose exp is infinite, unless the row's maximum is subtracted"
    yield l2("attention", "large", purpose, q=q, keys=keys, values=values, mask=_causal(4, 4))
    padded = _causal(4, 6).copy()
    padded[..., :2] = -np.inf
    q, keys, values = Floats((4, H, K), 1), Floats((G, 6, K)), Floats((G, 6, K))
    yield l2("attention", "padding", "slots of padding are hidden", q=q, keys=keys, values=values, mask=padded)
    for name, purpose, n, rows, exponent in (
        ("prompt", "which weight gates, and which is gated", F, T, 0),
        ("square", "square weights, which can be transposed without an error", 40, T, 0),
        ("one_token", "a single token, as in decode", F, 1, 0),
        ("large", "a gate whose exp is infinite", F, 3, 8),
    ):
        weights = {"w1": Floats((n, 40), -3), "w2": Floats((40, n), -3), "w3": Floats((n, 40), -3)}
        yield l2("feed_forward", name, purpose, x=Floats((rows, 40), exponent), **weights)
    for name, purpose, changes, positions in (
        ("grouped", "a whole layer, n_heads · head_dim not dim", {}, list(range(T))),
        ("square", "square weights, every head with its own keys", {"dim": 32, "n_heads": 4, "n_kv_heads": 4}, list(range(T))),
        (
            "one_kv_head",
            "one key head for all",
            {"dim": 40, "n_heads": 8, "n_kv_heads": 1, "rope_theta": 500000.0},
            list(range(T)),
        ),
        ("small_rows", "a residual stream so small that eps matters", {"norm_eps": 2.0**-12}, list(range(T))),
        ("scaled", "scaled RoPE", {"rope_theta": 500000.0, "rope_scaling": SCALING, "head_dim": 16}, [0, 40, 90, 200, 400]),
    ):
        config = dataclasses.replace(GROUPED, n_layers=1, **changes)
        params = params_of(config, f"L2/block/{name}")
        layer = {key.removeprefix("layers.0."): x for key, x in params.items() if key.startswith("layers.0.")}
        x = Floats((len(positions), config.dim), -7 if name == "small_rows" else 0)
        constants = config.to_dict()
        yield l2("block", name, purpose, x=x, positions=_positions(*positions), params=layer, config=constants)


def _models() -> Iterator[Case]:
    for name, tiny in MODELS.items():
        tokens = Integers((40 if tiny.config.rope_scaling else 12,), 0, tiny.config.vocab_size).draw(
            f"L3/forward/{name}/tokens"
        )
        tokens[:2] = 0, tiny.config.vocab_size - 1
        constants = tiny.config.to_dict()
        yield _case("L3", BEYOND["forward"], name, tiny.purpose, params=tiny.params, config=constants, tokens=tokens)
        for form in forms_of(tiny):
            purpose = f"the same from a file: {FORMS[form]}"
            rows = {"path": path_of(tiny, form), "tokens": tokens}
            yield _case("L3", BEYOND["forward_file"], f"{name}_{form}", purpose, **rows)


def _caches() -> Iterator[Case]:
    a, b = (Integers((n,), 0, 61).draw(f"L4/{n}").tolist() for n in (12, 7))
    for name, purpose, passes, kept in (
        ("one_by_one", "each token in a pass of its own", [[id] for id in a[:8]], []),
        ("chunks", "chunks of different sizes are the same as one pass", [a[:5], a[5:6], a[6:9], a[9:]], []),
        ("decode", "a prompt, then one token after the other", [a[:8], *([id] for id in a[8:])], []),
        ("batch", "two sequences at once, and decode: neither affects the other", [[a[:5], b[:5]], [[a[5]], [b[5]]]], []),
        (
            *("left_padding", "padding on the left is hidden and shifts no position"),
            [[a[:6], [-1, -1, -1, *b[:3]]], [[a[6]], [b[3]]], [[a[7]], [b[4]]]],
            [],
        ),
        (
            *("right_padding", "padding on the right is hidden from the tokens that are decoded after it"),
            [[a[:6], [*b[:4], -1, -1]], [[a[6]], [b[4]]], [[a[7]], [b[5]]]],
            [],
        ),
        ("slots_reused", "a cache that is cut back, and its slots used again", [a[:8], b[:4], [a[9]]], [None, 3, None]),
        ("emptied", "a cache that is emptied and used again", [a[:8], b[:4], [b[4]]], [None, 0, None]),
        (
            *("rows_join", "a row that joins while another decodes: its positions and slots are its own"),
            [[a[:5], [-1] * 5], [[a[5]], [-1]], [[-1] * 4, b[:4]], [[a[6]], [b[4]]], [[a[7]], [b[5]]]],
            [],
        ),
        (
            *("rows_leave", "a row that leaves, and a shorter one in its slots: the old keys are masked"),
            [[a[:6], b[:6]], [[a[6]], [b[6]]], [[-1] * 3, a[9:]], [[a[7]], [b[0]]], [[a[8]], [b[1]]]],
            [None, None, [7, 0], None, None],
        ),
        (
            *("rows_cut", "rows that are cut back, each to a length of its own"),
            [[a[:6], b[:6]], [a[6:8], b[:2]], [[a[8]], [b[2]]]],
            [None, [5, 3], None],
        ),
    ):
        for model in ("grouped", "tied") if name in ("decode", "left_padding") else ("grouped",):
            rows = {"params": MODELS[model].params, "config": MODELS[model].config.to_dict(), "passes": passes, "kept": kept}
            yield _case("L4", BEYOND["forward_passes"], f"{name}_{model}" if model != "grouped" else name, purpose, **rows)


def _long() -> Iterator[Case]:
    for name, purpose, scaling in (
        ("unscaled", "positions past 8192 and 131072", None),
        ("scaled_8", "Llama 3.1's scaling at long positions", LLAMA_3_1),
        ("scaled_32", "Llama 3.2's scaling at long positions", LLAMA_3_2),
    ):
        rows = {"x": Floats((len(LONG), G, 64)), "positions": _positions(*LONG), "theta": 500000.0, "scaling": scaling}
        yield _case("L5", L1["rope_at"], name, purpose, **rows)
    for name in ("grouped", "scaled_8", "scaled_32"):
        tiny = MODELS[name]
        rows = {"params": tiny.params, "config": tiny.config.to_dict(), "tokens": Integers((len(LONG),), 0, 61)}
        purpose = "tokens far apart, in a whole model"
        yield _case("L5", BEYOND["forward_at"], name, purpose, positions=_positions(*LONG), **rows)


def _configs() -> Iterator[Case]:
    for path, file in config_files().items():
        profiles = tuple(name for name in PROFILES if name != "float64") if path.endswith("gguf") else ALL  # it holds float32
        yield _case("L0", BEYOND["resolve_config"], path.split("/")[2], file.purpose, *profiles, path=path)


def _samplings() -> Iterator[Case]:
    logits = [0.5, 3.0, 1.25, 2.5, -1.0, 2.0, 0.0, 1.75]
    for name, purpose, temperature, top_k, top_p, min_p in (
        ("temperature", "the logits are divided by the temperature", 0.5, 0, 1.0, 0.0),
        ("hot", "a temperature above 1", 2.0, 0, 1.0, 0.0),
        ("greedy", "a temperature of 0", 0.0, 0, 1.0, 0.0),
        ("top_p", "the token that crosses top_p is kept", 1.0, 0, 0.6, 0.0),
        ("top_p_first", "one token alone has top_p", 0.25, 0, 0.5, 0.0),
        ("top_p_hot", "the temperature comes before top_p", 2.0, 0, 0.8, 0.0),
        ("top_k", "the three most likely", 1.0, 3, 1.0, 0.0),
        ("top_k_top_p", "top_p is a share of what top_k has left", 1.0, 4, 0.7, 0.0),
        ("min_p", "relative to the most likely token", 1.0, 0, 1.0, 0.3),
        ("min_p_top_p", "min_p and top_p", 1.5, 0, 0.9, 0.25),
    ):
        rows = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        yield _case("L7", BEYOND["probabilities"], name, purpose, logits=np.array(logits, np.float32), **rows)
    large = np.array([300.0, 340.0, 338.0, 100.0], np.float32)
    purpose = "logits whose exp is infinite"
    yield _case("L7", BEYOND["probabilities"], "large", purpose, logits=large, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def _tokenizers() -> Iterator[Case]:
    for tokenizer, (_, sha256) in TOKENIZERS.items():
        for name, (purpose, text) in TEXTS.items():
            yield _case("L6", BEYOND["encode"], f"{tokenizer}_{name}", purpose, tokenizer=sha256, text=text)


def _chats() -> Iterator[Case]:
    for format, specials in SPECIALS.items():
        for name, (purpose, _) in CONVERSATIONS.items():
            if name == "spelled" and format in ("llama2", "zephyr"):  # their tags are text, which a message must not forge
                continue
            rows = {"format": format, "messages": messages_of(format, name), "specials": list(specials)}
            yield _case("L8", BEYOND["chat"], f"{format}_{name}", purpose, **rows)
    for style, template in TEMPLATES.items():
        for name, found in recorded_texts()[style].items():
            texts = {"template": template.text, "variables": template.variables, "specials": list(template.specials)}
            purpose = f"{template.purpose}; {CONVERSATIONS[name][0]}"
            yield _case("L8", BEYOND["chat_template"], f"{style}_{name}", purpose, messages=found["messages"], **texts)


@functools.cache
def cases() -> dict[str, Case]:
    """Return every case by its path, in the order of the levels."""
    made = [case for level in (_linears, _norms, _softmaxes, _ropes, _attentions, _roundings) for case in level()]
    made += [
        case for level in (_configs, _blocks, _models, _caches, _long, _tokenizers, _samplings, _chats) for case in level()
    ]
    made.sort(key=lambda case: (case.level, [*OPERATIONS].index(case.operation.name)))
    return {case.path: case for case in made}
