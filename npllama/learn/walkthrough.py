"""Explain the forward pass of a prompt step by step: formula, shapes, numbers, and the line of code that computes them.

    steps = walkthrough(npllama.load(), [2000, 51, 86])
    print(lesson.text(steps))

Activations come from forward()'s tap; frequencies, rotation and mask are the results of its operations in the same pass. The
other numbers are computed from these with the model's own functions: the scores before the mask, silu of the gate, the
probabilities and the choice, and lengths, directions, sums and root mean squares. Formulas and sentences come from the
activation table; a step has its own where it shows more or less than one row of the table. The line of model.py is the one that
calls the step's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import model, ops, sampling
from ..activations import STREAM, stream_before, table_of
from ..checkpoint import Model
from ..engine import linear
from ..scope import Array, Tap
from .lesson import HEADING_CELLS, LABEL_CELLS, Cell, Source, Step, Table, computed_at, label

SHOWN = 5  # numbers of a long row
TOKENS_SHOWN = 5  # of a long prompt: the first three and the last two
PROMPT_SHOWN = 24  # tokens in the table of the prompt itself
LAYERS_SHOWN = 16
CANDIDATES = 5


class Pass:
    """One recorded forward pass, with the layer and the head that the steps show.

    taps      name -> activation: those of the chosen layer, those outside of layers, and every layer's `out`
    returned  operation -> its result, for operations whose result is not an activation
    pieces    the label of each token
    shown     the positions that tables of tokens show; None stands for the omitted ones
    """

    def __init__(self, m: Model, ids: Sequence[int], layer: int = 0, head: int = 0, tap: Tap | None = None):
        self.model, self.config, self.ids, self.layer, self.head = m, m.config, list(ids), layer, head
        self.group = head // (m.config.n_heads // m.config.n_kv_heads)
        self.taps: dict[str, Array] = {}
        self.returned: dict[str, Any] = {}
        chosen = f"layers.{layer}."

        def watch(name: str, x: Array) -> Array:
            x = x if tap is None else tap(name, x)
            if name.startswith(chosen) or not name.startswith("layers.") or (name.count(".") == 2 and name.endswith(".out")):
                self.taps[name] = x
            return x

        kept = {name: self._keep(name) for name in ("rope_frequencies", "rope_rotation", "causal_mask")}
        model.forward(m.params, m.config, ids, tap=watch, ops=replace(model.PLAIN, **kept))
        self.rows = {row.name: row for row in table_of(m.config)}
        self.pieces = [self.piece(id) for id in self.ids]
        self.last, self.shown = len(ids) - 1, _some(len(ids), TOKENS_SHOWN)

    def _keep(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self.returned[name] = result = getattr(ops, name)(*args)
            return result

        return operation

    def name(self, kind: str) -> str:
        """Return the full name of an activation of the table, in the chosen layer if layers have it."""
        return stream_before(self.layer) if kind == STREAM else self.rows[kind].full_name(self.layer)

    def __getitem__(self, kind: str) -> Array:
        return self.taps[self.name(kind)]

    def piece(self, id: int, cells: int = LABEL_CELLS) -> str:
        """Return a token's label; its id where it has no text."""
        piece = self.model.tokenizer.piece(id) if self.model.tokenizer else ""
        return label(piece, cells) if piece else f"#{id}"

    @property
    def last_token(self) -> str:
        """Return the caption of a table that shows the last token."""
        return f"the last token, {self.pieces[self.last]}"

    def formulas(self, *kinds: str) -> str:
        """Join the formulas of the activation table in one line."""
        return ",  ".join(self.rows[kind].formula for kind in kinds)

    def tex(self, *kinds: str) -> tuple[str, ...]:
        """Return the same formulas in TeX."""
        return tuple(self.rows[kind].tex for kind in kinds)

    def sentences(self, *kinds: str) -> str:
        """Join the sentences of the activation table."""
        return " ".join(self.rows[kind].sentence for kind in kinds)


def walkthrough(m: Model, tokens: Sequence[int], layer: int = 0, head: int = 0, tap: Tap | None = None) -> list[Step]:
    """Run a prompt and return its steps, in the order of computation.

    layer, head  the ones to show; the others compute the same with other weights
    tap          a tap for forward(); the steps show the values that it returns

    Raises ValueError for a layer or head that the model doesn't have, and for invalid tokens.
    """
    for name, value, n in (("layer", layer, m.config.n_layers), ("head", head, m.config.n_heads)):
        if not 0 <= value < n:
            raise ValueError(f"{name} {value} is not in this model, which has {name}s 0 to {n - 1}")
    p = Pass(m, tokens, layer, head, tap)
    return [step(p) for step in STEPS]


# ------------------------------------------------------------------------------------------------- the steps, in their order


def prompt(p: Pass) -> Step:
    """Split the text into tokens."""
    rows = [(i, p.ids[i], p.pieces[i]) if i is not None else ("…", "…", "…") for i in _some(len(p.ids), PROMPT_SHOWN)]
    if p.model.tokenizer is None:
        return Step(
            "Tokens",
            "This model came without a tokenizer, so the prompt is given as ids: these numbers are all that the model sees.",
            shape=f"tokens [T] = [{len(p.ids)}]",
            tables=(Table(("position", "id"), tuple(row[:2] for row in rows)),),
            sources=(Source.of(model.check_tokens),),
        )
    return Step(
        "Tokens",
        "The tokenizer splits the text into pieces of its vocabulary and gives the id of each, one of "
        f"{p.model.tokenizer.vocab_size:,}: these numbers are all that the model sees.",
        formula="ids = encode(text)",
        shape=f"tokens [T] = [{len(p.ids)}]",
        tables=(Table(("position", "id", "piece"), tuple(rows)),),
        sources=(Source.of(type(p.model.tokenizer).encode),),
    )


def embeddings(p: Pass) -> Step:
    """Select a row for each token."""
    c = p.config
    step = Step(
        "Embeddings",
        f"{p.sentences('tok_embeddings')} Its {c.dim} learned numbers represent the token, wherever it is in the text.",
        formula=p.formulas("tok_embeddings"),
        tex=p.tex("tok_embeddings"),
        given="E = tok_embeddings.weight",
        shape=f"weight [V, D] = [{c.vocab_size}, {c.dim}]  ->  x [T, D] = [{len(p.ids)}, {c.dim}]",
        tables=(_token_table(p, p["tok_embeddings"]),),
    )
    return _computed(p, step, ("tok_embeddings",), linear.embed)


def attention_norm(p: Pass) -> Step:
    """Scale what attention reads."""
    return _norm(p, f"RMSNorm, before layer {p.layer}'s attention", "attention_norm")


def projections(p: Pass) -> Step:
    """Make queries, keys and values."""
    c, kinds = p.config, ("attention.q", "attention.k", "attention.v")
    shapes = [
        f"w{x} [{heads}·K, D] = [{n * c.head_dim}, {c.dim}]  ->  {x} [T, {heads}·K] = [{len(p.ids)}, {n * c.head_dim}]"
        for x, heads, n in (("q", "H", c.n_heads), ("k", "G", c.n_kv_heads), ("v", "G", c.n_kv_heads))
    ]
    step = Step(
        "Queries, keys and values",
        p.sentences(*kinds),
        formula=p.formulas(*kinds),
        tex=(r", \quad ".join(p.tex(*kinds)),),
        shape="\n".join(shapes),
        tables=(_numbers_table([(kind[-1], p[kind][p.last].reshape(-1)) for kind in kinds], p.last_token),),
    )
    return _computed(p, step, kinds, linear.linears, linear.linear)


def heads(p: Pass) -> Step:
    """Split the rows into heads."""
    c, kinds = p.config, ("attention.q", "attention.k", "attention.v")
    share = c.n_heads // c.n_kv_heads
    if share == 1:
        sharing = "each head has keys and values of its own."
    else:
        sharing = (
            f"{share} query heads share each key/value head (grouped queries), so that query head {p.head} uses "
            f"key/value head {p.head} // {share} = {p.group}."
        )
    rows = [
        (f"{kind[-1]}, head {head}", p[kind][p.last, head])
        for kind, head in zip(kinds, (p.head, p.group, p.group), strict=True)
    ]
    step = Step(
        "Heads",
        f"Each row is split into heads of {c.head_dim} numbers, which attend to the text independently; {sharing}",
        formula="q.reshape(T, H, K),  k.reshape(T, G, K),  v.reshape(T, G, K)",
        shape=f"q [T, H, K] = {_shape(p['attention.q'])};  k, v [T, G, K] = {_shape(p['attention.k'])}",
        tables=(_numbers_table(rows, p.last_token),),
    )
    return _computed(p, step, kinds, model.split_heads)


def frequencies(p: Pass) -> Step:
    """Give each pair of a head's numbers its speed of rotation."""
    c, θ = p.config, p.returned["rope_frequencies"]
    rows: list[tuple[Cell, ...]] = []
    for j in _some(len(θ), SHOWN + 1):
        rows.append(("…",) * 4 if j is None else (j, float(θ[j]), 2 * math.pi / float(θ[j]), p.last * float(θ[j])))
    scaled = "" if c.rope_scaling is None else "; this model's slow pairs are slowed further, for a longer context"
    return Step(
        "RoPE: a speed for each pair",
        "Each adjacent pair of a head's numbers is a point in a plane that rotates as the position grows: pair 0 by one "
        "radian per token, later pairs ever more slowly, so that fast pairs tell adjacent tokens apart and slow pairs whole "
        f"passages{scaled}.",
        formula="angle = m·θ_j,  θ_j = theta^(-2j/K)",
        tex=(r"\mathrm{angle} = m\,\theta_j, \quad \theta_j = \mathrm{theta}^{-2j/K}",),
        given=f"theta = {c.rope_theta:g},  K = {c.head_dim}",
        shape=f"frequencies [K/2] = {_shape(θ)}",
        tables=(Table(("pair j", "θ_j", "tokens per rotation", f"angle at m = {p.last}"), tuple(rows)),),
        sources=(Source.of(ops.rope_frequencies), Source.of(ops.rope_rotation)),
        called=_line("norm").calling(ops.rope_frequencies),
    )


def rotation(p: Pass) -> Step:
    """Rotate one pair of a query and of a key."""
    m, j = p.last, min(1, p.config.head_dim // 2 - 1)
    cos, sin = (x[m, 0, j] for x in p.returned["rope_rotation"])
    θ = p.returned["rope_frequencies"][j]
    rows = []
    for letter, head in (("q", p.head), ("k", p.group)):
        for when, kind in (("before", f"attention.{letter}"), ("after", f"attention.{letter}_rope")):
            x, y = map(float, p[kind][m, head, 2 * j : 2 * j + 2])
            rows.append((f"{letter} {when}", x, y, math.hypot(x, y), math.atan2(y, x)))
    kinds = ("attention.q_rope", "attention.k_rope")
    step = Step(
        "RoPE: one pair followed",
        f"{p.sentences(*kinds)} " + ("At position 0 nothing is rotated." if m == 0 else "Values are not rotated."),
        formula=p.formulas("attention.q_rope"),
        tex=p.tex("attention.q_rope"),
        given=f"here j = {j}",
        shape=f"q [T, H, K] = {_shape(p['attention.q_rope'])},  k [T, G, K] = {_shape(p['attention.k_rope'])}",
        tables=(
            Table(
                ("", f"x[{2 * j}]", f"x[{2 * j + 1}]", "length", "direction"),
                tuple(rows),
                f"the last token's pair {j}: m·θ = {m} · {θ:.4f} = {m * θ:.4f}, cos {cos:.4f}, sin {sin:.4f}",
            ),
        ),
    )
    return _computed(p, step, kinds, ops.rope)


def scores(p: Pass) -> Step:
    """Multiply each query with each key."""
    kind, K = "attention.scores", p.config.head_dim
    keys = p["attention.k_rope"][:, [p.group]].swapaxes(-2, -3)
    no_mask = np.zeros_like(p.returned["causal_mask"])
    unmasked = ops.attention_scores(p["attention.q_rope"][:, [p.head]], keys, no_mask)[0]
    return Step(
        "Scores",
        "Each query is multiplied with each key, and the larger the product, the better they match; the division by √K "
        "keeps the products from growing with the head's width.",
        formula=p.formulas(kind),
        tex=p.tex(kind),
        given=f"sqrt({K}) = {math.sqrt(K):.4f}",
        shape=f"q [T, H, K], k [G, S, K]  ->  [H, T, S] = {_shape(p[kind])}",
        tables=(_square(p, unmasked, f"head {p.head} before the mask; rows: queries, columns: keys"),),
        sources=(Source.of(ops.query_key_products), Source.of(ops.attention_scores)),
        called=_line(kind),
    )


def mask(p: Pass) -> Step:
    """Mask later positions."""
    kind = "attention.scores"
    return Step(
        "The causal mask",
        "A token may attend to itself and to earlier tokens: minus infinity is added to the scores of later ones, so that no "
        "position sees the token that it has to predict.",
        formula="mask = 0 where the key's position ≤ the query's, else -inf",
        tex=(r"\mathrm{mask}_{tn} = 0 \ \mathrm{if}\ m_n \leq m_t, \ \mathrm{else}\ -\infty",),
        shape=f"mask [1, T, S] = {_shape(p.returned['causal_mask'])}",
        tables=(_square(p, p[kind][p.head], f"head {p.head}, masked"),),
        taps=(p.name(kind),),
        sources=(Source.of(ops.causal_mask), Source.of(ops.attention_scores)),
        called=_line("norm").calling(ops.causal_mask),
    )


def softmax(p: Pass) -> Step:
    """Turn scores into weights."""
    kind = "attention.weights"
    weights = p[kind][p.head]
    most = np.argsort(-weights[p.last], kind="stable")[:CANDIDATES]
    attended = tuple((p.pieces[i], int(i), float(weights[p.last, i])) for i in most)
    step = Step(
        "Softmax",
        p.sentences(kind),
        formula=p.formulas(kind),
        tex=p.tex(kind),
        shape=f"[H, T, S] = {_shape(p[kind])}",
        tables=(
            _square(p, weights, f"head {p.head}; the last column is the row's sum", sums=True),
            Table(("piece", "position", "weight"), attended, f"the positions that {p.last_token}, attends to most"),
        ),
    )
    return _computed(p, step, (kind,), ops.softmax)


def values(p: Pass) -> Step:
    """Average the values by the weights."""
    kind = "attention.heads"
    weights, v = p["attention.weights"][p.head, p.last], p["attention.v"][:, p.group]
    rows = [(f"{weights[i]:.3f} · v of {p.pieces[i]}", v[i]) for i in np.argsort(-weights, kind="stable")[:3]]
    rows.append(("sum over all", p[kind][p.last, p.head]))
    step = Step(
        "Values, averaged",
        p.sentences(kind),
        formula=p.formulas(kind),
        tex=p.tex(kind),
        shape=f"[H, T, S], [G, S, K]  ->  [T, H, K] = {_shape(p[kind])}",
        tables=(_numbers_table(rows, f"the last token in head {p.head}, its largest weights first", shown=SHOWN - 1),),
    )
    return _computed(p, step, (kind,), ops.attention_heads)


def joined(p: Pass) -> Step:
    """Join the heads and project them to the model's width."""
    kind, width = "attention.out", p.config.n_heads * p.config.head_dim
    step = Step(
        "Heads joined, and wo",
        p.sentences(kind),
        formula=p.formulas(kind),
        tex=p.tex(kind),
        shape=f"[T, H, K]  ->  [T, H·K] = [{len(p.ids)}, {width}]  ->  [T, D] = {_shape(p[kind])}",
        tables=(_token_table(p, p[kind]),),
    )
    return _computed(p, step, (kind,), model.join_heads, linear.linear)


def attention_residual(p: Pass) -> Step:
    """Add attention's output to the residual stream."""
    return _residual(p, "The residual", model.self_attention, "attention_residual")


def ffn_norm(p: Pass) -> Step:
    """Scale what the feed-forward reads."""
    return _norm(p, "RMSNorm, before the feed-forward", "ffn_norm")


def swiglu(p: Pass) -> Step:
    """Let the gate projection decide what passes of the up projection."""
    c, kinds = p.config, ("feed_forward.gate", "feed_forward.up", "feed_forward.act")
    gate, up, act = (p[kind][p.last] for kind in kinds)
    rows = [("gate = w1 x", gate), ("silu(gate)", ops.silu(gate)), ("up = w3 x", up), ("act", act)]
    step = Step(
        "SwiGLU",
        p.sentences(*kinds),
        formula=p.formulas(*kinds) + "\nsilu(z) = z / (1 + exp(-z))",
        tex=(r", \quad ".join(p.tex(*kinds[:2])), *p.tex(kinds[2])),
        given="silu(z) ≈ z for a large z, and silu(z) > -0.28 for all z",
        shape=f"w1, w3 [F, D] = [{c.ffn_dim}, {c.dim}]  ->  gate, up, act [T, F] = {_shape(p['feed_forward.act'])}",
        tables=(_numbers_table(rows, p.last_token),),
    )
    return _computed(p, step, kinds, linear.linears, ops.silu, ops.swiglu)


def feed_forward_residual(p: Pass) -> Step:
    """Project to the model's width and add the output to the residual stream."""
    c, title = p.config, "Back to the model's width, and the second residual"
    step = _residual(p, title, model.feed_forward, "feed_forward.out", "out")
    return replace(step, shape=f"w2 [D, F] = [{c.dim}, {c.ffn_dim}]  ->  {step.shape}")


def layers(p: Pass) -> Step:
    """Follow the residual stream through all layers."""
    names = [stream_before(i) for i in range(p.config.n_layers + 1)]
    rows: list[tuple[Cell, ...]] = []
    for i in _some(len(names), LAYERS_SHOWN):
        if i is None:
            rows.append(("…",) * 4)
            continue
        x = p.taps[names[i]]
        rms = np.sqrt(np.mean(np.square(x), axis=-1))
        rows.append((names[i], float(x[p.last, 0]), float(rms[p.last]), float(np.mean(rms))))
    return Step(
        "All the layers",
        f"The same block runs {p.config.n_layers} times in a loop, each time with other weights. Each layer adds to the "
        f"residual stream, which mostly grows.{_outlier(p, names)}",
        formula=f"for layer in range({p.config.n_layers}):  x = block(x, layer)",
        shape=f"x [T, D] = {_shape(p.taps[names[-1]])} after every layer",
        tables=(Table(("after", "last token's x[0]", "last token's RMS", "mean RMS"), tuple(rows)),),
        taps=("layers.N.out",),
        sources=(Source.of(model.block),),
        called=_line("norm").calling(model.block),
    )


def final_norm(p: Pass) -> Step:
    """Scale the residual stream once more."""
    return _norm(p, "The final RMSNorm", "norm")


def logits(p: Pass) -> Step:
    """Score every token of the vocabulary."""
    c, row = p.config, p.rows["logits"]
    letter, output = ("E", "the embedding itself (tied)") if c.tied_embeddings else ("Output", "a matrix of its own")
    step = Step(
        "Logits",
        f"{row.sentence} The output matrix is {output}. Row t scores what comes after token t, so one text trains T "
        "predictions; the last row predicts what comes next.",
        formula=row.formula,
        tex=(row.tex,),
        given=f"{letter} = {row.parameter(c, None)}",
        shape=f"{letter} [V, D] = [{c.vocab_size}, {c.dim}]  ->  [T, V] = {_shape(p['logits'])}",
        tables=(_token_table(p, p["logits"], f"the scores of ids 0 to {min(SHOWN, c.vocab_size) - 1}"),),
    )
    return _computed(p, step, ("logits",), linear.linear)


def candidates(p: Pass) -> Step:
    """Turn the last row of the logits into probabilities."""
    row = p["logits"][p.last]
    probabilities = ops.softmax(row)
    best = np.argsort(-row, kind="stable")[:CANDIDATES]
    rows = tuple((int(i), p.piece(int(i)), float(row[i]), float(probabilities[i])) for i in best)
    return Step(
        "Probabilities",
        f"Softmax of the last row: how likely each of the {len(row):,} tokens is to come next; the first "
        f"{len(best)} have {float(probabilities[best].sum()):.1%} together.",
        formula="p = softmax(logits[last])",
        tex=(r"p = \mathrm{softmax}(\mathrm{logits}_{T-1})",),
        shape=f"[V] = {_shape(probabilities)}, sums to {float(probabilities.sum()):.6f}",
        tables=(Table(("id", "piece", "logit", "probability"), rows),),
        taps=("logits",),
        sources=(Source.of(ops.softmax),),
    )


def choice(p: Pass) -> Step:
    """Choose the likeliest token."""
    row = p["logits"][p.last]
    id = sampling.sample(row, sampling.Sampling(), np.random.default_rng(0))
    return Step(
        "The chosen token",
        f"Greedy decoding takes the likeliest: {p.piece(id)}, id {id}. It is appended, and the next pass runs on this token "
        "alone: the keys and values of the others are in the cache.",
        formula="next = argmax(logits[last])",
        tex=(r"\mathrm{next} = \mathrm{argmax}(\mathrm{logits}_{T-1})",),
        shape=f"[V] = {_shape(row)}  ->  one id",
        tables=(Table(("id", "piece", "logit"), ((id, p.piece(id), float(row[id])),)),),
        taps=("logits",),
        sources=(Source.of(sampling.sample), Source.of(model.KVCache.update)),
    )


STEPS: tuple[Callable[[Pass], Step], ...] = (
    prompt,
    embeddings,
    attention_norm,
    projections,
    heads,
    frequencies,
    rotation,
    scores,
    mask,
    softmax,
    values,
    joined,
    attention_residual,
    ffn_norm,
    swiglu,
    feed_forward_residual,
    layers,
    final_norm,
    logits,
    candidates,
    choice,
)


# -------------------------------------------------------------------------------------------- what several steps have in common


def _computed(p: Pass, step: Step, kinds: Sequence[str], *functions: Callable) -> Step:
    """Add a step's activations, the functions that compute them, and the line that calls the first function."""
    return replace(
        step,
        taps=tuple(map(p.name, kinds)),
        sources=tuple(map(Source.of, functions)),
        called=_line(kinds[0]).calling(functions[0]),
    )


def _line(kind: str) -> Source:
    """Return the line of model.py that computes an activation."""
    return computed_at()[kind]


def _norm(p: Pass, title: str, kind: str) -> Step:
    row = p.rows[kind]
    [before] = row.inputs
    stream = p[before] if row.in_layer else p.taps[stream_before(p.config.n_layers)]
    x, letter = stream[p.last], "h" if kind == "ffn_norm" else "x"
    weight = linear.widen(p.model.params[row.parameter(p.config, p.layer)])
    rms = np.sqrt(np.mean(np.square(x)))
    step = Step(
        title,
        row.sentence,
        formula=row.formula,
        tex=(row.tex,),
        given=f"eps = {p.config.norm_eps:g}",
        shape=f"{letter} [T, D], weight [D]  ->  y [T, D] = {_shape(p[kind])}",
        tables=(
            _numbers_table(
                [(letter, x), ("weight", weight), ("y", p[kind][p.last])],
                f"{p.last_token}: sqrt(mean({letter}²)) = {rms:.4f}",
            ),
        ),
    )
    return _computed(p, step, (kind,), ops.rms_norm)


def _residual(p: Pass, title: str, function: Callable, *kinds: str) -> Step:
    """Show a residual connection, the last of `kinds`; `function` computes the added term."""
    row = p.rows[kinds[-1]]
    left, _, right = row.formula.partition(" = ")
    stream, _, added = right.partition(" + ")
    labels = (stream, f"+ {added}", f"= {left}")
    rows = [(label, p[kind][p.last]) for label, kind in zip(labels, (*row.inputs, row.name), strict=True)]
    step = Step(
        title,
        p.sentences(*kinds),
        formula=p.formulas(*kinds),
        tex=p.tex(*kinds),
        shape=f"[T, D] = {_shape(p[row.name])}",
        tables=(_numbers_table(rows, p.last_token, shown=SHOWN - 1),),
    )
    return _computed(p, step, (row.name,), function)


def _outlier(p: Pass, names: Sequence[str]) -> str:
    """Name the token that alone makes a row's mean RMS much larger than the last token's; empty if there is none."""
    shown = [names[i] for i in _some(len(names), LAYERS_SHOWN) if i is not None]
    rms = np.array([np.sqrt(np.mean(np.square(p.taps[name], dtype=np.float64), axis=-1)) for name in shown])  # [., T]
    line = int(np.argmax(rms.mean(axis=1) / rms[:, p.last]))
    token, sizes = int(np.argmax(rms[line])), rms[line]
    if sizes.mean() < 4 * sizes[p.last] or sizes[token] < sizes.sum() / 2:
        return ""
    which = "the first" if token == 0 else f"position {token}"
    return (
        f" The mean of all tokens is large because of one, {which}, {p.pieces[token]}: after {shown[line]} its own is "
        f"{sizes[token]:.0f}. Many models have such massive activations (Sun et al. 2024, arXiv:2402.17762)."
    )


def _token_table(p: Pass, x: Array, caption: str = "") -> Table:
    return _numbers_table([(p.pieces[i], x[i]) if i is not None else None for i in p.shown], caption)


def _square(p: Pass, x: Array, caption: str, sums: bool = False) -> Table:
    """Show a matrix of queries (rows) by keys (columns).    x [T, S]"""
    names = [p.piece(p.ids[i], HEADING_CELLS) if i is not None else "…" for i in p.shown]
    rows: list[tuple[Cell, ...]] = []
    for i in p.shown:
        if i is None:
            rows.append(("…",) * (1 + len(names) + sums))
            continue
        cells: list[Cell] = [float(x[i, j]) if j is not None else "…" for j in p.shown]
        rows.append((p.pieces[i], *cells, *([float(x[i].sum())] if sums else [])))
    return Table(("", *names, *(["sum"] if sums else [])), tuple(rows), caption)


def _some(n: int, most: int) -> list[int | None]:
    """Return the indices below n: all, or the first and the last with None for the omitted ones between."""
    if n <= most:
        return list(range(n))
    tail = most // 2
    return [*range(most - tail), None, *range(n - tail, n)]


def _shape(x: Array) -> str:
    return str(list(x.shape))


def _numbers_table(rows: Sequence[tuple[str, Array] | None], caption: str = "", shown: int = SHOWN) -> Table:
    """Show the first numbers of rows of equal length; None stands for omitted rows."""
    width = next(len(row[1]) for row in rows if row is not None)
    n = min(width, shown)
    more = ("…",) if width > n else ()
    cells = [("…",) * (1 + n + len(more)) if row is None else (row[0], *map(float, row[1][:n]), *more) for row in rows]
    return Table(("", *(f"[{i}]" for i in range(n)), *more), tuple(cells), caption)
