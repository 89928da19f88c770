"""Record a torch model's activations as a trace directory, under npllama's names.

Two kinds of models are recognised by their structure: Hugging Face's (LlamaForCausalLM and models with the same structure) and
Meta's reference Transformer (llama3/model.py of llama-models). Modules are hooked. The rotary function is wrapped in its
module, and a torch function mode intercepts the softmax; both are undone after the run. Nothing is recomputed: the trace holds
what the model's own operations returned, in any torch dtype.

Hugging Face's queries and keys are reordered from halves, (x[j], x[j + K/2]), to adjacent pairs, which is exact; scores that
its mask pushed to the lowest finite number are written as -inf. trace.json says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from npllama.activations import TABLE
from npllama.config import Config, LinearRopeScaling, RopeScaling
from npllama.engine.memory import size_text
from npllama.golden.precision import Precision
from npllama.golden.trace import (
    EVERYTHING,
    Selection,
    Trace,
    TraceError,
    checked_run,
    n_steps_of,
    new_trace,
    read_trace,
    trace_size,
)
from npllama.model import Tap

if TYPE_CHECKING:
    import torch

# The place of an activation: a module's output, or the input of one if no module outputs it.
IN, OUT = "input", "output"


@dataclass(frozen=True)
class Layout:
    """Name the parts of one family of torch models."""

    source: str
    convention: str
    rotary: str  # the function's name in the module of the attention class
    outer: dict[str, str]  # activation -> module
    layers: str
    attention: str
    inner: dict[str, tuple[str, str]]  # activation of a layer -> (module, whether its input or output)
    notes: tuple[str, ...]


def _layer_modules(
    attention_norm: str, ffn_norm: str, q: str, k: str, v: str, o: str, gate: str, up: str, down: str
) -> dict[str, tuple[str, str]]:
    return {
        "attention_norm": (attention_norm, OUT),
        "attention.q": (q, OUT),
        "attention.k": (k, OUT),
        "attention.v": (v, OUT),
        "attention.heads": (o, IN),
        "attention.out": (o, OUT),
        "attention_residual": (ffn_norm, IN),
        "ffn_norm": (ffn_norm, OUT),
        "feed_forward.gate": (gate, OUT),
        "feed_forward.up": (up, OUT),
        "feed_forward.act": (down, IN),
        "feed_forward.out": (down, OUT),
        "out": ("", OUT),
    }


HUGGING_FACE = Layout(
    source="transformers",
    convention="hf",
    rotary="apply_rotary_pos_emb",
    outer={"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "logits": "lm_head"},
    layers="model.layers",
    attention="self_attn",
    inner=_layer_modules(
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    notes=(
        "queries and keys were reordered from Hugging Face's halves (x[j], x[j + K/2]) to adjacent pairs (x[2j], x[2j+1])",
        "masked scores, which Hugging Face sets to the dtype's lowest number, are written as -inf",
        "Hugging Face computes RoPE's angles and the norms in float32 whatever the model's dtype",
    ),
)
META = Layout(
    source="llama-models",
    convention="meta",
    rotary="apply_rotary_emb",
    outer={"tok_embeddings": "tok_embeddings", "norm": "norm", "logits": "output"},
    layers="layers",
    attention="attention",
    inner=_layer_modules(
        "attention_norm",
        "ffn_norm",
        *(f"attention.w{name}" for name in "qkvo"),
        *(f"feed_forward.w{name}" for name in "132"),
    ),
    notes=("Meta's code computes RoPE and inside the norms in float32 whatever the model's dtype",),
)


def capture(
    model: torch.nn.Module | Path | str,
    tokens: ArrayLike,
    out: Path | str,
    dtype: str | None = None,
    steps: int | ArrayLike = 0,
    selection: Selection = EVERYTHING,
    storage: str = "npy",
    force: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> Trace:
    """Run a torch model and write its activations as a trace.

    model   a folder with Hugging Face's config.json and weights; or a Hugging Face model, or Meta's Transformer, in memory
    tokens  int [T] or [B, T], no padding
    dtype   "float64", "float32", "bfloat16" or "float16" to run a copy of the model in; None runs it unchanged
    steps   how many tokens to decode greedily after the prompt, or the ids to feed

    The other arguments are those of golden.trace.write_trace. Attention runs in eager mode: fused kernels compute no scores.
    Raises ValueError when the model or the tokens can't be used, ImportError without torch or transformers.
    """
    torch = needed("torch")
    path = None
    if isinstance(model, (str, Path)):
        path = Path(model)
        model = load_hugging_face(path, dtype)
    if dtype is not None:
        model = in_dtype(model, dtype)
    layout = META if hasattr(model, "tok_embeddings") else HUGGING_FACE
    config = _meta_config(model) if layout is META else _hf_config(model)
    tokens, given = checked_run(config, tokens, steps)
    if tokens.min() < 0:
        raise TraceError(f"token id {tokens.min()}: padding can't be captured, run each sequence by itself")
    selection.check(config)
    weights = next(model.parameters())
    precision = Precision(str(weights.dtype).removeprefix("torch."), layout.convention)
    n_activations, n_bytes = trace_size(config, tokens, n_steps_of(steps), precision, selection, storage)

    notes, versions = list(layout.notes), {"torch": torch.__version__}
    if layout is HUGGING_FACE:
        import transformers

        versions["transformers"] = transformers.__version__
        if (stored := model.model.rotary_emb.inv_freq.dtype) != torch.float32:
            notes.append(f"the model's RoPE frequencies are rounded to {stored}, as model.to() leaves them")
    facts = {
        "path": None if path is None else str(path.resolve()),
        "manifest_sha256": None,
        "config": config.to_dict(),
    }
    with new_trace(out, selection, storage, force, n_bytes) as writer:
        report(f"{n_activations} activations, {size_text(n_bytes)}, to {out}")
        fed = _run(model, layout, config, tokens, n_steps_of(steps), given, writer)
        writer.describe(layout.source, tokens, fed, precision, facts, versions, notes)
    return read_trace(out)


def needed(package: str) -> ModuleType:
    """Import torch or transformers, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"capturing needs {package}: pip install 'npllama[torch]'") from None


def load_hugging_face(path: Path, dtype: str | None = None) -> torch.nn.Module:
    """Load the causal language model that save_pretrained() wrote, its RoPE frequencies in float32, without the network.

    Raises ValueError when there is none.
    """
    torch, transformers = needed("torch"), needed("transformers")
    if not (path / "config.json").is_file():
        raise TraceError(f"{path}: no config.json, expected a folder of Hugging Face's format")
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    key = "dtype" if release >= (4, 56) else "torch_dtype"
    wanted = "auto" if dtype is None else _torch_dtype(torch, dtype)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, attn_implementation="eager", **{key: wanted}
        ).eval()
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise TraceError(f"{path}: {' '.join(str(error).split())}") from None


def in_dtype(model: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """Return the model itself if it has that dtype, else a copy in it, with unchanged RoPE frequencies.

    `.to()` would round a Hugging Face model's frequencies like a weight, which loading in that dtype doesn't.
    """
    import torch

    wanted = _torch_dtype(torch, dtype)
    if all(weight.dtype == wanted for weight in model.parameters()):
        return model
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model = copy.deepcopy(model).to(wanted)
    for name, buffer in frequencies.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, buffer.clone())
    return model


def _torch_dtype(torch: ModuleType, name: str) -> torch.dtype:
    return getattr(torch, Precision(name).name)


def _hf_config(model: torch.nn.Module) -> Config:
    c = model.config
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "layers"):
        raise TraceError(f"{type(model).__name__} has neither the structure of LlamaForCausalLM nor that of Meta's Transformer")
    rope = getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta, **(getattr(c, "rope_scaling", None) or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scaling: RopeScaling | LinearRopeScaling | None = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_seq_len=rope["original_max_position_embeddings"],
        )
    elif kind == "linear":
        scaling = LinearRopeScaling(rope["factor"])
    elif kind != "default":
        raise TraceError(f"RoPE of type {kind!r}, expected default, linear or llama3")
    return Config(
        dim=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        ffn_dim=c.intermediate_size,
        vocab_size=c.vocab_size,
        norm_eps=c.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        max_seq_len=c.max_position_embeddings,
        tied_embeddings=bool(c.tie_word_embeddings),
    )


def _meta_config(model: torch.nn.Module) -> Config:
    c, layer = model.params, model.layers[0]
    # apply_scaling in llama3/model.py hard-codes these four.
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192) if getattr(c, "use_scaled_rope", False) else None
    return Config(
        dim=c.dim,
        n_layers=len(model.layers),
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads or c.n_heads,
        head_dim=c.dim // c.n_heads,
        ffn_dim=layer.feed_forward.w1.weight.shape[0],
        vocab_size=model.output.weight.shape[0],
        norm_eps=c.norm_eps,
        rope_theta=float(c.rope_theta),
        rope_scaling=scaling,
        max_seq_len=c.max_seq_len,
        tied_embeddings=False,
    )


# --------------------------------------------------------------------------------------------------------- running and hooking


@dataclass
class _Watch:
    """Share state among the hooks: the writer of the activations, the current layer and the current pass."""

    config: Config
    layout: Layout
    tap: Tap
    squeeze: bool  # one sequence, without a batch axis
    prefix: str = ""
    layer: int | None = None
    seen: set[str] = field(default_factory=set)

    def __call__(self, name: str, x: torch.Tensor) -> None:
        """Pass on a tensor whose first axis is the batch."""
        import torch

        name = self.prefix + name
        if name in self.seen:
            raise TraceError(f"{name} was computed twice: this model has another structure than expected")
        self.seen.add(name)
        x = x.detach().to("cpu", torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()
        self.tap(name, x[0] if self.squeeze else x)

    def heads(self, name: str, x: torch.Tensor) -> None:
        """Pass on queries, keys, values or heads: in one row each, [B, T, heads·K], or split, [B, T, heads, K]."""
        if x.ndim == 3:
            x = x.unflatten(-1, (-1, self.config.head_dim))
        half_split = self.layout is HUGGING_FACE and name.rpartition(".")[2] in ("q", "k", "q_rope", "k_rope")
        if half_split:  # [..., 2, K/2] -> [..., K/2, 2]
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        self(name, x)

    def scores(self, scores: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> None:
        """Pass on the softmax's input and output, [B, H, T, S]."""
        import torch

        name = f"layers.{self.layer}.attention."
        pushed_down = scores <= torch.finfo(dtype).min / 2  # only the mask makes a score that low
        self(name + "scores", scores.masked_fill(pushed_down, -math.inf))
        self(name + "weights", weights.to(dtype))


def _run(
    model: torch.nn.Module,
    layout: Layout,
    config: Config,
    tokens: np.ndarray,
    n_steps: int,
    given: np.ndarray | None,
    tap: Tap,
) -> list[list[int]]:
    """Feed the prompt and the steps; return the ids of the steps, like npllama.golden.trace.run."""
    import torch

    device = next(model.parameters()).device
    batch = torch.as_tensor(np.atleast_2d(tokens).astype(np.int64), device=device)
    watch = _Watch(config, layout, tap, squeeze=tokens.ndim == 1)
    # transformers 5.24 renames past_key_values to cache, as an argument and in the result.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits: Any = None  # of the previous pass
    fed: list[list[int]] = []
    cache, start = None, 0
    with _hooked(model, layout, watch), torch.inference_mode():
        for i in range(1 + n_steps):
            if i > 0:
                ids = logits[:, -1:].argmax(dim=-1) if given is None else torch.as_tensor(given[i - 1].astype(np.int64))
                batch = ids.reshape(len(batch), 1).to(device)
                fed.append(batch.flatten().tolist())
                watch.prefix = f"step.{i - 1}/"
            if layout is META:
                logits = model(batch, start)
            else:
                result = model(input_ids=batch, **{cache_name: cache}, use_cache=n_steps > 0)
                logits, cache = result.logits, getattr(result, cache_name)
            start += batch.shape[1]
    return fed


@contextlib.contextmanager
def _hooked(model: torch.nn.Module, layout: Layout, watch: _Watch) -> Iterator[None]:
    """Hook every module, wrap the rotary function and observe the softmax; all of it is undone at the end."""
    layers = model.get_submodule(layout.layers)
    with contextlib.ExitStack() as stack:

        def hook_output(module: torch.nn.Module, function: Callable[[torch.Tensor], object]) -> None:
            handle = module.register_forward_hook(lambda _m, _in, out: function(out[0] if isinstance(out, tuple) else out))
            stack.callback(handle.remove)

        def hook_input(module: torch.nn.Module, function: Callable[[torch.Tensor], object]) -> None:
            stack.callback(module.register_forward_pre_hook(lambda _m, inputs: function(inputs[0])).remove)

        for name, module in layout.outer.items():
            hook_output(model.get_submodule(module), functools.partial(watch, name))
        for i, layer in enumerate(layers):
            for name, (module, side) in layout.inner.items():
                send = watch.heads if "K" in TABLE[name].axes else watch
                hook = hook_input if side == IN else hook_output
                hook(layer.get_submodule(module), functools.partial(send, f"layers.{i}.{name}"))
            attention = layer.get_submodule(layout.attention)

            def enter(_module: torch.nn.Module, _args: object, i: int = i) -> None:
                watch.layer = i

            def leave(_module: torch.nn.Module, _args: object, _out: object) -> None:
                if watch.prefix + f"layers.{watch.layer}.attention.scores" not in watch.seen:
                    raise TraceError(f"layer {watch.layer} took no softmax of its scores: attention must run in eager mode")
                watch.layer = None

            stack.callback(attention.register_forward_pre_hook(enter).remove)
            stack.callback(attention.register_forward_hook(leave).remove)

        stack.enter_context(_rotary_wrapped(layers[0].get_submodule(layout.attention), layout, watch))
        stack.enter_context(_eager(model))
        stack.enter_context(_softmax_seen(next(model.parameters()).dtype, watch))
        yield


@contextlib.contextmanager
def _rotary_wrapped(attention: torch.nn.Module, layout: Layout, watch: _Watch) -> Iterator[None]:
    """Wrap the function that the attention's code calls by its global name."""
    names = inspect.unwrap(type(attention).forward).__globals__
    original = names.get(layout.rotary)
    if original is None:
        raise TraceError(f"the module of {type(attention).__name__} has no function {layout.rotary}, expected to rotate q, k")

    def rotary(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result = original(*args, **kwargs)
        for name, x in zip(("q_rope", "k_rope"), result, strict=True):
            x = x.transpose(1, 2) if layout is HUGGING_FACE else x  # its heads come before the tokens
            watch.heads(f"layers.{watch.layer}.attention.{name}", x)
        return result

    names[layout.rotary] = rotary
    try:
        yield
    finally:
        names[layout.rotary] = original


@contextlib.contextmanager
def _eager(model: torch.nn.Module) -> Iterator[None]:
    """Run Hugging Face's attention in eager mode and the model without dropout within a `with` block."""
    config: Any = getattr(model, "config", None)
    before, training = getattr(config, "_attn_implementation", None), model.training
    model.eval()
    if before is not None:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.train(training)
        if before is not None:
            config._attn_implementation = before


@contextlib.contextmanager
def _softmax_seen(dtype: torch.dtype, watch: _Watch) -> Iterator[None]:
    """Pass on every softmax of an attention module, under any of torch's names for it."""
    import torch
    from torch.overrides import TorchFunctionMode

    softmaxes = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)

    class See(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            given = kwargs or {}
            result = function(*args, **given)
            if function in softmaxes and watch.layer is not None:
                watch.scores(args[0] if args else given["input"], result, dtype)
            return result

    with See():
        yield
