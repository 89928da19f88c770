"""List the maps of known programs: each name of an activation there, with its name and layout here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...activations import TABLE


@dataclass(frozen=True)
class Rule:
    """Give one candidate name's counterpart and layout; maps.py explains the fields."""

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
# position, named after the weight that it is computed with (docs/capturing.md). RoPE rotates adjacent pairs.
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
    "*hook_in": None,  # inputs and outputs of bridged modules, which the names above have too
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
