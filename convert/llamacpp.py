"""Record llama.cpp's activations as a trace directory, under npllama's names.

llama.cpp calls back for every tensor of its graph once it is computed. The library is the one in xllamacpp's wheel, which
exports the C interface of llama.h. Its structures are declared here, so only the versions in KNOWN are accepted. Names and
layouts are those of the map "ggml" (golden/compare/maps.py); the operation distinguishes queries and keys before RoPE from
those after it. Nothing is recomputed except the scores, whose scale and mask llama.cpp applies inside its softmax: trace.json
marks them as `made`. With flash attention there are no scores and no weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from npllama.activations import activation_shapes
from npllama.config import Config
from npllama.engine import threads
from npllama.engine.memory import size_text
from npllama.golden.compare.maps import LayoutError, arrange, read_map
from npllama.golden.precision import Precision, profile
from npllama.golden.trace import (
    EVERYTHING,
    Selection,
    Trace,
    TraceError,
    TraceWriter,
    checked_run,
    n_steps_of,
    new_trace,
    read_trace,
    trace_size,
)

from . import gguf

KNOWN = ("2026.9.11063", "2026.10.11549")  # versions of xllamacpp
FLASH = {"off": 0, "on": 1, "auto": -1}  # llama_flash_attn_type
CACHE = {"f32": 0, "f16": 1}  # ggml_type
NUMBERS: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # ggml_type -> the dtype that a tensor is read with
LEAST_CONTEXT = 256  # llama.cpp pads its cache to this length
# The rounding of the other factor of a product in llama.cpp's CPU code (vec_dot_type in ggml-cpu.c), by the weights' type, as a
# part of a rounding profile.
PART_OF = {
    "f32": "",
    "f16": "float16-activations",
    "bf16": "bfloat16-activations",
    **dict.fromkeys(("q8_0", "q4_0", "q5_0"), "int8-activations"),
    **dict.fromkeys(("q4_1", "q5_1"), "int8-activations-sums"),
    **dict.fromkeys(("q2_K", "q3_K", "q4_K", "q5_K", "q6_K"), "int8-activations-256"),
}
NOTES = (
    "names and layouts became npllama's by the map ggml",
    "scores are kq, divided by sqrt(K) and masked here: llama.cpp does both inside its softmax",
)


class Tensor(Structure):
    """Mirror ggml_tensor of ggml.h."""


Tensor._fields_ = [
    ("type", c_int),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(Tensor) * 10),
    ("view_src", POINTER(Tensor)),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
    ("extra", c_void_p),
    ("padding", c_char * 8),
]
EvalCallback = ctypes.CFUNCTYPE(c_bool, POINTER(Tensor), c_bool, c_void_p)
LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class ModelParams(Structure):
    """Mirror llama_model_params of llama.h, opaque since its defaults are kept, with room for any version's."""

    _fields_ = [("all", c_char * 1024)]


class ContextParams(Structure):
    """Mirror llama_context_params of llama.h up to the last field that is set, with room for the rest of any version's."""

    _fields_ = [
        ("n_ctx", c_int32),
        ("n_batch", c_int32),
        ("n_ubatch", c_int32),
        ("n_seq_max", c_int32),
        ("n_rs_seq", c_int32),
        ("n_outputs_max", c_int32),
        ("unused", c_int32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope", c_float * 6),
        ("yarn_orig_ctx", c_int32),
        ("defrag_thold", c_float),
        ("cb_eval", EvalCallback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("rest", c_char * 912),
    ]


class Batch(Structure):
    """Mirror llama_batch of llama.h."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def capture(
    path: Path | str,
    tokens: ArrayLike,
    out: Path | str,
    steps: int | ArrayLike = 0,
    selection: Selection = EVERYTHING,
    storage: str = "npy",
    force: bool = False,
    report: Callable[[str], object] = lambda line: None,
    flash_attention: str = "off",
    cache: str = "f32",
) -> Trace:
    """Run llama.cpp on a GGUF file and write its activations as a trace.

    tokens           int [T], one sequence without padding
    steps            how many tokens to decode greedily after the prompt, or the ids to feed
    flash_attention  "off", "on" or "auto"
    cache            "f32" or "f16": the dtype of stored keys and values; llama.cpp's own default is f16

    The other arguments are those of golden.trace.write_trace. Raises ValueError when the file or the tokens can't be used or
    the library's version isn't known, ImportError without xllamacpp.
    """
    if flash_attention not in FLASH or cache not in CACHE:
        raise TraceError(
            f"flash_attention is {flash_attention!r} and cache {cache!r}, expected off, on or auto, and f32 or f16"
        )
    library, version = _library()
    config = gguf.read(Path(path), report=lambda line: None).config
    tokens, given = checked_run(config, tokens, steps)
    if tokens.ndim != 1 or tokens.min() < 0:
        raise TraceError(
            "llama.cpp is captured one sequence at a time, without padding: expected --tokens with one list of ids"
        )
    selection.check(config)
    n_activations, n_bytes = trace_size(config, tokens, n_steps_of(steps), selection=selection, storage=storage)
    with new_trace(out, selection, storage, force, n_bytes) as writer:
        report(f"up to {n_activations} activations, {size_text(n_bytes)}, to {out}")
        graph = _Graph(library, config, writer)
        length = len(tokens) + n_steps_of(steps)
        with _context(library, Path(path), length, graph, flash_attention, cache) as context:
            fed = graph.run(context, tokens, n_steps_of(steps), given)
        parts = {PART_OF.get(kind) for kind in graph.weights}
        if parts == {"int8-activations", "int8-activations-sums"}:
            parts = {"int8-activations-sums"}
        notes, simulated = list(NOTES), sorted(part for part in parts if part)
        if len(parts) > 1 or None in parts:
            notes.append(
                f"weights are {', '.join(sorted(graph.weights))}: no rounding profile describes how activations are rounded"
            )
            simulated = []
        if cache == "f16" or not graph.scores_seen:  # flash attention keeps queries, keys and values in float16
            simulated.append("float16-cache")
        writer.describe(
            "llama.cpp",
            tokens,
            fed,
            Precision("float32"),
            {"path": str(Path(path).resolve()), "manifest_sha256": None, "config": config.to_dict()},
            {"xllamacpp": version, "ggml": library.ggml_version().decode()},
            notes,
            profile="+".join(simulated) or "float32",
            runtime={
                "flash_attention": flash_attention,
                "cache": cache,
                "weights": sorted(graph.weights),
                "threads": threads.n_threads(),
            },
        )
        profile(writer.meta["profile"])  # type: ignore[arg-type]  # that it is one
    return read_trace(out)


# ----------------------------------------------------------------------------------------------------------------- the library


def _library() -> tuple[ctypes.CDLL, str]:
    """Return llama.cpp's library and the version of the package that it comes in; TraceError if that isn't a known one."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ImportError("capturing llama.cpp needs xllamacpp: pip install xllamacpp")
    version = importlib.metadata.version("xllamacpp")
    if version not in KNOWN:
        raise TraceError(f"xllamacpp is {version}, whose C structures are not known here: expected {' or '.join(KNOWN)}")
    files = sorted(Path(found.origin).parent.glob("xllamacpp*.so")) + sorted(Path(found.origin).parent.glob("xllamacpp*.pyd"))
    if len(files) != 1:
        raise TraceError(f"{Path(found.origin).parent}: {len(files)} libraries, expected xllamacpp's one")
    library = ctypes.CDLL(os.fspath(files[0]))
    for name, result, arguments in (
        ("llama_model_default_params", ModelParams, []),
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
        ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_free", None, [c_void_p]),
        ("llama_model_free", None, [c_void_p]),
        ("llama_log_set", None, [LogCallback, c_void_p]),
        ("ggml_backend_tensor_get", None, [POINTER(Tensor), c_void_p, c_size_t, c_size_t]),
        ("ggml_nbytes", c_size_t, [POINTER(Tensor)]),
        ("ggml_op_desc", c_char_p, [POINTER(Tensor)]),
        ("ggml_get_name", c_char_p, [POINTER(Tensor)]),
        ("ggml_type_name", c_char_p, [c_int]),
        ("ggml_version", c_char_p, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, version


@contextlib.contextmanager
def _context(
    library: ctypes.CDLL, path: Path, length: int, graph: _Graph, flash_attention: str, cache: str
) -> Iterator[c_void_p]:
    """Open the model with room for `length` tokens in one batch; TraceError with llama.cpp's message if that fails."""
    said: list[str] = []

    @LogCallback
    def log(level: int, line: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            said.append(line.decode(errors="replace").strip())

    def opened(pointer: int | None) -> c_void_p:
        if not pointer:
            raise TraceError(f"{path}: llama.cpp can't run it" + (f": {said[0]}" if said else ""))
        return c_void_p(pointer)

    params: ContextParams = library.llama_context_default_params()
    defaults = (
        params.n_ctx,
        params.n_batch,
        params.n_ubatch,
        params.n_threads,
        params.flash_attn_type,
        params.type_k,
        params.type_v,
    )
    if defaults != (512, 2048, 512, 4, -1, 1, 1):
        raise TraceError(f"llama_context_default_params() gives {defaults}: not the structure that is declared here")
    params.n_ctx = params.n_batch = params.n_ubatch = -(-length // LEAST_CONTEXT) * LEAST_CONTEXT
    params.n_threads = params.n_threads_batch = threads.n_threads()
    params.flash_attn_type = FLASH[flash_attention]
    params.type_k = params.type_v = CACHE[cache]
    params.cb_eval = callback = EvalCallback(graph.see)
    library.llama_log_set(log, None)
    with contextlib.ExitStack() as stack:
        stack.callback(library.llama_log_set, SILENT, None)  # `log` ends with this block
        model = opened(library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params()))
        stack.callback(library.llama_model_free, model)
        context = opened(library.llama_init_from_model(model, params))
        stack.callback(library.llama_free, context)
        yield context
    del callback  # which the context called until here


@LogCallback
def SILENT(level: int, line: bytes, _: object) -> None:  # a constant: it must outlive every call
    """Discard a log message."""


class _Graph:
    """Collect the tensors that the callback gets during a pass, until they are written.

    weights      the types of the weight matrices used
    scores_seen  whether attention ran op by op
    """

    def __init__(self, library: ctypes.CDLL, config: Config, writer: TraceWriter):
        self.library, self.config, self.writer = library, config, writer
        self.names = read_map("ggml")
        self.weights: set[str] = set()
        self.scores_seen = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.found: dict[str, np.ndarray] = {}
        self.error: Exception | None = None

    def see(self, tensor: Tensor, asked: bool, _: object) -> bool:
        """Return whether a tensor is needed, and copy its numbers: llama.cpp's callback, which must not raise."""
        try:
            if self.error is None and (chosen := self._chosen(tensor)):
                if not asked:
                    self._take(chosen, tensor)
                return True
        except Exception as error:  # an exception can't cross C: run() raises it
            self.error = error
        return not asked

    def _chosen(self, tensor: Tensor) -> str | None:
        """Return our name for the tensor; None if it has none, or isn't selected."""
        name = self.library.ggml_get_name(tensor).decode(errors="replace")
        if name.encode() != tensor.contents.name:
            raise TraceError(
                f"a tensor is named {tensor.contents.name!r} and {name!r}: not the structure that is declared here"
            )
        found = self.names.find_all(name)
        if isinstance(found, str) or not found:
            return None
        operation = self.library.ggml_op_desc(tensor).decode()
        if operation == "MUL_MAT" and tensor.contents.src[0].contents.name.endswith(b".weight"):
            self.weights.add(self.library.ggml_type_name(tensor.contents.src[0].contents.type).decode())
        if len(found) > 1:  # before and after RoPE; those between are views
            side = {"MUL_MAT": 0, "ROPE": 1}.get(operation)
            return None if side is None else found[side][0]
        return found[0][0]

    def _take(self, name: str, tensor: Tensor) -> None:
        self.scores_seen |= name.endswith("attention.scores")
        if name not in self.writer.selection:
            return
        dtype = NUMBERS.get(tensor.contents.type)
        if dtype is None:
            raise TraceError(
                f"{name} is of the type {self.library.ggml_type_name(tensor.contents.type).decode()}, expected f32 or f16"
            )
        n = self.library.ggml_nbytes(tensor)
        raw = np.empty(n, np.uint8)
        self.library.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, n)
        x = np.ndarray(tuple(tensor.contents.ne)[::-1], dtype, raw, strides=tuple(tensor.contents.nb)[::-1])
        own = self.library.ggml_get_name(tensor).decode()
        rule = dict(self.names.find_all(own))[name]  # type: ignore[arg-type]  # _chosen() has found it
        shape = self.shapes[name]
        reference = np.broadcast_to(np.float32(0), shape)
        if rule.unmasked:
            T, S = shape[-2:]
            reference = np.where(np.tri(T, S, S - T, dtype=bool), np.float32(0), np.float32(-math.inf))
            reference = np.broadcast_to(reference, shape)
        try:
            self.found[name] = np.ascontiguousarray(
                arrange(x.astype(np.float32), name, rule, reference, self.config.head_dim, None)
            )
        except LayoutError as error:
            raise TraceError(f"llama.cpp's {own}: {error}") from None

    def run(self, context: c_void_p, tokens: np.ndarray, n_steps: int, given: np.ndarray | None) -> list[list[int]]:
        """Feed the prompt and the steps, write each pass, and return the ids of the steps as golden.trace.run does."""
        fed: list[list[int]] = []
        last = self._pass(context, tokens, 0, "")
        for i in range(n_steps):
            fed.append([int(given[i].item()) if given is not None else int(np.argmax(last))])
            last = self._pass(context, np.array(fed[-1]), len(tokens) + i, f"step.{i}/")
        return fed

    def _pass(self, context: c_void_p, ids: np.ndarray, start: int, prefix: str) -> np.ndarray:
        """Compute one batch and write its recorded activations; return the last token's logits."""
        n = len(ids)
        self.shapes, self.found = activation_shapes(self.config, n, start + n), {}
        sequence = (c_int32 * 1)(0)
        batch = Batch(
            n,
            (c_int32 * n)(*ids.tolist()),
            None,
            (c_int32 * n)(*range(start, start + n)),
            (c_int32 * n)(*[1] * n),
            (POINTER(c_int32) * n)(*[ctypes.cast(sequence, POINTER(c_int32))] * n),
            (c_int8 * n)(*[1] * n),
        )
        status = self.library.llama_decode(context, batch)
        if self.error is not None:
            raise self.error
        if status != 0:
            raise TraceError(f"llama_decode() returned {status}")
        for name in self.shapes:
            if name in self.found and name in self.writer.selection:
                made = {"made": "kq / sqrt(K) + mask"} if name.endswith("attention.scores") else {}
                self.writer.add(prefix + name, self.found[name], **made)
        logits = self.library.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (self.config.vocab_size,)).copy()
