"""The forward pass of a prompt as a lesson: every step with its formula, its shapes, its numbers and the line that computes it.

    steps = walkthrough(npllama.load(), [2000, 51, 86])
    print(lesson.text(steps))

Activations are what forward() gave to its tap; frequencies, rotation and mask are what its operations returned in that same
pass. What a pass never holds by itself is computed from these with the model's own functions: the scores before the mask, silu
of the gate, the probabilities and the choice; so are lengths, directions, sums and root mean squares. The line of model.py is
the one that calls the step's function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .. import model, ops, sampling
from ..activations import STREAM, stream_before, table_of
from ..checkpoint import Model
from ..engine import linear
from ..scope import Tap
from .lesson import HEADING_CELLS, LABEL_CELLS, Cell, Source, Step, Table, computed_at, label

SHOWN = 5  # numbers of a long row
TOKENS_SHOWN = 5  # of a long prompt: the first three and the last two
LAYERS_SHOWN = 16
CANDIDATES = 5


class WatchedPass:
    """One forward pass that remembers what it did.

    taps      name -> activation, of the chosen layer, of what is in no layer, and every layer's `out`
    returned  operation -> what it returned, for operations whose result is no activation
    """

    def __init__(self, params: model.Params, config: model.Config, tokens: Sequence[int], layer: int, tap: Tap | None):
        self.taps: dict[str, np.ndarray] = {}
        self.returned: dict[str, object] = {}
        chosen = f"layers.{layer}."

        def watch(name: str, x: np.ndarray) -> np.ndarray:
            x = x if tap is None else tap(name, x)
            if name.startswith(chosen) or not name.startswith("layers.") or (name.count(".") == 2 and name.endswith(".out")):
                self.taps[name] = x
            return x

        watched = {name: self._watched(name) for name in ("rope_frequencies", "rope_rotation", "causal_mask")}
        model.forward(params, config, tokens, tap=watch, ops=replace(model.PLAIN, **watched))

    def _watched(self, name: str):
        def operation(*args: object) -> object:
            self.returned[name] = result = getattr(ops, name)(*args)
            return result

        return operation

    def __getitem__(self, name: str) -> np.ndarray:
        return self.taps[name]


def walkthrough(m: Model, tokens: Sequence[int], layer: int = 0, head: int = 0, tap: Tap | None = None) -> list[Step]:
    """Run a prompt and tell what happened, in the order in which it happened.

    layer, head  which one is looked into; the others do the same with other weights
    tap          as forward() takes it: what it puts in an activation's place is what the steps show

    Raises ValueError for a layer or head that the model lacks and for tokens that it can't take.
    """
    config = m.config
    for name, value, n in (("layer", layer, config.n_layers), ("head", head, config.n_heads)):
        if not 0 <= value < n:
            raise ValueError(f"{name} {value} is not in this model, which has {name}s 0 to {n - 1}")
    seen = WatchedPass(m.params, config, tokens, layer, tap)
    told = _Teller(m, list(tokens), layer, head, seen)
    return [
        told.tokens(),
        told.embeddings(),
        told.attention_norm(),
        told.projections(),
        told.split_heads(),
        told.frequencies(),
        told.rotation(),
        told.scores(),
        told.mask(),
        told.softmax(),
        told.values(),
        told.joined(),
        told.attention_residual(),
        told.ffn_norm(),
        told.swiglu(),
        told.ffn_out(),
        told.layers(),
        told.final_norm(),
        told.logits(),
        told.candidates(),
        told.chosen(),
    ]


class _Teller:
    """Makes each step of what a pass has left behind."""

    def __init__(self, m: Model, ids: list[int], layer: int, head: int, seen: WatchedPass):
        self.model, self.config, self.ids, self.seen = m, m.config, ids, seen
        self.pieces = [self._piece(id) for id in ids]
        self.layer, self.head, self.group = layer, head, head // (m.config.n_heads // m.config.n_kv_heads)
        self.name, self.before = f"layers.{layer}.", stream_before(layer)
        self.rows = {row.name: row for row in table_of(m.config)}
        self.last = len(ids) - 1
        self.shown = _some(len(ids), TOKENS_SHOWN)

    # Each method is a step, in order.

    def tokens(self) -> Step:
        rows = [(i, self.ids[i], self.pieces[i]) if i is not None else ("…", "…", "…") for i in _some(len(self.ids), 24)]
        if self.model.tokenizer is None:
            return Step(
                "Tokens",
                "This model came without a tokenizer, so the prompt is given as ids: these numbers are all that the "
                "model sees.",
                shape=f"tokens [T] = [{len(self.ids)}]",
                tables=(Table(("position", "id"), tuple(row[:2] for row in rows)),),
                sources=(Source.of(model.check_tokens),),
            )
        return Step(
            "Tokens",
            "The tokenizer cuts the text into pieces that it knows, and gives each piece's number in its vocabulary of "
            f"{self.model.tokenizer.vocab_size:,}: these numbers are all that the model sees.",
            formula="ids = encode(text)",
            shape=f"tokens [T] = [{len(self.ids)}]",
            tables=(Table(("position", "id", "piece"), tuple(rows)),),
            sources=(Source.of(type(self.model.tokenizer).encode),),
        )

    def embeddings(self) -> Step:
        c = self.config
        return Step(
            "Embeddings",
            f"Each id names a row of the embedding matrix: {c.dim} learned numbers that stand for the token, wherever in "
            "the text it is.",
            formula=f"{self._formulas('tok_embeddings')},  E = tok_embeddings.weight",
            shape=f"weight [V, D] = [{c.vocab_size}, {c.dim}]  ->  x [T, D] = [{len(self.ids)}, {c.dim}]",
            tables=(self._token_table(self.seen["tok_embeddings"]),),
            **self._computed("tok_embeddings", linear.embed),
        )

    def attention_norm(self) -> Step:
        each = "Each" if self.layer == 0 else f"After layer {self.layer - 1}, each"
        return self._norm(
            f"RMSNorm, before layer {self.layer}'s attention",
            f"{each} token's numbers are divided by their root mean square, so that their size is 1 whatever came in, "
            "and each is then multiplied by a learned weight of its own.",
            "attention_norm",
            self.before,
        )

    def projections(self) -> Step:
        c, name = self.config, self.name + "attention."
        q, k, v = (self.seen[name + x][self.last].reshape(-1) for x in "qkv")
        shapes = [
            f"w{x} [{heads}·K, D] = [{n * c.head_dim}, {c.dim}]  ->  {x} [T, {heads}·K] = [{len(self.ids)}, {n * c.head_dim}]"
            for x, heads, n in (("q", "H", c.n_heads), ("k", "G", c.n_kv_heads), ("v", "G", c.n_kv_heads))
        ]
        return Step(
            "Queries, keys and values",
            "Three matrices make three things of each token: a query (what it looks for), a key (what it is found by) and a "
            "value (what it gives to those who find it).",
            formula=self._formulas("attention.q", "attention.k", "attention.v"),
            shape="\n".join(shapes),
            tables=(_numbers_table([("q", q), ("k", k), ("v", v)], f"the last token, {self.pieces[self.last]}"),),
            **self._computed([name + "q", name + "k", name + "v"], linear.linears, linear.linear),
        )

    def split_heads(self) -> Step:
        c, name = self.config, self.name + "attention."
        share = c.n_heads // c.n_kv_heads
        if share == 1:
            sharing = "every head has keys and values of its own."
        else:
            sharing = (
                f"{share} query heads share each key/value head (grouped queries), so that query head {self.head} uses "
                f"key/value head {self.head} // {share} = {self.group}."
            )
        rows = [
            (f"q, head {self.head}", self.seen[name + "q"][self.last, self.head]),
            (f"k, head {self.group}", self.seen[name + "k"][self.last, self.group]),
            (f"v, head {self.group}", self.seen[name + "v"][self.last, self.group]),
        ]
        return Step(
            "Heads",
            f"The long rows are cut into heads of {c.head_dim} numbers, which look at the text independently; {sharing}",
            formula="q.reshape(T, H, K),  k.reshape(T, G, K),  v.reshape(T, G, K)",
            shape=f"q [T, H, K] = {_shape(self.seen[name + 'q'])};  k, v [T, G, K] = {_shape(self.seen[name + 'k'])}",
            tables=(_numbers_table(rows, f"the last token, {self.pieces[self.last]}"),),
            **self._computed([name + "q", name + "k", name + "v"], model.split_heads),
        )

    def frequencies(self) -> Step:
        c = self.config
        θ = self.seen.returned["rope_frequencies"]
        rows = []
        for j in _some(len(θ), SHOWN + 1):
            turns = ("…",) * 4 if j is None else (j, float(θ[j]), 2 * math.pi / float(θ[j]), self.last * float(θ[j]))
            rows.append(turns)
        scaled = "" if c.rope_scaling is None else "; this model's slow pairs are slowed further, for a longer context"
        return Step(
            "RoPE: a speed for each pair",
            "A head's numbers are taken in neighbouring pairs, and each pair is a point on a plane that turns as the position "
            "grows: pair 0 by one radian a token, the later ones ever more slowly, so that some tell neighbours apart and some "
            f"whole passages{scaled}.",
            formula=f"θ_j = theta^(-2j/K),  theta = {c.rope_theta:g},  K = {c.head_dim};  angle = m·θ_j",
            shape=f"frequencies [K/2] = {_shape(θ)}",
            tables=(Table(("pair j", "θ_j", "tokens a turn", f"angle at m = {self.last}"), tuple(rows)),),
            sources=(Source.of(ops.rope_frequencies), Source.of(ops.rope_rotation)),
            called=self._line("norm").calling(ops.rope_frequencies),
        )

    def rotation(self) -> Step:
        name, m, j = self.name + "attention.", self.last, min(1, self.config.head_dim // 2 - 1)
        cos, sin = (x[m, 0, j] for x in self.seen.returned["rope_rotation"])
        rows = []
        for what, head in (("q", self.head), ("k", self.group)):
            for state in ("", "_rope"):
                x, y = self.seen[name + what + state][m, head, 2 * j : 2 * j + 2]
                rows.append(
                    (f"{what} {'after' if state else 'before'}", float(x), float(y), math.hypot(x, y), math.atan2(y, x))
                )
        θ = self.seen.returned["rope_frequencies"][j]
        turn = f"the last token's pair {j}: m·θ = {m} · {θ:.4f} = {m * θ:.4f}, cos {cos:.4f}, sin {sin:.4f}"
        first = "; at position 0 nothing turns" if m == 0 else ""
        return Step(
            "RoPE: one pair followed",
            "Queries and keys are turned, values are not: turning keeps a pair's length and adds the angle to its direction "
            "(up to whole turns), so that a query's product with a key sees of their positions only the "
            f"distance{first}.",
            formula=f"y[2j] + i·y[2j+1] = (x[2j] + i·x[2j+1]) · e^(i·m·θ_j),  here j = {j}",
            shape=f"q [T, H, K] = {_shape(self.seen[name + 'q_rope'])},  k [T, G, K] = {_shape(self.seen[name + 'k_rope'])}",
            tables=(Table(("", f"x[{2 * j}]", f"x[{2 * j + 1}]", "length", "direction"), tuple(rows), turn),),
            **self._computed([name + "q_rope", name + "k_rope"], ops.rope),
        )

    def scores(self) -> Step:
        c, name = self.config, self.name + "attention."
        q = self.seen[name + "q_rope"][:, [self.head]]
        keys = self.seen[name + "k_rope"][:, [self.group]].swapaxes(-2, -3)
        unmasked = ops.attention_scores(q, keys, np.zeros_like(self.seen.returned["causal_mask"]))[0]
        return Step(
            "Scores",
            "Every query is multiplied with every key, and the larger the product, the better they match; the division by √K "
            "keeps the products from growing with the head's width.",
            formula=f"scores = q·k / sqrt(K),  sqrt({c.head_dim}) = {math.sqrt(c.head_dim):.4f}",
            shape=f"q [T, H, K], k [G, S, K]  ->  [H, T, S] = {_shape(self.seen[name + 'scores'])}",
            tables=(self._square(unmasked, f"head {self.head} before the mask; a row is a query, a column a key"),),
            sources=(Source.of(ops.query_key_products), Source.of(ops.attention_scores)),
            called=self._line(name + "scores"),
        )

    def mask(self) -> Step:
        name = self.name + "attention.scores"
        return Step(
            "The causal mask",
            "A token may look at itself and at what came before it: minus infinity is added to the scores of all that comes "
            "after, so that no position sees the answer that it is to predict.",
            formula="scores + mask,  mask = 0 where the key's position ≤ the query's, else -inf",
            shape=f"mask [1, T, S] = {_shape(self.seen.returned['causal_mask'])}",
            tables=(self._square(self.seen[name][self.head], f"head {self.head}, masked"),),
            taps=(name,),
            sources=(Source.of(ops.causal_mask), Source.of(ops.attention_scores)),
            called=self._line("norm").calling(ops.causal_mask),
        )

    def softmax(self) -> Step:
        name = self.name + "attention.weights"
        weights = self.seen[name][self.head]
        most = np.argsort(-weights[self.last], kind="stable")[:CANDIDATES]
        looked = tuple((self.pieces[i], int(i), float(weights[self.last, i])) for i in most)
        return Step(
            "Softmax",
            self.rows["attention.weights"].sentence,
            formula=self._formulas("attention.weights"),
            shape=f"[H, T, S] = {_shape(self.seen[name])}",
            tables=(
                self._square(weights, f"head {self.head}; the last column is the row's sum", sums=True),
                Table(("piece", "position", "weight"), looked, f"what the last token, {self.pieces[self.last]}, looks at"),
            ),
            **self._computed(name, ops.softmax),
        )

    def values(self) -> Step:
        name = self.name + "attention."
        weights, v = self.seen[name + "weights"][self.head, self.last], self.seen[name + "v"][:, self.group]
        most = np.argsort(-weights, kind="stable")[:3]
        rows = [(f"{weights[i]:.3f} · v of {self.pieces[i]}", v[i]) for i in most]
        rows.append(("sum over all", self.seen[name + "heads"][self.last, self.head]))
        return Step(
            "Values, averaged",
            self.rows["attention.heads"].sentence,
            formula=self._formulas("attention.heads"),
            shape=f"[H, T, S], [G, S, K]  ->  [T, H, K] = {_shape(self.seen[name + 'heads'])}",
            tables=(_numbers_table(rows, f"the last token in head {self.head}, its largest weights first", shown=SHOWN - 1),),
            **self._computed(name + "heads", ops.attention_heads),
        )

    def joined(self) -> Step:
        c, name = self.config, self.name + "attention."
        width = c.n_heads * c.head_dim
        rows = [(self.pieces[i], self.seen[name + "out"][i]) if i is not None else None for i in self.shown]
        return Step(
            "Heads joined, and wo",
            f"The {c.n_heads} heads are laid side by side again, and a matrix mixes what they found back to the width of the "
            "model.",
            formula=self._formulas("attention.out"),
            shape=f"[T, H, K]  ->  [T, H·K] = [{len(self.ids)}, {width}]  ->  [T, D] = {_shape(self.seen[name + 'out'])}",
            tables=(_numbers_table(rows),),
            **self._computed(name + "out", model.join_heads, linear.linear),
        )

    def attention_residual(self) -> Step:
        return self._residual("The residual", model.self_attention, "attention_residual")

    def ffn_norm(self) -> Step:
        return self._norm(
            "RMSNorm, before the feed-forward",
            self.rows["ffn_norm"].sentence,
            "ffn_norm",
            self.name + "attention_residual",
        )

    def swiglu(self) -> Step:
        c, name = self.config, self.name + "feed_forward."
        gate, up, act = (self.seen[name + x][self.last] for x in ("gate", "up", "act"))
        rows = [("gate = w1 x", gate), ("silu(gate)", ops.silu(gate)), ("up = w3 x", up), ("act", act)]
        return Step(
            "SwiGLU",
            f"Now each token is worked on by itself, at a width of {c.ffn_dim}: one matrix makes gates, another makes "
            "numbers, and each number is multiplied by silu of its gate, which leaves large gates nearly as they are and lets "
            "through little of negative ones: it is never below -0.28.",
            formula=self._formulas(*(f"feed_forward.{x}" for x in ("gate", "up", "act"))) + "\nsilu(z) = z / (1 + exp(-z))",
            shape=f"w1, w3 [F, D] = [{c.ffn_dim}, {c.dim}]  ->  gate, up, act [T, F] = {_shape(self.seen[name + 'act'])}",
            tables=(_numbers_table(rows, f"the last token, {self.pieces[self.last]}"),),
            **self._computed([name + "gate", name + "up", name + "act"], linear.linears, ops.silu, ops.swiglu),
        )

    def ffn_out(self) -> Step:
        c = self.config
        title = "Back to the model's width, and the second residual"
        step = self._residual(title, model.feed_forward, "feed_forward.out", "out")
        shape = f"w2 [D, F] = [{c.dim}, {c.ffn_dim}]  ->  [T, D] = {_shape(self.seen[self.name + 'out'])}"
        return Step(**{**vars(step), "shape": shape})

    def layers(self) -> Step:
        names = [stream_before(i) for i in range(self.config.n_layers + 1)]
        rows: list[tuple[Cell, ...]] = []
        for i in _some(len(names), LAYERS_SHOWN):
            if i is None:
                rows.append(("…",) * 4)
                continue
            x = self.seen[names[i]]
            rms = np.sqrt(np.mean(np.square(x), axis=-1))
            rows.append((names[i], float(x[self.last, 0]), float(rms[self.last]), float(np.mean(rms))))
        return Step(
            "All the layers",
            f"The same block runs {self.config.n_layers} times in a loop, with other weights each time, and each layer adds "
            f"to what runs through, the residual stream, which mostly grows.{self._outlier(names)}",
            formula=f"for layer in range({self.config.n_layers}):  x = block(x, layer)",
            shape=f"x [T, D] = {_shape(self.seen[names[-1]])} after every layer",
            tables=(Table(("after", "last token's x[0]", "its root mean square", "of all tokens"), tuple(rows)),),
            taps=("layers.N.out",),
            sources=(Source.of(model.block),),
            called=self._line("norm").calling(model.block),
        )

    def _outlier(self, names: list[str]) -> str:
        """A sentence, where in a line of the table one token makes the mean of all much larger than the last token's."""
        shown = [names[i] for i in _some(len(names), LAYERS_SHOWN) if i is not None]
        rms = np.array([np.sqrt(np.mean(np.square(self.seen[name], dtype=np.float64), axis=-1)) for name in shown])  # [., T]
        line = int(np.argmax(rms.mean(axis=1) / rms[:, self.last]))
        token, sizes = int(np.argmax(rms[line])), rms[line]
        if sizes.mean() < 4 * sizes[self.last] or sizes[token] < sizes.sum() / 2:
            return ""
        which = "the first" if token == 0 else f"position {token}"
        return (
            f" The mean of all tokens is large because of one, {which}, {self.pieces[token]}: after {shown[line]} its own is "
            f"{sizes[token]:.0f}. Many models have such massive activations (Sun et al. 2024, arXiv:2402.17762)."
        )

    def final_norm(self) -> Step:
        return self._norm("The final RMSNorm", self.rows["norm"].sentence, "norm", stream_before(self.config.n_layers))

    def logits(self) -> Step:
        c = self.config
        logits = self.seen["logits"]
        output = "the embedding itself (tied)" if c.tied_embeddings else "a matrix of its own"
        letter, row = "E" if c.tied_embeddings else "Output", self.rows["logits"]
        return Step(
            "Logits",
            f"The output matrix is {output}. It gives every token of the vocabulary a score for how well it would follow. "
            "Row t scores what comes after token t, so one text trains T predictions; the last row predicts what comes next.",
            formula=f"{row.formula},  {letter} = {row.parameter(c, None)}",
            shape=f"{letter} [V, D] = [{c.vocab_size}, {c.dim}]  ->  [T, V] = {_shape(logits)}",
            tables=(self._token_table(logits, f"the scores of ids 0 to {min(SHOWN, c.vocab_size) - 1}"),),
            **self._computed("logits", linear.linear),
        )

    def candidates(self) -> Step:
        logits = self.seen["logits"][self.last]
        p = ops.softmax(logits)
        best = np.argsort(-logits, kind="stable")[:CANDIDATES]
        rows = tuple((int(i), self._piece(int(i)), float(logits[i]), float(p[i])) for i in best)
        return Step(
            "Probabilities",
            f"Softmax of the last row: how likely each of the {len(logits):,} tokens is to come next; the first "
            f"{len(best)} have {float(p[best].sum()):.1%} together.",
            formula="p = softmax(logits[last])",
            shape=f"[V] = {_shape(p)}, sums to {float(p.sum()):.6f}",
            tables=(Table(("id", "piece", "logit", "probability"), rows),),
            taps=("logits",),
            sources=(Source.of(ops.softmax),),
        )

    def chosen(self) -> Step:
        logits = self.seen["logits"][self.last]
        id = sampling.sample(logits, sampling.Sampling(), np.random.default_rng(0))
        return Step(
            "The chosen token",
            f"Greedily, the likeliest: {self._piece(id)}, id {id}. It is appended, and the pass runs again on that token "
            "alone: the keys and values of the others are in the cache.",
            formula="next = argmax(logits[last])",
            shape=f"[V] = {_shape(logits)}  ->  one id",
            tables=(Table(("id", "piece", "logit"), ((id, self._piece(id), float(logits[id])),)),),
            taps=("logits",),
            sources=(Source.of(sampling.sample), Source.of(model.KVCache.update)),
        )

    # What several steps have in common.

    def _computed(self, taps: str | list[str], *functions) -> dict[str, object]:
        taps = [taps] if isinstance(taps, str) else taps
        sources = tuple(Source.of(function) for function in functions)
        return {"taps": tuple(taps), "sources": sources, "called": self._line(taps[0]).calling(functions[0])}

    def _line(self, name: str) -> Source:
        """The line of model.py that has the activation of the chosen layer, or of none."""
        return computed_at()[name.removeprefix(self.name)]

    def _piece(self, id: int, cells: int = LABEL_CELLS) -> str:
        return label(self.model.tokenizer.piece(id), cells) if self.model.tokenizer else f"#{id}"

    def _formulas(self, *kinds: str) -> str:
        """The formulas of the activation table, beside each other."""
        return ",  ".join(self.rows[kind].formula for kind in kinds)

    def _norm(self, title: str, sentence: str, kind: str, before: str) -> Step:
        after, of = self.rows[kind].full_name(self.layer), "h" if kind == "ffn_norm" else "x"
        x, y, eps = self.seen[before][self.last], self.seen[after][self.last], self.config.norm_eps
        rows = [(of, x), ("weight", self.model.params[after + ".weight"]), ("y", y)]
        size = f"the last token, {self.pieces[self.last]}: sqrt(mean({of}²)) = {np.sqrt(np.mean(np.square(x))):.4f}"
        return Step(
            title,
            sentence,
            formula=f"{self._formulas(kind)},  eps = {eps:g}",
            shape=f"{of} [T, D], weight [D]  ->  y [T, D] = {_shape(self.seen[after])}",
            tables=(_numbers_table(rows, size),),
            **self._computed(after, ops.rms_norm),
        )

    def _residual(self, title: str, function: Callable, *kinds: str) -> Step:
        """The last of the kinds is the sum; the function makes what is added."""
        row = self.rows[kinds[-1]]
        names = [self.before if name == STREAM else self.name + name for name in (*row.inputs, row.name)]
        left, stream, added = re.fullmatch(r"(\S+) = (\S+) \+ (\S+)", row.formula).groups()
        rows = [
            (label, self.seen[name][self.last]) for label, name in zip((stream, f"+ {added}", f"= {left}"), names, strict=True)
        ]
        return Step(
            title,
            " ".join(self.rows[kind].sentence for kind in kinds),
            formula=self._formulas(*kinds),
            shape=f"[T, D] = {_shape(self.seen[names[-1]])}",
            tables=(_numbers_table(rows, f"the last token, {self.pieces[self.last]}", shown=SHOWN - 1),),
            **self._computed(names[-1], function),
        )

    def _token_table(self, x: np.ndarray, caption: str = "") -> Table:
        return _numbers_table([(self.pieces[i], x[i]) if i is not None else None for i in self.shown], caption)

    def _square(self, x: np.ndarray, caption: str, sums: bool = False) -> Table:
        """Some tokens against the same.    x [T, S]"""
        names = [self._piece(self.ids[i], HEADING_CELLS) if i is not None else "…" for i in self.shown]
        rows = []
        for i in self.shown:
            row = [float(x[i, j]) if i is not None and j is not None else "…" for j in self.shown]
            rows.append(
                (
                    self.pieces[i] if i is not None else "…",
                    *row,
                    *([float(x[i].sum()) if i is not None else "…"] if sums else []),
                )
            )
        return Table(("", *names, *(["sum"] if sums else [])), tuple(rows), caption)


def _some(n: int, most: int) -> list[int | None]:
    """Indices below n: all, or the first and the last with None for those left out between."""
    if n <= most:
        return list(range(n))
    tail = most // 2
    return [*range(most - tail), None, *range(n - tail, n)]


def _shape(x: np.ndarray) -> str:
    return str(list(x.shape))


def _numbers_table(rows: Sequence[tuple[str, np.ndarray] | None], caption: str = "", shown: int = SHOWN) -> Table:
    """The first numbers of rows that are as long as each other; None is a row left out."""
    width = next(len(row[1]) for row in rows if row is not None)
    n = min(width, shown)
    more = ("…",) if width > n else ()
    cells = [("…",) * (1 + n + len(more)) if row is None else (row[0], *map(float, row[1][:n]), *more) for row in rows]
    return Table(("", *(f"[{i}]" for i in range(n)), *more), tuple(cells), caption)
