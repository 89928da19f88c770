"""Hugging Face's LlamaForCausalLM with our parameters, as the reference. Needs torch and transformers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from npllama import Config, LinearRopeScaling


def to_half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Permute rows of wq or wk from Meta's adjacent pairs to Hugging Face's halves, head by head."""
    rows, dim = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def hf_config(config: Config) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if isinstance(scaling := config.rope_scaling, LinearRopeScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="sdpa",
    )


def state_dict(config: Config, params: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return our parameters under Hugging Face's names, queries and keys permuted."""
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in params.items()}
    state = {"model.embed_tokens.weight": tensors["tok_embeddings.weight"], "model.norm.weight": tensors["norm.weight"]}
    state["lm_head.weight"] = tensors["tok_embeddings.weight" if config.tied_embeddings else "output.weight"]
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state |= {
            theirs + "input_layernorm.weight": tensors[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": to_half_split(tensors[ours + "attention.wq.weight"], config.n_heads),
            theirs + "self_attn.k_proj.weight": to_half_split(tensors[ours + "attention.wk.weight"], config.n_kv_heads),
            theirs + "self_attn.v_proj.weight": tensors[ours + "attention.wv.weight"],
            theirs + "self_attn.o_proj.weight": tensors[ours + "attention.wo.weight"],
            theirs + "post_attention_layernorm.weight": tensors[ours + "ffn_norm.weight"],
            theirs + "mlp.gate_proj.weight": tensors[ours + "feed_forward.w1.weight"],
            theirs + "mlp.down_proj.weight": tensors[ours + "feed_forward.w2.weight"],
            theirs + "mlp.up_proj.weight": tensors[ours + "feed_forward.w3.weight"],
        }
    return state


class Float64Rotary(torch.nn.Module):
    """Compute RoPE tables in float64; Hugging Face's module always uses float32."""

    def __init__(self, config: Config):
        super().__init__()
        K = config.head_dim
        frequencies = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        if isinstance(s := config.rope_scaling, LinearRopeScaling):
            frequencies = frequencies / s.factor
        elif s is not None:  # Llama 3.1's three ranges, as its paper's code has them
            wavelengths = 2 * torch.pi / frequencies
            long, short = s.original_max_seq_len / s.low_freq_factor, s.original_max_seq_len / s.high_freq_factor
            t = (s.original_max_seq_len / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            middle = (wavelengths >= short) & (wavelengths <= long)
            stretched = torch.where(wavelengths > long, frequencies / s.factor, frequencies)
            frequencies = torch.where(middle, (1 - t) * frequencies / s.factor + t * frequencies, stretched)
        self.frequencies = frequencies

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class Float64Norm(torch.nn.Module):
    """Compute by torch's own rms_norm; Hugging Face's module always uses float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def hf_model(
    config: Config, params: dict[str, np.ndarray], dtype: str = "float32", frequencies: np.ndarray | None = None
) -> LlamaForCausalLM:
    """Return the reference model, in float32 or entirely in float64.

    `frequencies` replaces its RoPE frequencies, for positions so large that a difference in their last place is visible.
    """
    model = LlamaForCausalLM(hf_config(config)).eval().to(getattr(torch, dtype))
    missing, unexpected = model.load_state_dict(state_dict(config, params), strict=False)
    assert not missing
    assert not unexpected
    if frequencies is not None:
        model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies)
    if dtype == "float64":
        model.model.rotary_emb = Float64Rotary(config)
        model.model.norm = Float64Norm(model.model.norm)
        for layer in model.model.layers:
            layer.input_layernorm = Float64Norm(layer.input_layernorm)
            layer.post_attention_layernorm = Float64Norm(layer.post_attention_layernorm)
    return model


@torch.inference_mode()
def hf_logits(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of one sequence or a batch.    int [..., T] -> [..., T, V]"""
    batch = torch.from_numpy(np.atleast_2d(tokens))
    return model(batch, use_cache=False).logits.numpy().reshape(*np.shape(tokens), -1)


def hf_greedy(model: LlamaForCausalLM, tokens: np.ndarray, n: int) -> list[int]:
    """Return n tokens by Hugging Face's own greedy generate().    int [T] -> n ids"""
    batch = torch.from_numpy(np.asarray(tokens)[None])
    everything = torch.ones_like(batch)  # otherwise ids equal to pad_token_id would count as padding
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": everything}
    return model.generate(batch, max_new_tokens=n, **options)[0, batch.shape[1] :].tolist()


@torch.inference_mode()
def hf_module_outputs(model: LlamaForCausalLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the output of each module that returns a tensor, by the module's name.    int [T] -> name -> [1, T, ...]"""
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str):
        def hook(_module, _inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(x):
                outputs[name] = x.numpy().copy()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    model(torch.from_numpy(tokens[None]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.inference_mode()
def hf_layer_outputs(model: LlamaForCausalLM, tokens: np.ndarray) -> list[np.ndarray]:
    """Return the residual stream after each layer.    int [T] -> n_layers of [T, D]"""
    outputs: list[np.ndarray] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0].numpy())) for layer in model.model.layers]
    model(torch.from_numpy(np.atleast_2d(tokens)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def torch_frequencies(config_of_head: tuple) -> np.ndarray:
    """Return the float32 RoPE frequencies of Hugging Face's own code for (head_dim, theta, scaling)."""
    head_dim, theta, scaling = config_of_head
    config = Config(
        dim=head_dim, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=head_dim, ffn_dim=8, vocab_size=8, norm_eps=1e-5,
        rope_theta=theta, rope_scaling=scaling, max_seq_len=131072, tied_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(hf_config(config)).model.rotary_emb.inv_freq.numpy().copy()


def torch_op(name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Compute one of cases.OPS in torch."""
    x = {key: torch.from_numpy(np.asarray(value)) for key, value in inputs.items()}
    if name == "embed":
        y = F.embedding(x["tokens"], x["weight"])
    elif name == "linear":
        y = F.linear(x["x"], x["weight"])
    elif name.startswith("rms_norm"):
        y = F.rms_norm(x["x"], x["weight"].shape, x["weight"], float(x["eps"]))
    elif name == "softmax":
        y = F.softmax(x["x"], dim=-1)
    elif name == "silu":
        y = F.silu(x["x"])
    elif name == "swiglu":
        y = F.silu(x["gate"]) * x["up"]
    elif name == "rope":  # as Meta's reference code does it: complex numbers
        angles = torch.outer(x["positions"].to(x["frequencies"].dtype), x["frequencies"])
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None, :]
        y = torch.view_as_real(torch.view_as_complex(x["x"].unflatten(-1, (-1, 2))) * rotation).flatten(-2)
    elif name == "attention":
        q, k, v = (x[key].transpose(-2, -3) for key in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(-2, -3)
    else:
        raise KeyError(name)
    return y.numpy()
