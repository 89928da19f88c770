"""Record the named activations of a forward pass in memory or in a trace directory, or replace them as it runs.

A trace directory, format "npllama trace 1":

    trace.json                              a description of the run, and an entry for every activation
    tok_embeddings.npy                      the prompt's activations, under the names that forward() gives them
    layers.0.attention_norm.npy
    ...
    logits.npy
    step.0/tok_embeddings.npy               those of the first decode step after the prompt, then step.1/, step.2/ ...
    ...

An activation's name is its file's path without the suffix, with `/` on every system: `layers.0.attention.q_rope`,
`step.1/logits`. Shapes are forward()'s own: [T, D] for one sequence, [B, T, D] for a batch; in a step T is 1, and scores are
[H, 1, S]. Queries and keys are in Meta's order (RoPE rotates adjacent pairs), masked scores are -inf, whoever wrote the trace.

Files are `.npy` (C order, little-endian) of float32, or of float64 when that was computed; simulated or real 16-bit values are
stored as the float32 numbers they are. In the raw storage they are `.f32`: the bare little-endian float32 numbers in C order.

trace.json; all keys are present unless marked optional:

    format       "npllama trace 1"
    source       the program that computed it: "npllama", "transformers", ...
    storage      "npy" or "raw"
    tokens       the prompt's ids, [T] or [B][T]; -1 is padding
    steps        the ids fed in each decode step: [] without steps, [[17], [4]] after two (with a batch [[17, 8], [4, 4]])
    precision    "float64", "float32", "bfloat16", "float16"
    convention   "meta" or "hf", where a 16-bit precision rounds (precision.py); null for float64 and float32
    model        {"path": str or null, "manifest_sha256": str or null, "config": Config.to_dict()}
    versions     {"npllama": "0.1.0", "numpy": ..., "python": ..., and other packages used}
    selection    {"taps": [GLOB ...] or null, "layers": [int ...] or null}, null for everything
    notes        sentences for readers, such as how names or layouts were converted
    files        other files in the directory: the README.md and the weights of a golden bundle
    profile      optional: the rounding profile, in the syntax of precision.profile()
    runtime      optional: the settings of a captured program, {"flash_attention": "off", "cache": "f16", ...}
    weights      optional: name -> {"file", "shape", "sha256"}, float32 in .npy
    activations  name -> {"file", "dtype", "shape", "sha256" (of the file's bytes),
                          "min", "max", "mean", "rms" of the finite numbers, null if there are none,
                          "n_nan", "n_inf", "n_neg_inf"}, in the order of their computation; and "noise" in a golden bundle,
                          "made", where the capture computed the numbers, not the program: how

A trace is written under a temporary name next to its target and renamed when complete: a trace that opens is complete.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike

from ..activations import activation_shapes
from ..cache import KVCache
from ..checkpoint import Model, foreign, sha256
from ..checkpoint.atomic import new_folder, not_ours, writing
from ..config import Config
from ..engine.memory import size_text
from ..engine.weights import native
from ..errors import NpllamaError, printable, shown
from ..model import check_tokens
from ..scope import Tap
from .precision import Precision

FORMAT = "npllama trace 1"
META_KEYS = (
    "format",
    "source",
    "storage",
    "tokens",
    "steps",
    "precision",
    "convention",
    "model",
    "versions",
    "selection",
    "notes",
    "files",
    "activations",
)
ENTRY_KEYS = ("file", "dtype", "shape", "sha256", "min", "max", "mean", "rms", "n_nan", "n_inf", "n_neg_inf")


class TraceError(NpllamaError):
    """A trace can't be read or written."""


class Trace(Mapping[str, np.ndarray]):
    """A trace directory: activation name -> read-only array, memory-mapped at access.

    .path, and .meta, which is trace.json as read. A file that is missing, cut off or not as trace.json describes raises
    TraceError at access; a hash that doesn't match does not (see hash_matches).
    """

    def __init__(self, path: Path, meta: dict):
        self.path = path
        self.meta = meta

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.meta["activations"][name]
        file, shape = self.path / entry["file"], tuple(entry["shape"])
        if self.meta["storage"] == "raw":
            return native(foreign.read_raw(file, shape, TraceError))
        array = native(foreign.read_npy(file, TraceError))
        if array.shape != shape or array.dtype != np.dtype(entry["dtype"]):
            raise TraceError(f"{file}: {array.dtype} of shape {array.shape}, but trace.json says {entry['dtype']} of {shape}")
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.meta["activations"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["activations"])

    def __len__(self) -> int:
        return len(self.meta["activations"])

    def hash_matches(self, name: str) -> bool:
        """Return whether the activation's file matches its sha256 in trace.json."""
        entry = self.meta["activations"][name]
        file = self.path / entry["file"]
        foreign.file_size(file, TraceError)
        try:
            return sha256(file) == entry["sha256"]
        except OSError as error:
            raise TraceError(f"{file}: {error.strerror or error}") from None


def read_trace(path: Path | str) -> Trace:
    """Open a trace directory. Raises TraceError when its trace.json is missing or differs from this module's docstring."""
    path = Path(path)
    file = path / "trace.json"
    meta = foreign.read_json(file, TraceError, foreign.LONG_LIMIT)
    if meta.get("format") != FORMAT:
        raise TraceError(f"{file}: format {shown(meta.get('format'))}, expected {FORMAT!r}")
    if missing := [key for key in META_KEYS if key not in meta]:
        raise TraceError(f"{file}: missing {', '.join(missing)}")
    if meta["storage"] not in ("npy", "raw") or not isinstance(meta["activations"], dict):
        raise TraceError(f"{file}: expected storage npy or raw, and activations by name")
    if not isinstance(meta["files"], list) or not all(isinstance(name, str) for name in meta["files"]):
        raise TraceError(f"{file}: files is {shown(meta['files'])}, expected a list of names")
    dtypes = ("float32",) if meta["storage"] == "raw" else ("float32", "float64")
    for name, entry in meta["activations"].items():
        where = f"{file}: activation {printable(name)[:200]}"
        if missing := [key for key in ENTRY_KEYS if not isinstance(entry, dict) or key not in entry]:
            raise TraceError(f"{where} lacks {', '.join(missing)}")
        if entry["dtype"] not in dtypes:
            raise TraceError(f"{where} has dtype {shown(entry['dtype'])}, expected {' or '.join(dtypes)}")
        if not foreign.is_shape(entry["shape"], least=1):
            raise TraceError(f"{where} has shape {shown(entry['shape'])}, expected positive numbers")
        if not isinstance(entry["file"], str):
            raise TraceError(f"{where} has file {shown(entry['file'])}, expected a name")
        inside = PurePosixPath(entry["file"])
        if inside.is_absolute() or ".." in inside.parts:
            raise TraceError(f"{where} names the file {shown(entry['file'])}, which is outside the trace")
    return Trace(path, meta)


# ------------------------------------------------------------------------------------------------------ a choice of activations


FLOAT32 = Precision("float32")


@dataclass(frozen=True)
class Selection:
    """Select the activations whose name, without `step.N/`, fits one of `taps` and whose layer is one of `layers`.

    None keeps all. `layers` doesn't affect activations outside of the layers (tok_embeddings, norm, logits).
    """

    taps: tuple[str, ...] | None = None  # shell patterns: "*.q_rope", "layers.0.*"
    layers: tuple[int, ...] | None = None

    def __contains__(self, name: str) -> bool:
        name = name.rpartition("/")[2]
        if self.layers is not None and name.startswith("layers.") and int(name.split(".")[1]) not in self.layers:
            return False
        return self.taps is None or any(fnmatch.fnmatchcase(name, glob) for glob in self.taps)

    def check(self, config: Config) -> None:
        """Raise TraceError for a pattern that matches no activation of this model, or a layer that it lacks."""
        names = activation_shapes(config, 1)
        if unknown := [layer for layer in self.layers or () if not 0 <= layer < config.n_layers]:
            raise TraceError(f"layer {unknown[0]} is not in this model, which has layers 0 to {config.n_layers - 1}")
        for glob in self.taps or ():
            if not fnmatch.filter(names, glob):
                raise TraceError(f"no activation fits {glob!r}; they are named like {', '.join(list(names)[:3])}")
        if not any(name in self for name in names):
            raise TraceError("taps and layers together select no activation")


EVERYTHING = Selection()
MOST_LAYERS = 10_000


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer numbers and ranges.    "0-3,7" -> (0, 1, 2, 3, 7)"""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise TraceError(f"layers {text!r:.60}: expected numbers and ranges, such as 0-3,7")
        if int(last or first) >= MOST_LAYERS:  # a range of any length would fill the memory before the model is asked
            raise TraceError(
                f"layers {text!r:.60}: no model has layer {int(last or first)}, expected numbers below {MOST_LAYERS:,}"
            )
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


# ------------------------------------------------------------------------------------------------------------ running a model

Patch = Mapping[str, "np.ndarray | Callable[[np.ndarray], np.ndarray]"]


def run(
    model: Model, tokens: ArrayLike, steps: int | ArrayLike = 0, precision: Precision = FLOAT32, tap: Tap | None = None
) -> list:
    """Feed a prompt, then one token at a time through the cache; tap names the activations of decode step N `step.N/...`.

    tokens  int [T], or [B, T] with padding on the left
    steps   how many tokens to decode, each the most likely one; or the ids to feed, [steps] or [steps, B]

    Returns the ids that were fed in the steps, in the form of trace.json. Raises ValueError for tokens that the model can't
    take.
    """
    tokens, given = checked_run(model.config, tokens, steps)
    *batch, _ = tokens.shape
    n_steps = n_steps_of(steps)

    def below(prefix: str) -> Tap | None:
        return None if tap is None else lambda name, x: tap(prefix + name, x)

    cache = KVCache(model.config, tuple(batch))
    logits = precision.forward(model.params, model.config, tokens, cache, tap)
    fed = []
    for i in range(n_steps):
        next_tokens = np.argmax(logits[..., -1:, :], axis=-1) if given is None else given[i]  # [..., 1]
        fed.append(next_tokens.ravel().tolist())

        logits = precision.forward(model.params, model.config, next_tokens, cache, below(f"step.{i}/"))
    return fed


def checked_run(config: Config, tokens: ArrayLike, steps: int | ArrayLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the prompt's ids, and those to feed in the steps if given: [steps, ..., 1]; the arguments are those of run().

    Raises ValueError unless the model can take them all.
    """
    tokens, n_steps, given = check_tokens(tokens, config), n_steps_of(steps), None
    *batch, _ = tokens.shape
    if np.ndim(steps) > 0:
        given = np.asarray(steps)
        if given.size != n_steps * int(np.prod(batch)):
            raise TraceError(
                f"steps of shape {given.shape}: expected one id a step for each of {int(np.prod(batch))} sequences"
            )
        given = given.reshape(n_steps, *batch, 1)
        if given.size:
            check_tokens(given, config)
    longest = int(np.count_nonzero(tokens >= 0, axis=-1).max()) + n_steps
    if longest > config.max_seq_len:
        raise TraceError(f"{longest} tokens do not fit the model's context of {config.max_seq_len}")
    return tokens, given


def n_steps_of(steps: int | ArrayLike) -> int:
    """Return how many decode steps run() takes for its argument `steps`; TraceError if that is neither a number nor ids."""
    ids = np.asarray(steps)
    if (ids.dtype.kind not in "iu" and ids.size) or (ids.ndim == 0 and ids < 0):
        raise TraceError(f"steps is {steps!r}, expected how many or the token ids")
    return int(ids) if ids.ndim == 0 else len(ids)


def patched(patch: Patch, tap: Tap | None = None) -> Tap:
    """Return a tap that replaces computed activations by others, and passes the result to `tap`.

    patch  name -> the array to use instead, or a function of the computed one that returns it

    The array is cast to the computed one's dtype. Raises ValueError if its shape differs.
    """

    def replace(name: str, x: np.ndarray) -> np.ndarray:
        if name in patch:
            given = patch[name]
            new = np.asarray(given(x) if callable(given) else given)
            if new.shape != x.shape or new.dtype.kind not in "fiu":
                raise TraceError(f"patch of {name} is {new.dtype} of shape {new.shape}, expected numbers of shape {x.shape}")
            x = new.astype(x.dtype, copy=False)
        return x if tap is None else tap(name, x)

    return replace


class Recording(dict[str, np.ndarray]):
    """Tap that keeps a copy of each selected activation: name -> array.

    recording = Recording(Selection(taps=("*.q_rope",)))
    npllama.forward(model.params, model.config, tokens, tap=recording)
    recording["layers.0.attention.q_rope"]        # [T, H, K]
    """

    def __init__(self, selection: Selection = EVERYTHING):
        super().__init__()
        self.selection = selection

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        """Keep a copy, since the forward pass may update the array in place, and return the activation itself."""
        if name in self.selection:
            self[name] = np.array(x, order="C")
        return x


def record(
    model: Model,
    tokens: ArrayLike,
    steps: int | ArrayLike = 0,
    precision: Precision = FLOAT32,
    selection: Selection = EVERYTHING,
    patch: Patch | None = None,
) -> Recording:
    """Run a model and keep its activations in memory; see run() for tokens and steps, patched() for patch.

    record(model, [1, 2, 3])["layers.0.attention.scores"]        # [H, 3, 3]

    Raises ValueError, also for a patch or selection that fits no activation.
    """
    selection.check(model.config)
    prefixes = ["", *(f"step.{i}/" for i in range(n_steps_of(steps)))]
    names = {prefix + name for prefix in prefixes for name in activation_shapes(model.config, 1)}
    if unknown := set(patch or ()).difference(names):
        raise TraceError(f"patch of {min(unknown)}, which is no activation of this run")
    recording = Recording(selection)
    run(model, tokens, steps, precision, patched(patch or {}, recording))
    return recording


# ------------------------------------------------------------------------------------------------------------ writing a trace


class TraceWriter:
    """Tap that writes each selected activation to disk at once. Made by new_trace()."""

    def __init__(self, folder: Path, target: Path, selection: Selection, storage: str):
        self.folder, self.target = folder, target  # the folder it is written in, and its final path
        self.selection, self.storage = selection, storage
        self.entries: dict[str, dict] = {}
        self.files: list[str] = []
        self.weights: dict[str, dict] = {}
        self.meta: dict[str, object] = {}

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        """Write the activation if it is selected, and return it."""
        if name in self.selection:
            self.add(name, x)
        return x

    def add(self, name: str, x: np.ndarray, **facts: object) -> None:
        """Write one activation, with its entry for trace.json, to which `facts` are added."""
        dtype = np.dtype("<f8" if native(x).dtype == np.float64 and self.storage == "npy" else "<f4")
        stored = np.ascontiguousarray(x, dtype)
        file = self.folder / (name + (".npy" if self.storage == "npy" else ".f32"))
        file.parent.mkdir(exist_ok=True)
        with writing(file, self.target / file.relative_to(self.folder)) as out:
            if self.storage == "npy":
                np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(stored))
            out.write(stored.data)
        self.entries[name] = {
            "file": file.relative_to(self.folder).as_posix(),
            "dtype": dtype.name,
            "shape": list(x.shape),
            "sha256": sha256(file),
            **statistics(stored),
            **facts,
        }

    def add_weight(self, name: str, x: np.ndarray) -> None:
        """Write a weight as float32 below weights/."""
        file = f"weights/{name}.npy"
        (self.folder / file).parent.mkdir(exist_ok=True)
        stored = np.ascontiguousarray(x, "<f4")
        with writing(self.folder / file, self.target / file) as out:
            np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(stored))
            out.write(stored.data)
        self.files.append(file)
        self.weights[name] = {"file": file, "shape": list(x.shape), "sha256": sha256(self.folder / file)}

    def add_text(self, file: str, text: str) -> None:
        """Write a text file next to the activations."""
        self._write_text(file, text)
        self.files.append(file)

    def describe(
        self,
        source: str,
        tokens: ArrayLike,
        steps: list,
        precision: Precision,
        model: Mapping[str, object],
        versions: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
        **more: object,
    ) -> None:
        """Record the run's description under the keys of trace.json, optional ones in `more`. Call it before finish()."""
        from .. import __version__

        self.meta = {
            "format": FORMAT,
            "source": source,
            "storage": self.storage,
            "tokens": np.asarray(tokens).tolist(),
            "steps": steps,
            "precision": precision.name,
            "convention": precision.convention,
            "model": dict(model),
            "versions": {
                "npllama": __version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                **(versions or {}),
            },
            "selection": {key: value and list(value) for key, value in vars(self.selection).items()},
            "notes": list(notes),
            "files": self.files,
            **({"profile": precision.profile} if precision.parts else {}),
            **more,
        }

    def finish(self) -> None:
        """Write trace.json."""
        weights = {"weights": self.weights} if self.weights else {}
        text = json.dumps({**self.meta, **weights, "activations": self.entries}, indent=1, allow_nan=False)
        self._write_text("trace.json", text + "\n")

    def _write_text(self, file: str, text: str) -> None:
        with writing(self.folder / file, self.target / file) as out:
            out.write(text.encode())


def statistics(x: np.ndarray) -> dict[str, float | int | None]:
    """Return an array's statistics for trace.json: of its finite numbers, and how many are not finite."""
    finite = x[np.isfinite(x)].astype(np.float64)
    found: dict[str, float | int | None] = {"min": None, "max": None, "mean": None, "rms": None}
    if finite.size:
        largest = float(np.max(np.abs(finite))) or 1.0  # divided by it, the squares can't overflow
        rms = largest * float(np.sqrt(np.mean((finite / largest) ** 2)))
        found = {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean()), "rms": rms}
    counts = {"n_nan": np.isnan(x), "n_inf": np.isposinf(x), "n_neg_inf": np.isneginf(x)}
    return found | {key: int(np.count_nonzero(where)) for key, where in counts.items()}


def _why_not_ours(path: Path) -> str | None:
    """Return why the folder must not be deleted as a trace; None if it may be."""
    try:
        meta = read_trace(path).meta
    except TraceError as error:
        return str(error)
    return not_ours(path, {"trace.json", *meta["files"], *(entry["file"] for entry in meta["activations"].values())})


@contextlib.contextmanager
def new_trace(
    out: Path | str, selection: Selection = EVERYTHING, storage: str = "npy", force: bool = False, n_bytes: int = 0
) -> Iterator[TraceWriter]:
    """Write a trace that appears at `out` complete or not at all: call the writer for each activation, and its describe().

    force    replace a trace, or an empty folder; nothing else
    n_bytes  its expected size: it is refused before the first byte if the disk is too full

    Raises ValueError.
    """
    if storage not in ("npy", "raw"):
        raise TraceError(f"storage is {storage!r}, expected npy or raw")
    try:
        with new_folder(out, force, _why_not_ours) as folder:
            if n_bytes > (free := shutil.disk_usage(folder).free):
                raise TraceError(
                    f"{out}: the trace needs {size_text(n_bytes)}, but only {size_text(free)} are free on that disk"
                )
            writer = TraceWriter(folder, Path(out), selection, storage)
            yield writer
            writer.finish()
    except OSError as error:
        raise TraceError(f"{error.filename or out}: {error.strerror or error}") from None


def trace_size(
    config: Config,
    tokens: ArrayLike,
    n_steps: int = 0,
    precision: Precision = FLOAT32,
    selection: Selection = EVERYTHING,
    storage: str = "npy",
) -> tuple[int, int]:
    """Return how many activations a trace will have and the bytes of their files, without trace.json, from shapes alone."""
    *batch, T = np.shape(tokens)
    itemsize = 8 if precision.name == "float64" and storage == "npy" else 4
    header = 128 if storage == "npy" else 0
    passes = [(T, T)] + [(1, T + i + 1) for i in range(n_steps)]
    shapes = [
        shape
        for new, slots in passes
        for name, shape in activation_shapes(config, new, slots, tuple(batch)).items()
        if name in selection
    ]
    return len(shapes), sum(header + itemsize * int(np.prod(shape)) for shape in shapes)


def model_facts(model: Model) -> dict[str, object]:
    """Return the "model" entry of trace.json."""
    path = getattr(model, "path", None)
    manifest = Path(path) / "manifest.json" if path is not None else None
    return {
        "path": None if path is None else str(Path(path).resolve()),
        "manifest_sha256": sha256(manifest) if manifest and manifest.is_file() else None,
        "config": model.config.to_dict(),
    }


def write_trace(
    model: Model,
    tokens: ArrayLike,
    out: Path | str,
    steps: int | ArrayLike = 0,
    precision: Precision = FLOAT32,
    selection: Selection = EVERYTHING,
    storage: str = "npy",
    force: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> Trace:
    """Run a model and write its activations to the directory `out`; see run() for tokens and steps, new_trace() for the rest.

    report is called with a line on the trace's size before anything is computed or written. Raises ValueError.
    """
    tokens, _ = checked_run(model.config, tokens, steps)
    selection.check(model.config)
    n_activations, n_bytes = trace_size(model.config, tokens, n_steps_of(steps), precision, selection, storage)
    with new_trace(out, selection, storage, force, n_bytes) as writer:
        report(f"{n_activations} activations, {size_text(n_bytes)}, to {out}")
        fed = run(model, tokens, steps, precision, writer)
        writer.describe("npllama", tokens, fed, precision, model_facts(model))
    return read_trace(out)
