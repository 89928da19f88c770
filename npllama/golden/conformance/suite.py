"""Write and read the suite as files: a folder per case with plain arrays and a case.json that describes them."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.atomic import new_folder, not_ours, writing
from ...checkpoint.foreign import (
    LONG_LIMIT,
    file_size,
    is_shape,
    parse_json,
    read_bytes,
    read_json,
    read_npy,
    read_safetensors,
)
from ...engine.weights import widen
from ...errors import NpllamaError, shown
from ..mistakes import MISTAKES
from .arrays import little, npy, safetensors
from .cases import PROFILES, Case, cases
from .judging import Tolerance
from .measuring import Measured, exact
from .model_files import as_json
from .models import MODELS, TinyModel

FORMAT, VERSION = "npllama conformance 1", 1
FORMATS = ("raw", "npy", "safetensors")
RECORDED = Path(__file__).with_name("recorded.json")
RAW = {  # dtype -> the suffix of a file of bare numbers
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "int64": "i64",
    "int8": "i8",
    "uint16": "u16",
}


class SuiteError(NpllamaError):
    """Raised for files of the suite, or results of a port, that can't be used."""


@dataclass(frozen=True)
class Expected:
    """Hold the expected results of one case.

    outputs     name -> float64 array
    tolerances  output -> profile -> tolerance
    catches     mistake -> its sentence
    """

    path: str
    operation: str
    purpose: str
    outputs: dict[str, np.ndarray]
    tolerances: dict[str, dict[str, Tolerance]]
    catches: dict[str, str]

    @property
    def level(self) -> str:
        """Return the level: L1 of L1/rms_norm/unit."""
        return self.path.partition("/")[0]

    def is_for(self, profile: str) -> bool:
        """Return whether the case applies to a rounding profile."""
        return all(profile in tolerances for tolerances in self.tolerances.values())


@functools.cache
def recorded() -> dict[str, Measured]:
    """Return the recorded measurements of each case."""
    found: Any = parse_json((importlib.resources.files(__package__) / RECORDED.name).read_bytes())["cases"]  # also in a zip
    return {path: Measured(_tolerances(entry["tolerances"]), tuple(entry["catches"])) for path, entry in found.items()}


def is_for(path: str, profile: str) -> bool:
    """Return whether a case applies to a rounding profile, from the recorded measurements."""
    return all(profile in tolerances for tolerances in recorded()[path].tolerances.values())


def _tolerances(found: Any) -> dict[str, dict[str, Tolerance]]:
    return {
        output: {profile: Tolerance(**numbers) for profile, numbers in of_output.items()} for output, of_output in found.items()
    }


def levels_of(text: str | None) -> tuple[str, ...]:
    """Return the levels that `L0,L1` names, all for None. Raises SuiteError."""
    known = tuple(sorted({case.level for case in cases().values()}))
    if text is None:
        return known
    levels = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [level for level in levels if level not in known]:
        raise SuiteError(f"level is {shown(unknown[0])}, expected {', '.join(known)}, or several with commas between them")
    return levels


@functools.cache
def expected(path: str) -> Expected:
    """Return npllama's expected results of a case."""
    case, measured = cases()[path], recorded()[path]
    catches = {name: MISTAKES[name].sentence for name in measured.catches}
    return Expected(path, case.operation.name, case.purpose, exact(case), measured.tolerances, catches)


def built_in(levels: Collection[str] | None = None) -> list[Expected]:
    """Compute the suite of this version, without reading files."""
    return [expected(path) for path, case in cases().items() if levels is None or case.level in levels]


# ---------------------------------------------------------------------------------------------------------------------- export


def export(out: Path | str, levels: Collection[str] | None = None, storage: str = "raw", force: bool = False) -> dict[str, str]:
    """Write the suite to a new folder, and return its files with their sha256. Raises ValueError."""
    if storage not in FORMATS:
        raise SuiteError(f"format is {shown(storage)}, expected {', '.join(FORMATS)}")
    chosen = [case for case in cases().values() if levels is None or case.level in levels]
    files: dict[str, str] = {}
    with new_folder(out, force, _why_not_ours) as folder:

        def write(path: str, data: bytes) -> None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with writing(folder / path, Path(out) / path) as file:  # an error on a full disk names the file
                file.write(data)

        for path, data in _files(chosen, storage):
            write(path, data)
            files[path] = hashlib.sha256(data).hexdigest()
        write("suite.json", as_json(_contents(chosen, storage, files)))
    return files


def _why_not_ours(path: Path) -> str | None:
    try:
        files = _read_contents(path)["files"]
    except SuiteError as error:
        return str(error)
    return not_ours(path, {"suite.json", *files}) if isinstance(files, dict) else "its suite.json lists no files"


def _files(chosen: list[Case], storage: str) -> Iterator[tuple[str, bytes]]:
    for case in chosen:
        own = {name: x for name, x in case.arrays.items() if name not in _model_params(case)}
        for kind, arrays in (("inputs", own), ("outputs", expected(case.path).outputs)):
            for file, data in _stored(kind, arrays, storage).items():
                yield f"{case.path}/{file}", data
        yield f"{case.path}/case.json", as_json(_described(case, storage))
    for model in {model.name: model for case in chosen if (model := _model_of(case))}.values():
        for file, data in _stored("params", model.params, storage).items():
            yield f"models/{model.name}/{file}", data
    for files in {case.arguments["path"]: case.files for case in chosen if "path" in case.arguments}.values():
        yield from files.items()
    for level in sorted({case.level for case in chosen}):
        lines = [_listed(case, storage) for case in chosen if case.level == level]
        yield f"{level}.txt", "".join(lines).encode()
    yield "README.md", README.encode()


def _listed(case: Case, storage: str) -> str:
    """Return a case's line in the list of its level: folder, operation, inputs, numbers and outputs."""
    held = expected(case.path)
    parts = [case.path, case.operation.name]
    own = {name: x for name, x in case.arrays.items() if name not in _model_params(case)}
    for name, x in own.items():
        file = name if storage == "safetensors" else _file_of("inputs", name, x.dtype.name, storage)
        parts.append(f"{file}[{','.join(map(str, x.shape))}]")
    for name, value in case.constants.items():
        numbers = value if isinstance(value, dict) else {name: value}
        parts += [f"{key}={number!r}" for key, number in numbers.items() if type(number) in (int, float)]
    outputs = [f"{name}[{','.join(map(str, y.shape))}]" for name, y in held.outputs.items()]
    return " ".join([*parts, "->", *outputs]) + "\n"


def _model_of(case: Case) -> TinyModel | None:
    """Return the model whose parameters are among a case's inputs; they are written once, not for each case."""
    return next((model for model in MODELS.values() if model.params is case.arguments.get("params")), None)


def _model_params(case: Case) -> Mapping[str, np.ndarray]:
    model = _model_of(case)
    return model.params if model else {}


def _stored(kind: str, arrays: Mapping[str, np.ndarray], storage: str) -> dict[str, bytes]:
    """Return the files of a case's inputs or outputs, and their content."""
    if storage == "safetensors":
        return {f"{kind}.safetensors": safetensors(arrays)} if arrays else {}
    return {
        _file_of(kind, name, x.dtype.name, storage): npy(x) if storage == "npy" else little(x) for name, x in arrays.items()
    }


def _file_of(kind: str, name: str, dtype: str, storage: str) -> str:
    return {"npy": f"{name}.npy", "safetensors": f"{kind}.safetensors", "raw": f"{name}.{RAW[dtype]}"}[storage]


def _described(case: Case, storage: str) -> dict[str, object]:
    """Return the content of case.json."""
    held = expected(case.path)

    def facts(kind: str, name: str, x: np.ndarray) -> dict[str, object]:
        return {"dtype": x.dtype.name, "shape": list(x.shape), "file": _file_of(kind, name, x.dtype.name, storage)}

    def inputs(name: str, x: np.ndarray) -> dict[str, object]:
        if (model := _model_of(case)) and name in model.params:
            found = facts("params", name, x)
            return found | {"file": f"../../../models/{model.name}/{found['file']}"}
        return facts("inputs", name, x)

    return {
        "case": case.path,
        "operation": case.operation.name,
        "signature": case.operation.signature,
        "purpose": case.purpose,
        "formula": case.operation.text,
        "source": case.operation.source,
        "inputs": {name: inputs(name, x) for name, x in case.arrays.items()},
        "constants": case.constants,
        "outputs": {
            name: facts("outputs", name, x)
            | {"tolerance": {profile: _plain(tolerance) for profile, tolerance in held.tolerances[name].items()}}
            for name, x in held.outputs.items()
        },
        "catches": held.catches,
        "inputs_sha256": case.sha256(),
    }


def _plain(tolerance: Tolerance) -> dict[str, object]:
    return {key: value for key, value in asdict(tolerance).items() if value is not False}


def _contents(chosen: list[Case], storage: str, files: dict[str, str]) -> dict[str, object]:
    inputs = hashlib.sha256("".join(f"{case.path} {case.sha256()}\n" for case in chosen).encode()).hexdigest()
    return {
        "format": FORMAT,
        "version": VERSION,
        "storage": storage,
        "profiles": {name: list(precisions) for name, precisions in PROFILES.items()},
        "cases": [case.path for case in chosen],
        "inputs_sha256": inputs,  # equal on every machine; expected values differ in their last bits
        "files": files,
    }


# ------------------------------------------------------------------------------------------------------------------------ read


def _read_contents(folder: Path) -> dict[str, Any]:
    contents = read_json(folder / "suite.json", SuiteError, LONG_LIMIT)
    if contents.get("format") != FORMAT:
        raise SuiteError(f"{folder / 'suite.json'}: format is {shown(contents.get('format'))}, expected {FORMAT!r}")
    return contents


def read_suite(folder: Path | str, levels: Collection[str] | None = None) -> list[Expected]:
    """Read an exported suite, and verify the sha256 of every file. Raises SuiteError."""
    folder = Path(folder)
    contents = _read_contents(folder)
    paths, files = contents.get("cases"), contents.get("files")
    if not isinstance(paths, list) or not isinstance(files, dict) or not all(isinstance(path, str) for path in paths):
        raise SuiteError(f"{folder / 'suite.json'}: expected a list of cases and the sha256 of each file")
    for file, sha256 in files.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise SuiteError(f"{folder / 'suite.json'} names {shown(file)}, expected files inside the folder")
        if hashlib.sha256(read_bytes(folder / file, LONG_LIMIT, SuiteError)).hexdigest() != sha256:
            raise SuiteError(f"{folder / file} does not match its sha256 in suite.json")
    chosen = [path for path in paths if levels is None or path.partition("/")[0] in levels]
    for path in chosen:
        if f"{path}/case.json" not in files:
            raise SuiteError(f"{folder / 'suite.json'} has the case {shown(path)} without its case.json")
    return [_read_case(folder, path) for path in chosen]


def _read_case(folder: Path, path: str) -> Expected:
    file = folder / path / "case.json"
    content: Any = read_json(file, SuiteError)
    try:
        shapes = {name: tuple(facts["shape"]) for name, facts in content["outputs"].items()}
        tolerances = _tolerances({name: facts["tolerance"] for name, facts in content["outputs"].items()})
        if not all(is_shape(list(shape)) for shape in shapes.values()):
            raise ValueError("a shape is not one")
        held = (content["operation"], content["purpose"])
        catches = dict(content["catches"])
        if not all(isinstance(text, str) for text in (*held, *catches.values())):
            raise ValueError("operation, purpose or catches is not text")
        for tolerance in (tolerance for of_output in tolerances.values() for tolerance in of_output.values()):
            if not 0 <= tolerance.max < math.inf or not 0 <= tolerance.rms < math.inf:
                raise ValueError(f"a tolerance is {tolerance.max} and {tolerance.rms}, expected numbers that are 0 or more")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SuiteError(f"{file}: not a case of {FORMAT!r}: {type(error).__name__} {error}") from None
    outputs = {}
    for name, shape in shapes.items():
        found = read_array(folder / path, name, shape)
        if found is None:
            raise SuiteError(f"{file}: there is no array of its output {shown(name)}")
        outputs[name] = found.astype(np.float64)
    return Expected(path, *held, outputs, tolerances, catches)


def read_array(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read an output of a case, in any of the formats; None if there is none. Raises SuiteError.

    NAME.npy; NAME.f32 or NAME.f64, bare little-endian numbers of the expected shape; or outputs.safetensors. uint16 holds
    bfloat16.
    """
    if (folder / f"{name}.npy").exists():
        x = read_npy(folder / f"{name}.npy", SuiteError)
        return widen(x) if x.dtype == np.uint16 else x
    for ending, dtype in (("f32", "<f4"), ("f64", "<f8")):
        file = folder / f"{name}.{ending}"
        if file.exists():
            size, needed = file_size(file, SuiteError), np.dtype(dtype).itemsize * math.prod(shape)
            if size != needed:
                raise SuiteError(f"{file}: {size} bytes, expected {needed} for shape {list(shape)}")
            return np.frombuffer(read_bytes(file, LONG_LIMIT, SuiteError), dtype).reshape(shape)
    if (folder / "outputs.safetensors").exists():
        found = read_safetensors(folder / "outputs.safetensors", SuiteError)
        if name in found:
            return widen(found[name]) if found[name].dtype == np.uint16 else found[name]
    return None


README = """\
# Conformance vectors for Llama

Inputs, constants and expected outputs of every operation of a Llama model, for implementations in any language.

- `L1.txt` lists the cases of level L1, one per line: folder and operation, inputs with their shapes, numeric constants,
  and after `->` the outputs with their shapes. Each level has such a file, for programs that don't read JSON.
- `models/` has the parameters of the tiny models, which the cases of L3 to L5 share, and the same models for loaders: as
  config.json and model.safetensors, as model.gguf, and as params.json and consolidated.00.pth. A `file` in case.json is
  relative to its folder.
- A folder holds `case.json` and its arrays. `case.json` has the formula and its source, the shapes, the constants, for each
  output the tolerance in each rounding profile, the purpose of the case, and the mistakes that it catches.
- `x.f32` holds bare little-endian numbers in C order, float32; `.f64` float64, `.i64` int64, `.i8` int8, `.u16` the bits of
  bfloat16. Inputs are exact in float32, float16 and bfloat16 unless the case says otherwise. Expected outputs are float64.

Write your output to another folder under the same path, `RESULTS/L1/rms_norm/unit/y.f32` (or `.f64`, or `y.npy`), then

    npllama conformance check RESULTS --vectors THIS_FOLDER --profile float32

or compare yourself: for d = |yours - expected| over the finite numbers, the largest must be at most `max` and the root mean
square at most `rms` of the tolerance for your rounding profile. With `relative`, d is divided by |expected|. An expected
infinity must be equal, and where NaN is expected, any number is right.

| profile | computes |
|---|---|
| float64, float32 | in this precision |
| bfloat16, float16 | sums in float32, and rounds each operation's result, as Meta's code does or as Hugging Face's |
| float16-cache | in float32, with keys and values in float16 |
| int8-activations | in float32, with the inputs of products with weights rounded to 8 bits in blocks of 32 or 256, as in
llama.cpp |
"""
