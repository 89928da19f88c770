"""Read Meta's checkpoints: consolidated.00.pth ... consolidated.NN.pth, params.json, tokenizer.model. Needs torch.

Also single files with Meta's names: Mistral's consolidated.safetensors, without torch, and torchtune's meta_model_0.pt.

The weights of a big model are split over shards for tensor parallelism: wq wk wv w1 w3 output by rows (their outputs), wo w2 by
columns (their inputs), the embedding by columns up to Llama 2 and by rows since; the norms are in every shard. The axis
follows from the shapes, since params.json and the number of shards give the whole tensor's shape.

Files are mapped and never read whole: a merged tensor exists only as blocks of rows while they are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from npllama import checkpoint
from npllama.chat import chat_format_of
from npllama.checkpoint import CheckpointError, read_json
from npllama.checkpoint.foreign import read_safetensors
from npllama.config import Config, ConfigError, RopeScaling, parameter_shapes
from npllama.errors import shown
from npllama.tokenizer import Tokenizer

from . import torch_file
from .conversion import (
    LLAMA3_CONTEXT,
    NOT_A_PARAMETER,
    OWN,
    Report,
    Source,
    Tensor,
    TokenizerChoice,
    add_tokenizer,
    head_sizes,
    llama3_scaling,
    number,
    read_generation,
    refuse_foreign,
    report_left_out,
    same_bits,
    tie,
    whole,
    within_window,
    without_biases,
    without_wrappers,
)

# Keys of params.json that indicate another architecture, unless they are null, false, 0, -1 or empty.
FOREIGN_KEY = re.compile(
    r"moe.*|.*experts.*|vision_.*|quantization.*|lora.*|rope_scaling.*|llama_4_scaling.*|yarn.*|attention_chunk_size"
    r"|use_qk_norm|nope_.*"
)
READ_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope"}
READ_KEYS |= {"hidden_dim", "multiple_of", "ffn_dim_multiplier", "max_seq_len", "sliding_window"}
HARMLESS_KEYS = {"max_batch_size", "model_parallel_size", "dropout"}
LLAMA1_CONTEXT, LLAMA31_CONTEXT, MISTRAL_CONTEXT = 2048, 131072, 32768
LLAMA2_VOCABULARIES = (32000, 32016)  # the second is Code Llama's
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
WHOLE = re.compile(r"consolidated\.safetensors|meta_model_\d+\.pt")  # a model in one file; torchtune's number is the epoch's
WEIGHTS = re.compile(f"{SHARD.pattern}|{WHOLE.pattern}")


# --------------------------------------------------------------------------------------------------------------- params.json


def resolve(
    params: Mapping[str, object],
    ffn_dim: int | None = None,
    vocab_size: int | None = None,
    tied: bool = False,
    rope_factor: float | None = None,
    report: Report = print,
) -> Config:
    """Return every model constant, from params.json and the weights' shapes; missing ones are inferred and reported.

    ffn_dim, vocab_size   from the weights, against which params.json is checked; None uses params.json's
    rope_factor           replaces the scaling factor inferred from use_scaled_rope

    Raises ConfigError, a ValueError.
    """
    known = {key: value for key, value in params.items() if value is not None}
    refuse_foreign(known, FOREIGN_KEY)
    if ignored := [key for key in known if key not in READ_KEYS | HARMLESS_KEYS and not FOREIGN_KEY.fullmatch(key)]:
        report(f"ignored in params.json: {', '.join(ignored)}")
    dim, n_layers, norm_eps = whole(known, "dim"), whole(known, "n_layers"), number(known, "norm_eps")
    n_heads, n_kv_heads, head_dim = head_sizes(known, "dim", "n_heads", "n_kv_heads", "head_dim", report)
    if "rope_theta" in known:
        rope_theta = number(known, "rope_theta")
    else:
        rope_theta = 10000.0
        report("rope_theta: 10000 (inferred: the only one before Code Llama and Llama 3)")

    formula = _ffn_dim_formula(known, dim)
    if ffn_dim is None:
        ffn_dim = formula
    if ffn_dim is None:
        raise ConfigError("missing multiple_of")
    if formula is None:
        report(f"ffn_dim: {ffn_dim} (from the weights alone: no multiple_of to check it by)")
    elif ffn_dim != formula:
        raise ConfigError(f"dim, multiple_of and ffn_dim_multiplier give ffn_dim {formula}, but the weights have {ffn_dim}")

    stated = known.get("vocab_size", -1)
    if stated != -1:
        stated = whole(known, "vocab_size")
        if vocab_size not in (None, stated):
            raise ConfigError(f"vocab_size is {stated}, but the weights have {vocab_size}")
        vocab_size = stated
    elif vocab_size is None:
        raise ConfigError("vocab_size is -1, which leaves it to weights that are not there")
    else:
        report(f"vocab_size: {vocab_size} (from the weights)")

    scaling = _rope_scaling(known, dim, n_layers, rope_factor, report)
    if "max_seq_len" in known:
        max_seq_len = whole(known, "max_seq_len")
    else:
        max_seq_len, family = _context_length(known, rope_theta, norm_eps, n_heads, n_kv_heads, scaling)
        report(f"max_seq_len: {max_seq_len} (inferred: {family})")
    max_seq_len = within_window(known, "sliding_window", max_seq_len, report)
    return Config(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=scaling,
        max_seq_len=max_seq_len,
        tied_embeddings=tied,
    )


def _ffn_dim_formula(known: Mapping[str, object], dim: int) -> int | None:
    """Return 2/3 · 4·dim, times a factor, up to the next multiple_of (FeedForward in llama-models 0.3.0, llama3/model.py)."""
    if "hidden_dim" in known:  # Mistral's params.json states it
        return whole(known, "hidden_dim")
    if "multiple_of" not in known:
        return None
    multiple_of = whole(known, "multiple_of")
    hidden = 8 * dim // 3
    if "ffn_dim_multiplier" in known:
        hidden = int(number(known, "ffn_dim_multiplier") * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _rope_scaling(
    known: Mapping[str, object], dim: int, n_layers: int, rope_factor: float | None, report: Report
) -> RopeScaling | None:
    scaled = known.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ConfigError(f"use_scaled_rope is {shown(scaled)}, expected true or false")
    if not scaled:
        if rope_factor is not None:
            raise ConfigError("a rope factor is given, but params.json has no use_scaled_rope: true")
        return None
    if rope_factor is not None:
        factor, why = float(rope_factor), "as given"
    elif (dim, n_layers) in ((2048, 16), (3072, 28)):
        factor, why = 32.0, "inferred: the shape of Llama 3.2"
    else:
        factor, why = 8.0, "inferred: Llama 3.1 and 3.3"
    report(f"rope_scaling: factor {factor:g} ({why})")
    return llama3_scaling(factor)


def _context_length(
    known: Mapping[str, object],
    rope_theta: float,
    norm_eps: float,
    n_heads: int,
    n_kv_heads: int,
    scaling: RopeScaling | None,
) -> tuple[int, str]:
    """Return the context length that this model family was trained on, which published files leave out."""
    if scaling:
        return LLAMA31_CONTEXT, "Llama 3.1 and later"
    if rope_theta == 500000.0:
        return LLAMA3_CONTEXT, "Llama 3"
    if rope_theta == 10000.0:
        # Of LLaMA 1, only 65B has the eps of Llama 2; Llama 2's model with 80 layers has grouped queries.
        is_65b = (known["dim"], known["n_layers"]) == (8192, 80) and n_kv_heads == n_heads
        if norm_eps == 1e-6 or is_65b:
            return LLAMA1_CONTEXT, "LLaMA 1"
        return 4096, "Llama 2"
    if rope_theta == 1000000.0:
        return (MISTRAL_CONTEXT, "Mistral 7B") if "hidden_dim" in known else (16384, "Code Llama")
    raise ConfigError(
        f'rope_theta {rope_theta:g} belongs to no family we know: add "max_seq_len", the context length, to the file'
    )


# -------------------------------------------------------------------------------------------------------------------- shards


def _find_shards(src: Path) -> list[Path]:
    if not src.is_dir():
        if src.is_file() and WHOLE.fullmatch(src.name):
            return [src]
        raise CheckpointError(f"{src}: {'a file' if src.exists() else 'not found'}, expected a folder with consolidated.00.pth")
    found = {int(m[1]): path for path in src.iterdir() if (m := SHARD.fullmatch(path.name))}
    if not found:
        whole_files = sorted(path for path in src.iterdir() if WHOLE.fullmatch(path.name))
        if len(whole_files) > 1:
            raise CheckpointError(
                f"{src} holds {' and '.join(path.name for path in whole_files)}: expected one, or a file's name"
            )
        if not whole_files:
            raise CheckpointError(f"{src} has no consolidated.00.pth")
        return whole_files
    if missing := [f"consolidated.{i:02d}.pth" for i in range(max(found) + 1) if i not in found][:3]:
        raise CheckpointError(f"{src}: {', '.join(missing)} missing, up to {found[max(found)].name} found")
    return [found[i] for i in range(len(found))]


def _open(path: Path, report: Report) -> Mapping[str, np.ndarray | None]:
    if path.suffix != ".safetensors":
        return torch_file.arrays(path, torch_file.load(path, report))
    found = without_wrappers(path, read_safetensors(path, CheckpointError))
    return {name: None if NOT_A_PARAMETER.fullmatch(name) else array for name, array in found.items()}


def _find_tokenizer(folder: Path) -> Path | None:
    """Return tokenizer.model, or Mistral's tokenizer.model.v3, or that of the folder above, where Meta's download puts it."""
    found = [folder / "tokenizer.model", *sorted(folder.glob("tokenizer.model.v[0-9]*"), reverse=True)]
    found.append(folder.resolve().parent / "tokenizer.model")
    return next((path for path in found if path.is_file()), None)


def _join(name: str, pieces: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """Find the axis along which the shards' pieces make a tensor of this shape."""
    n, found = len(pieces), [piece.shape for piece in pieces]
    if len({piece.dtype for piece in pieces}) > 1:
        raise CheckpointError(f"{name} is {' and '.join(str(piece.dtype) for piece in pieces)} in different shards")
    if all(s == shape for s in found):
        if not all(same_bits(pieces[0], piece) for piece in pieces[1:]):
            raise CheckpointError(f"{name} differs between shards, expected the same values in each")
        return Tensor.of(pieces[0])
    for axis in range(len(shape)):
        part = tuple(size // n if i == axis else size for i, size in enumerate(shape))
        if shape[axis] % n == 0 and all(s == part for s in found):
            return Tensor(shape, pieces[0].dtype, partial(_rows_across, pieces, axis))
    shown = " and ".join(str(list(s)) for s in dict.fromkeys(found))
    raise CheckpointError(f"{name} is {shown} in {n} shard{'s' * (n > 1)}, expected {list(shape)} in all")


def _rows_across(pieces: list[np.ndarray], axis: int, start: int, stop: int) -> np.ndarray:
    """Return some rows of the whole tensor; a copy only where they span two pieces."""
    if axis == 1:
        return np.concatenate([piece[start:stop] for piece in pieces], axis=1)
    height = len(pieces[0])
    parts = [piece[max(0, start - i * height) : max(0, stop - i * height)] for i, piece in enumerate(pieces)]
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_number_of_shards(params: Mapping[str, object], shards: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Distinguish a missing shard from a wrong shape: params.json gives the number of wq's rows."""
    name, n = "layers.0.attention.wq.weight", len(shards)
    rows = whole(params, "n_heads") * whole(params, "head_dim") if params.get("head_dim") else whole(params, "dim")
    piece = shards[0][name].shape[0]
    if rows != n * piece and piece and rows % piece == 0:
        raise CheckpointError(
            f"{n} shard{'s' * (n > 1)} found, but {name} has {piece} of {rows} rows: expected {rows // piece}"
        )


# ------------------------------------------------------------------------------------------------------------------- convert


def read(src: str | Path, rope_factor: float | None = None, report: Report = print, choice: TokenizerChoice = OWN) -> Source:
    """Open the folder `src` as Meta ships it, with no weight read yet.

    rope_factor  replaces the inferred scaling factor, if params.json has use_scaled_rope
    report       gets a line for everything inferred, left out or chosen

    Raises CheckpointError or ConfigError, both ValueError, with one line that names the file or tensor.
    """
    files = _find_shards(src := Path(src))
    folder = src if src.is_dir() else src.parent
    params_file = folder / "params.json"
    params = read_json(params_file)
    try:
        refuse_foreign(params, FOREIGN_KEY)
        config, tensors = assemble(params, [_open(path, report) for path in files], rope_factor, report)
    except ConfigError as error:
        raise CheckpointError(f"{params_file}: {error}") from None
    source = Source("meta", config, tensors, [*files, params_file], generation=read_generation(folder, config, report)[0])
    if tokenizer := choice.of(_find_tokenizer(folder)):
        if tokenizer.parent != folder and not choice.file:
            report(f"{tokenizer.name}: that of the folder above")
        source.generation["chat_format"] = chat_format(config, add_tokenizer(source, tokenizer, report))
    return source


def chat_format(config: Config, tokenizer: Tokenizer | None) -> str | None:
    """Return the chat format of Meta's code for a tokenizer; a base model gets it too, as the files don't say which it is.

    None for LLaMA 1, of which there was no chat model, and for a vocabulary other than LLaMA's.
    """
    name = "llama2"  # SentencePiece, where its package is missing
    if tokenizer is not None:
        try:
            name = chat_format_of(tokenizer)
        except ValueError:
            return None
    if name == "llama2" and (config.max_seq_len == LLAMA1_CONTEXT or config.vocab_size not in LLAMA2_VOCABULARIES):
        return None
    return name


def _silent(line: str) -> None:
    pass


def assemble(
    params: Mapping[str, object],
    found: Sequence[Mapping[str, np.ndarray | None]],
    rope_factor: float | None = None,
    report: Report = print,
) -> tuple[Config, dict[str, Tensor]]:
    """Return the config, and every parameter merged, in the order of the forward pass.

    found   each shard's arrays in Meta's names; None for what is not a parameter

    Raises ConfigError for errors in params.json, CheckpointError for errors in the shards.
    """
    report_left_out((name for shard in found for name, array in shard.items() if array is None), report)
    plain = [without_biases("the shards", shard, report if i == 0 else _silent) for i, shard in enumerate(found)]
    shards = [{name: array for name, array in shard.items() if array is not None} for shard in plain]
    names = set(shards[0])
    for i, shard in enumerate(shards[1:], start=1):
        if odd := sorted(names.symmetric_difference(shard)):
            raise CheckpointError(f"{odd[0]} is in only one of shards 00 and {i:02d}")

    # Check names and the number of layers first: a wrong params.json must not make us allocate memory.
    dim, n_layers = whole(params, "dim"), whole(params, "n_layers")
    layers = {int(m[1]) for name in names if (m := re.match(r"layers\.(\d{1,6})\.", name))}
    if layers != set(range(min(n_layers, len(layers) + 1))):
        raise ConfigError(f"n_layers is {n_layers}, but the shards have {len(layers)} layers")
    for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"):
        if name not in names:
            raise CheckpointError(f"{name} is missing")
    for name in names:
        if shards[0][name].ndim != (ndim := 1 if name.endswith("norm.weight") else 2):
            raise CheckpointError(f"{name} is {list(shards[0][name].shape)}, expected {ndim} dimensions")
    _check_number_of_shards(params, shards)

    n = len(shards)
    embedding = shards[0]["tok_embeddings.weight"].shape
    if "output.weight" in names:
        vocab_size = n * shards[0]["output.weight"].shape[0]
    else:
        vocab_size = embedding[0] if n == 1 or embedding[1] * n == dim else n * embedding[0]
    config = resolve(
        params,
        ffn_dim=n * shards[0]["layers.0.feed_forward.w1.weight"].shape[0],
        vocab_size=vocab_size,
        tied="output.weight" not in names,
        rope_factor=rope_factor,
        report=report,
    )
    shapes = parameter_shapes(config)
    checkpoint.check_names("the shards", shapes, names)
    tensors = {name: _join(name, [shard[name] for shard in shards], shape) for name, shape in shapes.items()}
    return tie(config, tensors, report)
