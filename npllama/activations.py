"""The activation table: what forward() computes, one row an activation, in the order of computation.

Everything else that needs facts about activations derives them from this table: the shapes of a trace, the order and inputs of
a comparison, the judgement of a single operation, the texts of pages and lessons. The columns of a row:

    name       as passed to the tap, without `layers.N.` for a layer's activations
    axes       of one sequence's array, in the dimension key of model.py; a batch adds B in front
    inputs     the activations of this pass that it is computed from; STREAM is the residual stream before this layer
    slots      one more input: this activation of all tokens so far, from the cache
    operation  the field of Ops that computes it, or ADD
    weight     the name of the parameter that the operation takes, without `layers.N.` and `.weight`
    formula    in plain text; x, y and h are the residual stream before attention, normed, and before the feed-forward
    tex        the same for typesetting; t counts tokens, n slots, h heads, j pairs, and m is a token's position
    sentence   a description of the step, for readers
    functions  the functions of ops.py, linear.py and model.py that compute it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from . import model, ops
from .config import Config
from .engine import linear
from .engine.linear import Weight
from .model import PLAIN, Rotation
from .scope import Array, Ops

TOKENS, STREAM = "tokens", "stream"  # inputs that aren't activations of this layer
ADD = "add"  # the residual connection: an operation that isn't one of Ops


@dataclass(frozen=True, eq=False)  # rows compare by identity: `row in LAYER` compares no texts
class Activation:
    """One row of the table; the module's docstring explains its columns."""

    name: str
    axes: str
    inputs: tuple[str, ...]
    operation: str
    formula: str
    tex: str
    sentence: str
    functions: tuple[Callable, ...]
    weight: str = ""
    slots: str = ""

    @property
    def in_layer(self) -> bool:
        """Return whether each layer has one."""
        return self in LAYER

    def full_name(self, layer: int | str | None) -> str:
        """Return the name that the tap is given; layer counts only for an activation of a layer."""
        return f"layers.{layer}.{self.name}" if self.in_layer else self.name

    def parameter(self, config: Config, layer: int | None) -> str:
        """Return the name of the weight among the model's parameters."""
        weight = "tok_embeddings" if self.weight == "output" and config.tied_embeddings else self.weight
        return f"layers.{layer}.{weight}.weight" if self.in_layer else f"{weight}.weight"

    def compute(self, inputs: Sequence[Array], weight: Weight | None, context: Context) -> Array:
        """Compute the activation by one call of its operation; inputs are arrays in the order of the column."""
        arguments: list = list(inputs)
        if model.join_heads in self.functions:
            arguments = [model.join_heads(x) for x in arguments]
        if self.slots:
            arguments.append(context.slots[self.slots])
        if self.weight:
            arguments.append(weight)
        operation = np.add if self.operation == ADD else getattr(context.ops, self.operation)
        if self.operation in CONSTANTS:
            arguments += CONSTANTS[self.operation](context)
        y = operation(*arguments)
        if self.operation == "linears":  # of several weights at once; here one
            [y] = y
        if model.split_heads in self.functions:
            return model.split_heads(y, sizes(_given(context.config, "config"))[self.axes[-2]])
        return y


@dataclass(frozen=True)
class Context:
    """The inputs of a pass's operations other than its activations and weights.

    config    the constants
    rotation  of this pass's tokens, as ops.rope takes it
    mask      [..., 1, T, S]
    slots     activation -> its array in the cache, this pass's tokens included: [..., G, S, K]

    Each of the first three may be None where no operation that is called needs it.
    """

    config: Config | None
    rotation: Rotation | None
    mask: Array | None
    slots: Mapping[str, Array] = field(default_factory=dict)
    ops: Ops = PLAIN


T = TypeVar("T")


def _given(x: T | None, name: str) -> T:
    """Return a field of a Context that an operation needs; ValueError if it is None."""
    if x is None:
        raise ValueError(f"the context has no {name}, which this operation needs")
    return x


CONSTANTS: dict[str, Callable[[Context], tuple]] = {  # operation -> its arguments after inputs and weight
    "rms_norm": lambda context: (_given(context.config, "config").norm_eps,),
    "rope": lambda context: _given(context.rotation, "rotation"),
    "attention_scores": lambda context: (_given(context.mask, "mask"),),
}

PRODUCTS = (linear.linears, linear.linear)  # several weights by one x
ROPE = (ops.rope, ops.rope_rotation, ops.rope_frequencies)
NORM_TEX = r"y = \frac{%s}{\sqrt{\operatorname{mean}(%s^2) + \varepsilon}} \odot w"
SHARED = r"\lfloor h/R \rfloor"  # the key/value head of query head h

BEFORE = (
    Activation(
        name="tok_embeddings",
        axes="TD",
        inputs=(TOKENS,),
        operation="embed",
        weight="tok_embeddings",
        formula="x = E[id]",
        tex=r"x = E_{\mathrm{id}}",
        sentence="Each token's id selects a row of the embedding matrix.",
        functions=(linear.embed,),
    ),
)
LAYER = (
    Activation(
        name="attention_norm",
        axes="TD",
        inputs=(STREAM,),
        operation="rms_norm",
        weight="attention_norm",
        formula="y = x / sqrt(mean(x²) + eps) · weight",
        tex=NORM_TEX % ("x", "x"),
        sentence="The residual stream is scaled to unit root-mean-square, then by a learned weight, before attention reads it.",
        functions=(ops.rms_norm,),
    ),
    Activation(
        name="attention.q",
        axes="THK",
        inputs=("attention_norm",),
        operation="linears",
        weight="attention.wq",
        formula="q = y Wqᵀ",
        tex=r"q = y W_q^{\mathsf{T}}",
        sentence="Queries: what each token looks for, split into H heads.",
        functions=(*PRODUCTS, model.split_heads),
    ),
    Activation(
        name="attention.k",
        axes="TGK",
        inputs=("attention_norm",),
        operation="linears",
        weight="attention.wk",
        formula="k = y Wkᵀ",
        tex=r"k = y W_k^{\mathsf{T}}",
        sentence="Keys: what each token is found by, split into G heads; R = H / G query heads share each of them.",
        functions=(*PRODUCTS, model.split_heads),
    ),
    Activation(
        name="attention.v",
        axes="TGK",
        inputs=("attention_norm",),
        operation="linears",
        weight="attention.wv",
        formula="v = y Wvᵀ",
        tex=r"v = y W_v^{\mathsf{T}}",
        sentence="Values: what each token gives to the tokens that attend to it, split into G heads like the keys.",
        functions=(*PRODUCTS, model.split_heads),
    ),
    Activation(
        name="attention.q_rope",
        axes="THK",
        inputs=("attention.q",),
        operation="rope",
        formula="q_rope[2j] + i·q_rope[2j+1] = (q[2j] + i·q[2j+1]) · e^(i·m·θ_j)",
        tex=r"q'_{2j} + i\,q'_{2j+1} = (q_{2j} + i\,q_{2j+1})\,e^{i m \theta_j}",
        sentence="Each adjacent pair of a query's numbers is rotated by an angle that grows with the token's position m.",
        functions=ROPE,
    ),
    Activation(
        name="attention.k_rope",
        axes="TGK",
        inputs=("attention.k",),
        operation="rope",
        formula="k_rope[2j] + i·k_rope[2j+1] = (k[2j] + i·k[2j+1]) · e^(i·m·θ_j)",
        tex=r"k'_{2j} + i\,k'_{2j+1} = (k_{2j} + i\,k_{2j+1})\,e^{i m \theta_j}",
        sentence="Keys are rotated likewise, so that q·k depends on positions only by their distance.",
        functions=ROPE,
    ),
    Activation(
        name="attention.scores",
        axes="HTS",
        inputs=("attention.q_rope",),
        slots="attention.k_rope",
        operation="attention_scores",
        formula="scores = q_rope·k_rope / sqrt(K) + mask",
        tex=r"s_{htn} = \frac{q'_{th} \cdot k'_{n" + SHARED + r"}}{\sqrt{K}} + \mathrm{mask}_{tn}",
        sentence="How well each query matches each key; -inf for keys of later positions.",
        functions=(ops.attention_scores, ops.query_key_products, ops.causal_mask),
    ),
    Activation(
        name="attention.weights",
        axes="HTS",
        inputs=("attention.scores",),
        operation="softmax",
        formula="weights = exp(scores - max) / sum(exp(scores - max))",
        tex=r"p_{htn} = \frac{e^{s_{htn} - \max_{n'} s_{htn'}}}{\sum_{n''} e^{s_{htn''} - \max_{n'} s_{htn'}}}",
        sentence="Softmax turns each row of scores into weights that sum to 1, none negative; -inf becomes exactly 0.",
        functions=(ops.softmax,),
    ),
    Activation(
        name="attention.heads",
        axes="THK",
        inputs=("attention.weights",),
        slots="attention.v",
        operation="attention_heads",
        formula="heads = weights · v",
        tex=r"z_{th} = \sum_n p_{htn}\,v_{n" + SHARED + "}",
        sentence="Each head averages, for each token, the values of the tokens that it attends to, by these weights.",
        functions=(ops.attention_heads,),
    ),
    Activation(
        name="attention.out",
        axes="TD",
        inputs=("attention.heads",),
        operation="linear",
        weight="attention.wo",
        formula="attention.out = join_heads(heads) Woᵀ",
        tex=r"a_t = [z_{t0}, \dots, z_{t,H-1}]\,W_o^{\mathsf{T}}",
        sentence="The heads are concatenated and projected back to the model's width.",
        functions=(model.join_heads, linear.linear),
    ),
    Activation(
        name="attention_residual",
        axes="TD",
        inputs=(STREAM, "attention.out"),
        operation=ADD,
        formula="h = x + attention.out",
        tex="h = x + a",
        sentence="Attention's output is added to the residual stream: a layer changes it and never replaces it.",
        functions=(model.block,),
    ),
    Activation(
        name="ffn_norm",
        axes="TD",
        inputs=("attention_residual",),
        operation="rms_norm",
        weight="ffn_norm",
        formula="y = h / sqrt(mean(h²) + eps) · weight",
        tex=NORM_TEX % ("h", "h"),
        sentence="The residual stream is scaled again, with other weights, before the feed-forward reads it.",
        functions=(ops.rms_norm,),
    ),
    Activation(
        name="feed_forward.gate",
        axes="TF",
        inputs=("ffn_norm",),
        operation="linears",
        weight="feed_forward.w1",
        formula="gate = y W1ᵀ",
        tex=r"\mathrm{gate} = y W_1^{\mathsf{T}}",
        sentence="The gate projection: how far each of F channels opens.",
        functions=PRODUCTS,
    ),
    Activation(
        name="feed_forward.up",
        axes="TF",
        inputs=("ffn_norm",),
        operation="linears",
        weight="feed_forward.w3",
        formula="up = y W3ᵀ",
        tex=r"\mathrm{up} = y W_3^{\mathsf{T}}",
        sentence="The up projection: what passes through each channel.",
        functions=PRODUCTS,
    ),
    Activation(
        name="feed_forward.act",
        axes="TF",
        inputs=("feed_forward.gate", "feed_forward.up"),
        operation="swiglu",
        formula="act = silu(gate) · up",
        tex=r"\mathrm{act} = \mathrm{silu}(\mathrm{gate}) \odot \mathrm{up}, \quad \mathrm{silu}(z) = \frac{z}{1 + e^{-z}}",
        sentence="SwiGLU: silu of the gate times the up projection, number by number.",
        functions=(ops.swiglu, ops.silu),
    ),
    Activation(
        name="feed_forward.out",
        axes="TD",
        inputs=("feed_forward.act",),
        operation="linear",
        weight="feed_forward.w2",
        formula="feed_forward.out = act W2ᵀ",
        tex=r"f = \mathrm{act}\,W_2^{\mathsf{T}}",
        sentence="The down projection returns to the model's width.",
        functions=(linear.linear, model.feed_forward),
    ),
    Activation(
        name="out",
        axes="TD",
        inputs=("attention_residual", "feed_forward.out"),
        operation=ADD,
        formula="out = h + feed_forward.out",
        tex=r"x_{\mathrm{out}} = h + f",
        sentence="The feed-forward's output is added to the residual stream: the layer's output.",
        functions=(model.block,),
    ),
)
AFTER = (
    Activation(
        name="norm",
        axes="TD",
        inputs=(STREAM,),
        operation="rms_norm",
        weight="norm",
        formula="y = x / sqrt(mean(x²) + eps) · weight",
        tex=NORM_TEX % ("x", "x"),
        sentence="After the last layer, the residual stream is scaled once more.",
        functions=(ops.rms_norm,),
    ),
    Activation(
        name="logits",
        axes="TV",
        inputs=("norm",),
        operation="linear",
        weight="output",
        formula="logits = y Outputᵀ",
        tex=r"\mathrm{logits} = y W_{\mathrm{output}}^{\mathsf{T}}",
        sentence="A score for every token of the vocabulary: which one comes next?",
        functions=(linear.linear,),
    ),
)
TABLE = {row.name: row for row in (*BEFORE, *LAYER, *AFTER)}


def table_of(config: Config) -> tuple[Activation, ...]:
    """Return the rows, with E in the formula of the logits where the output matrix is the embedding."""
    *rows, logits = TABLE.values()
    if config.tied_embeddings:
        logits = replace(logits, formula="logits = y Eᵀ", tex=r"\mathrm{logits} = y E^{\mathsf{T}}")
    return *rows, logits


def stream_before(layer: int) -> str:
    """Return the name of the residual stream that a layer gets; the number of layers stands for what is after them."""
    return f"layers.{layer - 1}.out" if layer else "tok_embeddings"


def sizes(config: Config) -> dict[str, int]:
    """Return the size of each axis that the model gives; T, S and B are the prompt's."""
    return {
        "D": config.dim,
        "F": config.ffn_dim,
        "V": config.vocab_size,
        "H": config.n_heads,
        "G": config.n_kv_heads,
        "K": config.head_dim,
    }


def activation_shapes(
    config: Config, n_tokens: int, n_slots: int | None = None, batch_shape: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every activation of one forward pass, in the order of computation.

    n_tokens is T; n_slots is S, the same where the cache was empty.
    """
    n = {**sizes(config), "T": n_tokens, "S": n_slots or n_tokens}
    rows = [*((row, None) for row in BEFORE), *((row, i) for i in range(config.n_layers) for row in LAYER)]
    rows += [(row, None) for row in AFTER]
    return {row.full_name(i): (*batch_shape, *(n[axis] for axis in row.axes)) for row, i in rows}
