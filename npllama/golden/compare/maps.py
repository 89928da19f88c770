"""Map the names and layouts that other programs give the activations to ours.

A map is {pattern: rule}. In a pattern `{i}` stands for the layer and `*` for any text; a `step.N/` in front is kept. The first
pattern that fits a name counts. A rule is null for a known name that has no counterpart here, else a canonical name, or an
object with `name` and any of

    axes       the candidate's axes in the dimension key, in its order: "H T K" for heads first, "T H*K" for joined heads,
               "S+" for an axis that may be longer than S (the rest is cut off), "T-" for one that may be the last tokens only,
               "a | b" for one or the other; axes of size 1 may be missing or added. Without it: as forward() has them,
               and only a batch axis of one in front is dropped.
    pairs      "halves" when RoPE rotates x[j] with x[j + K/2] (Hugging Face), "adjacent" (the default) for x[2j] with x[2j + 1]
    scale      "1/sqrt(K)": the candidate's numbers lack this factor
    unmasked   true: the candidate's scores come before its mask; hidden ones are left out of the comparison
    weight     a parameter, such as "layers.{i}.ffn_norm.weight", that the candidate's numbers lack as a factor; needs the model
    optional   true: the program doesn't always record it, so that its absence is said and is no failure

as in {"blk.{i}.q": {"name": "layers.{i}.attention.q", "axes": "H T K", "pairs": "halves"}}. A list of rules is for a name that
stands for several activations: the one counts whose shape fits, and of several the one that is nearest to the reference.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from ...activations import TABLE
from ...checkpoint.foreign import read_json
from ...engine.weights import widen
from ...errors import NpllamaError, printable, shown
from ...scope import Params
from .names import place


class MapError(NpllamaError):
    """A map can't be read, or two names of the candidate stand for the same activation."""


class LayoutError(NpllamaError):
    """An array doesn't have the axes that it should."""


class NeedsModel(NpllamaError):
    """An array lacks a weight that only the model has."""


@dataclass(frozen=True)
class Rule:
    """Give one candidate name's counterpart and layout; see the module's docstring."""

    name: str
    axes: str = ""
    pairs: str = "adjacent"
    scale: str = ""
    unmasked: bool = False
    weight: str = ""
    optional: bool = False


Rules = Mapping[str, "Rule | tuple[Rule, ...] | None"]


def _heads(name: str, pairs: str = "adjacent", axes: str = "T {}*K | T {} K", optional: bool = False) -> Rule:
    group = TABLE[name].axes[-2]  # H or G
    return Rule("layers.{i}." + name, axes.format(group, group), pairs, optional=optional)


# The output of each module of transformers' LlamaForCausalLM (models/llama/modeling_llama.py), as a forward hook sees it.
# RoPE, the scores, the weights, the heads and the residual after attention are not modules: `npllama capture` records them too.
# The rows of q_proj and k_proj are permuted so that RoPE rotates halves.
HF: Rules = {
    "model.embed_tokens": Rule("tok_embeddings"),
    "model.layers.{i}.input_layernorm": Rule("layers.{i}.attention_norm"),
    "model.layers.{i}.self_attn.q_proj": _heads("attention.q", "halves"),
    "model.layers.{i}.self_attn.k_proj": _heads("attention.k", "halves"),
    "model.layers.{i}.self_attn.v_proj": _heads("attention.v"),
    "model.layers.{i}.self_attn.o_proj": Rule("layers.{i}.attention.out"),
    "model.layers.{i}.post_attention_layernorm": Rule("layers.{i}.ffn_norm"),
    "model.layers.{i}.mlp.gate_proj": Rule("layers.{i}.feed_forward.gate"),
    "model.layers.{i}.mlp.up_proj": Rule("layers.{i}.feed_forward.up"),
    "model.layers.{i}.mlp.down_proj": Rule("layers.{i}.feed_forward.out"),
    "model.layers.{i}": Rule("layers.{i}.out"),
    "model.norm": Rule("norm"),
    "lm_head": Rule("logits", "T- V"),
    "model": None,  # the same as model.norm
    "model.rotary_emb": None,
    "model.layers.{i}.self_attn": None,  # the same as o_proj
    "model.layers.{i}.mlp": None,  # the same as down_proj
    "model.layers.{i}.mlp.act_fn": None,  # silu(gate), before it meets up
}

# mlx-lm names its modules as transformers does (models/llama.py). nn.RoPE is one module for queries, then keys: a recording
# that keeps the last has the keys. Attention is fused.
MLX_LM: Rules = {
    **HF,
    "model.layers.{i}.self_attn.rope": _heads("attention.k_rope", "halves", "{} T K", optional=True),
}

# The output of each module of litgpt's GPT (litgpt/model.py). Queries, keys and values are one product, and attention is fused.
LITGPT: Rules = {
    "transformer.wte": Rule("tok_embeddings"),
    "transformer.h.{i}.norm_1": Rule("layers.{i}.attention_norm"),
    "transformer.h.{i}.attn.proj": Rule("layers.{i}.attention.out"),
    "transformer.h.{i}.norm_2": Rule("layers.{i}.ffn_norm"),
    "transformer.h.{i}.mlp.fc_1": Rule("layers.{i}.feed_forward.gate"),
    "transformer.h.{i}.mlp.fc_2": Rule("layers.{i}.feed_forward.up"),
    "transformer.h.{i}.mlp.proj": Rule("layers.{i}.feed_forward.out"),
    "transformer.h.{i}": Rule("layers.{i}.out"),
    "transformer.ln_f": Rule("norm"),
    "lm_head": Rule("logits", "T- V"),
    "transformer.h.{i}.attn*": None,  # queries, keys and values in one; attention itself, which is the same as proj
    "transformer.h.{i}.mlp": None,
    "transformer.h.{i}.post_*": None,  # norms of other models
}

# The output of each module of Meta's Transformer (llama3/model.py of llama-models). RoPE and attention itself are functions.
META: Rules = {
    "tok_embeddings": Rule("tok_embeddings"),
    "layers.{i}.attention_norm": Rule("layers.{i}.attention_norm"),
    "layers.{i}.attention.wq": _heads("attention.q"),
    "layers.{i}.attention.wk": _heads("attention.k"),
    "layers.{i}.attention.wv": _heads("attention.v"),
    "layers.{i}.attention.wo": Rule("layers.{i}.attention.out"),
    "layers.{i}.ffn_norm": Rule("layers.{i}.ffn_norm"),
    "layers.{i}.feed_forward.w1": Rule("layers.{i}.feed_forward.gate"),
    "layers.{i}.feed_forward.w3": Rule("layers.{i}.feed_forward.up"),
    "layers.{i}.feed_forward.w2": Rule("layers.{i}.feed_forward.out"),
    "layers.{i}": Rule("layers.{i}.out"),
    "norm": Rule("norm"),
    "output": Rule("logits"),
    "layers.{i}.attention": None,  # the same as wo
    "layers.{i}.feed_forward": None,  # the same as w2
}

# The output of each layer of keras-hub's Llama backbones, by its path (models/llama/llama_decoder.py and llama_attention.py).
# Queries, keys and values are [T, heads, K] before RoPE, which rotates halves.
KERAS_HUB: Rules = {
    "token_embedding": Rule("tok_embeddings"),
    "transformer_layer_{i}/self_attention_layernorm": Rule("layers.{i}.attention_norm"),
    "transformer_layer_{i}/self_attention/query": _heads("attention.q", "halves", "T {} K"),
    "transformer_layer_{i}/self_attention/key": _heads("attention.k", "halves", "T {} K"),
    "transformer_layer_{i}/self_attention/value": _heads("attention.v", axes="T {} K"),
    "transformer_layer_{i}/self_attention/attention_output": Rule("layers.{i}.attention.out"),
    "transformer_layer_{i}/feedforward_layernorm": Rule("layers.{i}.ffn_norm"),
    "transformer_layer_{i}/feedforward_gate_dense": Rule("layers.{i}.feed_forward.gate"),
    "transformer_layer_{i}/feedforward_intermediate_dense": Rule("layers.{i}.feed_forward.up"),
    "transformer_layer_{i}/feedforward_output_dense": Rule("layers.{i}.feed_forward.out"),
    "transformer_layer_{i}": Rule("layers.{i}.out"),
    "sequence_output_layernorm": Rule("norm"),
    "logits": Rule("logits"),  # token_embedding(..., reverse=True)
    "transformer_layer_{i}/*": None,  # dropout, the softmax, RoPE; attention itself, which is the same as attention_output
    "*padding_mask*": None,
    "token_ids": None,
}

# The output of each module of torchtune's TransformerDecoder (torchtune/modules/transformer.py); its rows of q_proj and k_proj
# are Meta's. Attention is fused.
TORCHTUNE: Rules = {
    "tok_embeddings": Rule("tok_embeddings"),
    "layers.{i}.sa_norm": Rule("layers.{i}.attention_norm"),
    "layers.{i}.attn.q_proj": _heads("attention.q"),
    "layers.{i}.attn.k_proj": _heads("attention.k"),
    "layers.{i}.attn.v_proj": _heads("attention.v"),
    "layers.{i}.attn.output_proj": Rule("layers.{i}.attention.out"),
    "layers.{i}.mlp_norm": Rule("layers.{i}.ffn_norm"),
    "layers.{i}.mlp.w1": Rule("layers.{i}.feed_forward.gate"),
    "layers.{i}.mlp.w3": Rule("layers.{i}.feed_forward.up"),
    "layers.{i}.mlp.w2": Rule("layers.{i}.feed_forward.out"),
    "layers.{i}": Rule("layers.{i}.out"),
    "norm": Rule("norm"),
    "logits": Rule("logits"),  # what the model returns
    "output": None,  # the same; a tied model has none
    "layers.{i}.attn*": None,  # RoPE, one module for queries, then keys; attention itself, which is the same as output_proj
    "layers.{i}.mlp*": None,  # the same as w2; the activation
    "layers.{i}.*_scale": None,  # the identity
}

# karpathy/llama2.c has no names for its activations: these are for a record after each step of forward() in run.c, one row per
# position, named for the weight that made it (docs/capturing.md). RoPE rotates adjacent pairs.
LLAMA2_C: Rules = {
    "token_embedding_table": Rule("tok_embeddings"),
    "rms_att.{i}": Rule("layers.{i}.attention_norm"),
    "wq.{i}": _heads("attention.q"),
    "wk.{i}": _heads("attention.k"),
    "wv.{i}": _heads("attention.v"),
    "rope_q.{i}": _heads("attention.q_rope"),
    "rope_k.{i}": _heads("attention.k_rope"),
    "att.{i}": _heads("attention.heads"),
    "wo.{i}": Rule("layers.{i}.attention.out"),
    "x_att.{i}": Rule("layers.{i}.attention_residual"),
    "rms_ffn.{i}": Rule("layers.{i}.ffn_norm"),
    "w1.{i}": Rule("layers.{i}.feed_forward.gate"),
    "w3.{i}": Rule("layers.{i}.feed_forward.up"),
    "swiglu.{i}": Rule("layers.{i}.feed_forward.act"),
    "w2.{i}": Rule("layers.{i}.feed_forward.out"),
    "x.{i}": Rule("layers.{i}.out"),
    "rms_final": Rule("norm"),
    "wcls": Rule("logits"),
}

# The hook points of TransformerLens 3 and 4's TransformerBridge, which have kept the names of the class before it, for a model
# with or without folded norms: hook_normalized comes before the norm's weight. Its rotary embedding rotates halves.
TRANSFORMERLENS: Rules = {
    "hook_embed": Rule("tok_embeddings"),
    "blocks.{i}.ln1.hook_normalized": Rule("layers.{i}.attention_norm", weight="layers.{i}.attention_norm.weight"),
    "blocks.{i}.attn.hook_q": _heads("attention.q", "halves", "T {} K"),
    "blocks.{i}.attn.hook_k": _heads("attention.k", "halves", "T {} K"),
    "blocks.{i}.attn.hook_v": _heads("attention.v", axes="T {} K"),
    "blocks.{i}.attn.hook_rot_q": _heads("attention.q_rope", "halves", "T {} K"),
    "blocks.{i}.attn.hook_rot_k": _heads("attention.k_rope", "halves", "T {} K"),
    "blocks.{i}.attn.hook_attn_scores": Rule("layers.{i}.attention.scores"),
    "blocks.{i}.attn.hook_pattern": Rule("layers.{i}.attention.weights"),
    "blocks.{i}.attn.hook_z": _heads("attention.heads", axes="T {} K"),
    "blocks.{i}.hook_attn_out": Rule("layers.{i}.attention.out"),
    "blocks.{i}.hook_resid_mid": Rule("layers.{i}.attention_residual"),
    "blocks.{i}.ln2.hook_normalized": Rule("layers.{i}.ffn_norm", weight="layers.{i}.ffn_norm.weight"),
    "blocks.{i}.mlp.hook_pre": Rule("layers.{i}.feed_forward.gate"),
    "blocks.{i}.mlp.hook_pre_linear": Rule("layers.{i}.feed_forward.up"),
    "blocks.{i}.mlp.hook_post": Rule("layers.{i}.feed_forward.act"),
    "blocks.{i}.hook_mlp_out": Rule("layers.{i}.feed_forward.out"),
    "blocks.{i}.hook_resid_post": Rule("layers.{i}.out"),
    "ln_final.hook_normalized": Rule("norm", weight="norm.weight"),
    "logits": Rule("logits"),  # what the model returns; not a hook
    "blocks.{i}.hook_resid_pre": None,  # the same as the residual before
    "blocks.{i}.hook_attn_in": None,
    "blocks.{i}.hook_mlp_in": None,
    "blocks.{i}.ln1.hook_scale": None,
    "blocks.{i}.ln2.hook_scale": None,
    "blocks.{i}.attn.hook_result": None,
    "ln_final.hook_scale": None,
    "*hook_in": None,  # what goes into a bridged module and comes out of it, which the names above call by what it is
    "*hook_out": None,
    "*hook_cos": None,
    "*hook_sin": None,
    "hook_unembed": None,  # the same as what the model returns
}

# The names that llama.cpp's callback gives its tensors (src/models/llama.cpp; build_attn and build_ffn in src/llama-graph.cpp),
# their dimensions in the order of the bytes (the reverse of ne[]), with all four axes or without those of one. Qcur and Kcur
# name both sides of RoPE: in rows before it, in heads after it, where a dump that keeps the last of a name ends. kq is neither
# scaled nor masked; it has one column per cell of the cache, and is missing with flash attention. The last layer may compute
# only the tokens whose logits were asked for. GGUF files have Meta's order of rows in wq and wk.
GGML: Rules = {
    "inp_embd": Rule("tok_embeddings", "T D"),
    "embd": Rule("tok_embeddings", "T D"),
    "attn_norm-{i}": Rule("layers.{i}.attention_norm", "T D"),
    "Qcur-{i}": (_heads("attention.q", axes="T {}*K", optional=True), _heads("attention.q_rope", axes="T {} K | T {}*K")),
    "Kcur-{i}": (_heads("attention.k", axes="T {}*K", optional=True), _heads("attention.k_rope", axes="T {} K | T {}*K")),
    "Vcur-{i}": _heads("attention.v"),
    "kq-{i}": Rule("layers.{i}.attention.scores", "H T S+", scale="1/sqrt(K)", unmasked=True, optional=True),
    "kq_soft_max-{i}": Rule("layers.{i}.attention.weights", "H T S+", optional=True),
    "kq_soft_max_ext-{i}": Rule("layers.{i}.attention.weights", "H T S+", optional=True),  # its name until 2025
    "kqv_out-{i}": _heads("attention.heads"),
    "attn_out-{i}": Rule("layers.{i}.attention.out", "T- D"),
    "ffn_inp-{i}": Rule("layers.{i}.attention_residual", "T- D"),
    "ffn_norm-{i}": Rule("layers.{i}.ffn_norm", "T- D"),
    "ffn_gate-{i}": Rule("layers.{i}.feed_forward.gate", "T- F"),
    "ffn_up-{i}": Rule("layers.{i}.feed_forward.up", "T- F"),
    "ffn_swiglu-{i}": Rule("layers.{i}.feed_forward.act", "T- F"),
    "ffn_gate_par-{i}": Rule("layers.{i}.feed_forward.act", "T- F"),  # its name until 2025
    "ffn_out-{i}": Rule("layers.{i}.feed_forward.out", "T- D"),
    "l_out-{i}": Rule("layers.{i}.out", "T- D"),
    "result_norm": Rule("norm", "T- D"),
    "result_output": Rule("logits", "T- V"),
    "norm-{i}": None,  # before the norm's weight
    "norm": None,
    "ffn_silu-{i}": None,  # silu(gate), before it meets up
    "kqv-{i}": None,  # the heads before they are permuted
    "kqv_merged*": None,
    "__fattn__*": None,  # the same as kqv_out
    "*(*": None,  # views, reshapes, permutations and copies: "Qcur-0 (view)", "cache_k_l0 (view) (permuted)"
    "cache_*": None,
    "inp_*": None,  # token ids, positions, masks
    "KQ_mask*": None,
    "node_*": None,  # tensors and constants without a name
    "leaf_*": None,
    "*.weight": None,
}

BUILT_IN: dict[str, Rules] = {
    "hf": HF,
    "transformerlens": TRANSFORMERLENS,
    "ggml": GGML,
    "mlx-lm": MLX_LM,
    "litgpt": LITGPT,
    "meta": META,
    "keras-hub": KERAS_HUB,
    "torchtune": TORCHTUNE,
    "llama2.c": LLAMA2_C,
}


class NameMap:
    """Candidate name -> (canonical name, rule)."""

    def __init__(self, title: str, rules: Rules):
        self.title = title
        self._rules = [(_regex(pattern), _several(rule)) for pattern, rule in rules.items()]
        self._targets = [(_regex(rule.name), rule.optional) for rules in rules.values() for rule in _several(rules)]

    def find(self, name: str) -> tuple[str, Rule] | str | None:
        """Return the canonical name and rule; None for a name to be passed over, the name itself if the map doesn't know it."""
        found = self.find_all(name)
        return found if isinstance(found, str) else found[0] if found else None

    def find_all(self, name: str) -> list[tuple[str, Rule]] | str:
        """Return every activation that the name may stand for, with its rule; or the name itself if the map doesn't know it."""
        step, _, bare = name.rpartition("/") if re.match(r"step\.\d+/", name) else ("", "", name)
        for regex, rules in self._rules:
            if match := regex.fullmatch(bare):
                layer = match.groupdict().get("i", "")
                filled = [
                    replace(rule, name=rule.name.replace("{i}", layer), weight=rule.weight.replace("{i}", layer))
                    for rule in rules
                ]
                return [((f"{step}/" if step else "") + rule.name, rule) for rule in filled]
        return name

    def reaches(self, name: str) -> bool:
        """Return whether some candidate name would stand for this canonical name."""
        return bool(self._reached(name))

    def needs(self, name: str) -> bool:
        """Return whether a candidate must have this canonical name, by a rule that isn't optional."""
        return not all(self._reached(name))

    def _reached(self, name: str) -> list[bool]:
        bare = name.removeprefix(place(name).prefix)
        return [optional for regex, optional in self._targets if regex.fullmatch(bare)]


def _several(rule: Rule | tuple[Rule, ...] | None) -> tuple[Rule, ...]:
    return () if rule is None else (rule,) if isinstance(rule, Rule) else rule


class Unmapped(NameMap):
    """Map for a candidate with our own names and layouts."""

    def __init__(self) -> None:
        super().__init__("", {})

    def find_all(self, name: str) -> list[tuple[str, Rule]]:
        """Return the name itself."""
        return [(name, Rule(name))]

    def _reached(self, name: str) -> list[bool]:
        return [False]  # every name, and it must be there


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)", 1).replace(r"\*", ".*"), re.DOTALL)


def read_map(given: str | None) -> NameMap:
    """Return a built-in map by its name, or read one from a JSON file. Raises MapError."""
    if given is None:
        return Unmapped()
    if given in BUILT_IN:
        return NameMap(given, BUILT_IN[given])
    file = Path(given)
    if not file.exists():
        raise MapError(f"map {given}: No such file or directory; built-in maps: {', '.join(BUILT_IN)}")
    content = read_json(file, MapError)
    if not content:
        raise MapError(f"map {given}: empty, expected an object {{pattern: canonical name}}")
    rules: dict[str, Rule | tuple[Rule, ...] | None] = {}
    for pattern, rule in content.items():
        if isinstance(rule, list) and rule:
            rules[pattern] = tuple(_one_rule(given, pattern, choice) for choice in rule)
        else:
            rules[pattern] = None if rule is None else _one_rule(given, pattern, rule)
    return NameMap(given, rules)


AXES = re.compile(r"T-|[A-Z](\*[A-Z])*\+?")  # one of the candidate's axes, in the syntax of the module's docstring


def _one_rule(file: str, pattern: str, rule: object) -> Rule:
    where = f"map {file}: {printable(pattern)[:200]}"
    if isinstance(rule, str):
        rule = {"name": rule}
    known = {field.name: bool if field.name in ("unmasked", "optional") else str for field in fields(Rule)}
    if not isinstance(rule, dict) or not isinstance(rule.get("name"), str):
        raise MapError(f"{where} is {shown(rule)}, expected a canonical name, null or an object with `name`")
    for key, value in rule.items():
        if key not in known or not isinstance(value, known[key]):
            raise MapError(f"{where} has {printable(key)[:60]} {shown(value)}; known are {', '.join(known)}")
    made = Rule(**rule)
    axes = place(made.name.replace("{i}", "0")).axes
    if axes is None:
        raise MapError(f"{where} stands for {shown(made.name)}, which is not the name of an activation")
    if made.pairs not in ("adjacent", "halves") or made.scale not in ("", "1/sqrt(K)"):
        raise MapError(f"{where}: pairs is adjacent or halves, and scale 1/sqrt(K)")
    for choice in made.axes.split("|") if made.axes else []:
        found = [axis for token in choice.split() for axis in token.rstrip("+-").split("*")]
        if sorted(found) != sorted(axes) or not all(AXES.fullmatch(token) for token in choice.split()):
            raise MapError(f"{where} has the axes {shown(choice.strip())}, expected {' '.join(axes)} in some order")
    return made


def arrange(
    x: np.ndarray, name: str, rule: Rule, reference: np.ndarray, head_dim: int | None, params: Params | None
) -> np.ndarray:
    """Rearrange a candidate's array to our layout: the axes of `reference`, T perhaps shortened to the last tokens.

    Raises LayoutError when its shape is none that the rule allows, NeedsModel when the rule needs a parameter and has none,
    MapError when the model has no such parameter.
    """
    axes = place(name).axes
    if axes is None or not len(axes) <= reference.ndim <= len(axes) + 1:
        x = x[0] if x.ndim == reference.ndim + 1 and len(x) == 1 else x
        if x.shape != reference.shape:
            raise LayoutError(f"shape {list(x.shape)}, expected {list(reference.shape)}")
        return x
    batch = reference.shape[: reference.ndim - len(axes)]
    sizes = dict(zip(axes, reference.shape[len(batch) :], strict=True))
    x = _split_and_order(x, batch, axes, sizes, rule)
    if rule.pairs == "halves":
        K = x.shape[-1]
        x = np.stack([x[..., : K // 2], x[..., K // 2 :]], axis=-1).reshape(x.shape)
    if rule.scale:
        if head_dim is None:
            raise LayoutError("the head's size is not known, to scale by 1/sqrt(K)")
        x = x / np.asarray(math.sqrt(head_dim), x.dtype)
    if rule.weight:
        if params is None:
            raise NeedsModel(f"{name} comes before {rule.weight}")
        x = x * _factor(rule.weight, params, x.shape[-1]).astype(x.dtype)
    if rule.unmasked:
        x = np.where(np.isneginf(reference), np.asarray(-np.inf, x.dtype), x)
    return x


def _factor(name: str, params: Params, size: int) -> np.ndarray:
    """Return a parameter to multiply the last axis by; MapError if the model has none of that name and size."""
    if name not in params:
        close = difflib.get_close_matches(name, list(params), 1)
        raise MapError(f"weight is {name}, which the model doesn't have" + (f"; {close[0]} it has" if close else ""))
    weight = widen(params[name])
    if weight.shape != (size,):
        raise MapError(f"weight {name} has the shape {list(weight.shape)}, expected [{size}]")
    return weight


def fits(shape: tuple[int, ...], name: str, rule: Rule, reference: tuple[int, ...]) -> bool:
    """Return whether a candidate's array of this shape fits the rule, for a reference of that shape."""
    axes = place(name).axes
    if axes is None or not len(axes) <= len(reference) <= len(axes) + 1:
        return False
    batch = reference[: len(reference) - len(axes)]
    return _layout(shape, batch, dict(zip(axes, reference[len(batch) :], strict=True)), axes, rule) is not None


def _split_and_order(x: np.ndarray, batch: tuple[int, ...], axes: str, sizes: dict[str, int], rule: Rule) -> np.ndarray:
    """Reorder x to `axes`, from the first of the rule's choices of axes that fits its shape."""
    layout = _layout(x.shape, batch, sizes, axes, rule)
    if layout is None:
        first = (rule.axes or " ".join(axes)).split("|")[0].split()
        raise LayoutError(f"shape {list(x.shape)}, expected {[*batch, *(_size(token, sizes) for token in first)]}")
    tokens, found = layout
    cut = [slice(_size(token, sizes)) if token.endswith("+") else slice(None) for token in tokens]
    x = x.reshape(*batch, *found)[tuple([slice(None)] * len(batch) + cut)]
    order = [axis for token in tokens for axis in token.rstrip("+-").split("*")]
    now = sizes | ({"T": found[tokens.index("T-")]} if "T-" in tokens else {})
    x = x.reshape(*batch, *(now[axis] for axis in order))
    return x.transpose(*range(len(batch)), *(len(batch) + order.index(axis) for axis in axes))


def _layout(
    shape: tuple[int, ...], batch: tuple[int, ...], sizes: dict[str, int], axes: str, rule: Rule
) -> tuple[list[str], list[int]] | None:
    """Return the first choice of axes that an array of this shape can have, and the sizes that they have in it."""
    choices = [choice.split() for choice in (rule.axes or " ".join(axes)).split("|")]
    for tokens in choices:
        for lead in [batch] if batch else [(), (1,)]:
            found = shape[len(lead) :]
            if (
                shape[: len(lead)] == lead
                and len(found) == len(tokens)
                and all(map(_fits, found, tokens, [sizes] * len(found)))
            ):
                return tokens, list(found)
    for tokens in choices if rule.axes else []:
        whole = [str(n) for n in batch] + tokens
        if (without_ones := _assigned([n for n in shape if n != 1], whole, sizes)) is not None:
            return tokens, without_ones[len(batch) :]
    return None


def _assigned(shape: list[int], tokens: list[str], sizes: dict[str, int]) -> list[int] | None:
    """Return the size of each axis in an array of this shape, from which axes of one are removed; None if it doesn't fit."""
    if not tokens:
        return None if shape else []
    if shape and _fits(shape[0], tokens[0], sizes) and (rest := _assigned(shape[1:], tokens[1:], sizes)) is not None:
        return [shape[0], *rest]
    if _fits(1, tokens[0], sizes) and (rest := _assigned(shape, tokens[1:], sizes)) is not None:
        return [1, *rest]
    return None


def _size(token: str, sizes: dict[str, int]) -> int:
    return int(token) if token.isdecimal() else math.prod(sizes[axis] for axis in token.rstrip("+-").split("*"))


def _fits(found: int, token: str, sizes: dict[str, int]) -> bool:
    """Return whether an axis of this size fits the token."""
    expected = _size(token, sizes)
    return found == expected or (token.endswith("+") and found > expected) or (token.endswith("-") and 0 < found < expected)
