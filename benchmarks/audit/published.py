"""Small models with published models' constants, in each form that an implementation reads, and npllama's trace of each.

Widths, layers and vocabulary are small; eps, θ, the scaling of RoPE, head_dim, the share of key/value heads and tying are those
of the published model. Weights are exact in bfloat16. An embedding's rows have a root mean square of 0.018, so that eps counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npllama import Config, RopeScaling, load
from npllama.golden.conformance import config_files, model_files
from npllama.golden.conformance.models import TinyModel, params_of
from npllama.golden.conformance.numbers import Integers
from npllama.golden.precision import Precision
from npllama.golden.trace import write_trace
from npllama_convert.sources import convert

DIM, VOCABULARY, FFN, MULTIPLE_OF, LAYERS = 512, 512, 1408, 128, 2
TOKENS = Integers((64,), 0, VOCABULARY).draw("audit/tokens").tolist()


def _small(config: Config) -> Config:
    """Return the config with few, small matrices."""
    heads = DIM // config.head_dim
    sizes = {"dim": DIM, "n_layers": LAYERS, "ffn_dim": FFN, "vocab_size": VOCABULARY}
    return replace(config, n_heads=heads, n_kv_heads=heads * config.n_kv_heads // config.n_heads, **sizes)


@dataclass(frozen=True, eq=False)
class Published(TinyModel):
    """A model with a published one's constants.

    old      config.json in the spelling before transformers 5
    without  keys that the published config.json doesn't have
    """

    old: bool = True
    without: tuple[str, ...] = ()

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """Return its parameters in Meta's names and layout.    float32"""
        return params_of(self.config, "audit", embeddings=-6, matrices=-5)


MODELS = {
    model.name: model
    for model in (
        Published(
            *("llama-1-7b", "eps 1e-6; config.json without the keys that came later"),
            _small(config_files.LLAMA_1_7B),
            without=("num_key_value_heads", "head_dim", "rope_theta"),
        ),
        Published("llama-2-7b", "eps 1e-5", _small(config_files.LLAMA_2_7B), without=("head_dim",)),
        Published("llama-3.1-8b", "θ 500000, scale factor 8", _small(config_files.LLAMA_3_1_8B), without=("head_dim",)),
        Published(
            *("llama-3.1-8b-new", "the same, its config.json as transformers 5 writes it"),
            _small(config_files.LLAMA_3_1_8B),
            old=False,
        ),
        Published("llama-3.2-1b-new", "scale factor 32, tied; the same spelling", _small(config_files.LLAMA_3_2_1B), old=False),
    )
}
SAME_WEIGHTS = ("llama-3.1-8b-new",)  # differs from the one before by the spelling of config.json alone


def write(model: Published, folder: Path) -> None:
    """Write its forms, the model directory and the trace, unless they are there."""
    if (folder / "reference" / "trace.json").exists():
        return
    values = model_files.hf_config(model.config, model.old)
    values = {key: value for key, value in values.items() if key not in model.without}
    for form in model_files.FORMS:
        for path, data in model_files.files_of(model, form).items():
            file = folder / Path(path).relative_to(f"models/{model.name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    (folder / "safetensors" / "config.json").write_text(json.dumps(values, indent=1))
    (folder / "pth" / "params.json").write_text(json.dumps(meta_params(model.config), indent=1))
    trace(folder / "safetensors", folder / "model", folder / "reference")
    for kind in ("Q8_0", "Q4_0"):
        write_quantised(folder / f"model-{kind}.gguf", model.config, model.params, kind)
        trace(folder / f"model-{kind}.gguf", folder / f"model-{kind}", folder / f"reference-{kind}")


def meta_params(config: Config) -> dict[str, object]:
    """Return params.json as Meta publishes it: the feed-forward's size by its formula, and no scale factor."""
    kept = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
    scaled = {"use_scaled_rope": True} if config.rope_scaling else {}
    return {name: getattr(config, name) for name in kept} | {"multiple_of": MULTIPLE_OF} | scaled


def trace(source: Path, model: Path, out: Path) -> None:
    """Convert a checkpoint, and write its activations in float64."""
    silent = lambda line: None  # noqa: E731
    convert(source, model, force=True, report=silent, no_tokenizer=True)
    write_trace(load(model), TOKENS, out, precision=Precision("float64"), force=True)


def changed(model: Published, changes: Mapping[str, object], folder: Path) -> tuple[Path, Path]:
    """Return the model directory and the trace of the model with other constants: what a program with that mistake computes."""
    if not (folder / "reference" / "trace.json").exists():
        wrong = replace(model, config=replace(model.config, **changes))
        for path, data in model_files.files_of(wrong, "safetensors").items():
            file = folder / "safetensors" / Path(path).name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        trace(folder / "safetensors", folder / "model", folder / "reference")
    return folder / "model", folder / "reference"


def mistakes(config: Config) -> dict[str, dict[str, object]]:
    """Return the wrong constants that are tried, by what they are called."""
    scaling = config.rope_scaling
    found: dict[str, dict[str, object]] = {
        f"norm_eps {eps:g} in place of {config.norm_eps:g}": {"norm_eps": eps} for eps in (1e-6, 1e-5) if eps != config.norm_eps
    }
    wrong_theta = {"rope_theta": 10000.0}
    if config.rope_theta != 10000.0:
        found[f"θ 10000 in place of {config.rope_theta:g}"] = wrong_theta
    if isinstance(scaling, RopeScaling):
        found["no scaling of RoPE"] = {"rope_scaling": None}
        found[f"θ 10000 in place of {config.rope_theta:g}, and no scaling of RoPE"] = wrong_theta | {"rope_scaling": None}
        if scaling.factor != 8:
            found[f"a scale factor of 8 in place of {scaling.factor:g}"] = {"rope_scaling": replace(scaling, factor=8.0)}
    both = {
        f"{a}; {b}": found[a] | found[b]
        for a in found
        for b in found
        if a.startswith("norm_eps") and not b.startswith("norm_eps")
    }
    return found | both


def write_quantised(path: Path, config: Config, params: Mapping[str, np.ndarray], kind: str) -> None:
    """Write a GGUF file with matrices of a kind, as the package gguf quantises them."""
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in model_files.gguf_metadata(config).items():
        if key == "general.architecture":
            continue
        add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else None
        (add or writer.add_uint32)(key, value)
    for name, x in (model_files.gguf_tensors(params) | model_files.rope_divisors(config)).items():
        if x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
