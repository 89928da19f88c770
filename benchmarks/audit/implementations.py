"""List the audited implementations: packages at pinned versions, an adapter, and variants."""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "torch==2.13.0"  # the CPU's, as .ci/constraints.txt has it; an unpinned one may bring gigabytes of CUDA
HUGGING_FACE = (TORCH, "transformers==5.23.0", "safetensors==0.8.0")


@dataclass(frozen=True)
class Variant:
    """One way to run an implementation.

    name       passed to the adapter
    profile    the rounding profile by which the conformance suite grades it
    precision  by which compare judges its traces; None if trace.json states it
    model      the form of the published models from which the reference is computed: "F32", "Q8_0" or "Q4_0"
    """

    name: str = ""
    profile: str = "float32"
    precision: str | None = "float32"
    model: str = "F32"


@dataclass(frozen=True)
class Implementation:
    """One released implementation.

    name          as on the command line
    title         as people know it
    adapter       the script in adapters/ that runs it
    packages      what pip installs, pinned
    form          the checkpoint that it reads: safetensors, gguf or pth
    map           compare's map for its names; None for logits alone and for traces of npllama's format
    megabytes     the approximate download, without pip's cache
    without_dependencies  packages that are installed with --no-deps
    own_npllama   whether the adapter imports npllama's converter
    why_not       why it can't be installed, where that is known beforehand
    source        the lines of this version's source that explain the differences, found by hand
    """

    name: str
    title: str
    adapter: str
    packages: tuple[str, ...]
    form: str = "safetensors"
    map: str | None = None
    variants: tuple[Variant, ...] = (Variant(),)
    megabytes: int = 100
    without_dependencies: tuple[str, ...] = ()
    own_npllama: bool = False
    why_not: str = ""
    note: str = ""
    source: tuple[str, ...] = ()


def _llama_cpp() -> tuple[Variant, ...]:
    """Return its variants. With flash attention, llama.cpp casts a float32 cache's keys and values to float16."""
    found = [Variant("F32", "float32", None), Variant("F32+flash attention", "float16-cache", None)]
    for kind in ("Q8_0", "Q4_0"):
        found += [Variant(f"{kind}{flash}", "int8-activations", None, kind) for flash in ("", "+flash attention")]
    return tuple(found)


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            *("transformers", "Hugging Face transformers", "run_transformers.py", (*HUGGING_FACE, "sentencepiece==0.2.3")),
            map="hf",
            variants=(Variant("eager"), Variant("sdpa"), Variant("bfloat16", "bfloat16", "bfloat16")),
            megabytes=250,
        ),
        Implementation(
            *("meta", "Meta's llama-models", "run_meta.py", (TORCH, "tiktoken==0.14.0", "numpy==2.4.6")),
            form="pth",
            map="meta",
            megabytes=250,
            without_dependencies=("llama-models==0.3.0",),
            note="Run in one process, with stand-ins for fairscale's parallel layers. params.json of Llama 1 and 2 names no θ, "
            "for which ModelArgs has 500000 (`llama3/args.py`, line 47): the one that is run names it.",
            source=(
                "`llama3/model.py`, line 47: apply_scaling() has a scale factor of 8, whichever model it is; Llama 3.2's "
                "config.json has 32",
            ),
        ),
        Implementation(
            *("llama.cpp", "llama.cpp (xllamacpp)", "run_llama_cpp.py"),
            ("xllamacpp==2026.10.11549", "gguf==0.19.0", "tiktoken==0.14.0", "threadpoolctl", "numpy==2.4.6"),
            form="gguf",
            variants=_llama_cpp(),
            own_npllama=True,
            note="Captured by npllama's converter, which reads llama.cpp's own tensors. The cache is float32; with flash "
            "attention its keys and values are cast to float16 (build_attn_mha() in `llama-graph.cpp`).",
        ),
        Implementation(
            *("mlx-lm", "mlx-lm, on the CPU", "run_mlx.py", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
            map="mlx-lm",
            source=(
                "`mlx_lm/models/llama.py`, lines 30 and 32: ModelArgs has the fields rope_theta, 10000 by default, and "
                "rope_scaling, none by default; from_dict() in `mlx_lm/models/base.py`, line 14, drops the key "
                "rope_parameters, in which transformers 5 writes both",
            ),
        ),
        Implementation(
            *("keras-hub", "keras-hub, on torch", "run_keras_hub.py"),
            (TORCH, "keras-hub==0.32.0", "safetensors==0.8.0"),
            map="keras-hub",
            megabytes=900,
            source=(
                "`keras_hub/src/utils/transformers/convert_llama3.py`, lines 15 to 24: no layer_norm_epsilon is given to the "
                "backbone, whose default is 1e-6 (`keras_hub/src/models/llama3/llama3_backbone.py`, line 72)",
                "the same file, line 26: the scaling is read from rope_scaling alone, not from rope_parameters; line 14: a "
                "config.json without θ is an error; line 21: a null num_key_value_heads stays null",
                "`keras_hub/src/models/llama/llama_attention.py`, line 59: heads are as wide as hidden_dim / num_query_heads",
            ),
        ),
        Implementation(
            *("transformer-lens", "TransformerLens", "run_transformer_lens.py", (TORCH, "transformer-lens==4.3.0")),
            map="transformerlens",
            megabytes=400,
        ),
        Implementation(
            *("litgpt", "litgpt", "run_litgpt.py", (TORCH, "litgpt==0.5.13")),
            map="litgpt",
            megabytes=300,
            note="It knows models by name and reads no config.json: the adapter gives it the constants. The eps, θ and "
            "scaling that its own `config.py` has for Llama 2 to 3.3 are the published ones.",
        ),
        Implementation(
            *("ctranslate2", "CTranslate2", "run_ctranslate2.py", ("ctranslate2==4.8.5", *HUGGING_FACE)),
            megabytes=300,
            note="It gives logits alone.",
            source=(
                "`ctranslate2/specs/attention_spec.py`, lines 85 to 94: the scale factor is written for linear scaling, "
                "and not for Llama 3's",
                "`ctranslate2/converters/transformers.py`, lines 2354 to 2370: LlamaLoader gives the specification no head_dim",
            ),
        ),
        Implementation(
            *("torchtune", "torchtune", "run_torchtune.py", (TORCH, "torchtune==0.6.1", "torchao==0.10.0")),
            map="torchtune",
            megabytes=300,
            note="It reads no config.json: the adapter gives it the constants. The eps, θ and scaling of its own "
            "builders of Llama 2 to 3.2 are the published ones.",
        ),
        Implementation(
            *("llama2.c", "llama2.c", "", ()),
            why_not="no package has its source: it is a repository of C files, which pip does not install",
        ),
    )
}
