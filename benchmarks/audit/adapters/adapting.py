"""Run one implementation's functions over the plain files of a job. Needs NumPy alone, as it runs in that one's environment.

An adapter is a script that defines functions and calls run(). Its argument is a folder with job.json:

    suite      the folder that `npllama conformance export --format npy` wrote
    published  name -> the folder of a model with a published model's constants, in every form
    tokens     the prompt for those
    variant    which of its variants the implementation runs in
    tokenizers sha256 -> file

and the functions' names are operations of the suite, with these arguments:

    resolve_config(path)                    -> {constant: number}, as CONSTANTS names them
    forward_file(path, tokens)              -> logits [T, V]
    forward_passes(path, passes, kept)      -> the logits of all passes, one after the other
    forward_at(path, tokens, positions)     -> logits [T, V]
    encode(path of a tokenizer, text)       -> ids

and trace(path, tokens) -> {own name: array}, for the published models; without it, forward_file gives the logits. `path` is
that of the model in the adapter's form: a folder of Hugging Face's (safetensors), model.gguf, or a folder of Meta's (pth).

Results go to `results/` as the suite's own paths, `published/NAME.npz`, and outcomes.jsonl: a line for each call, written at
once, so that a crash or the time limit loses one call. A function raises NotOffered for what its API has no way to do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CONSTANTS = (
    *("norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tied_embeddings"),
)
FORMS = {"safetensors": "safetensors", "gguf": "model.gguf", "pth": "pth"}
CONFIG_FILES = {"safetensors": "config.json", "gguf": "model.gguf", "pth": "params.json"}
OPERATIONS = ("resolve_config", "forward_file", "forward_passes", "forward_at", "encode")


class NotOffered(Exception):
    """Raised for what the implementation's API has no way to do; the message says why."""


def job() -> dict[str, Any]:
    """Return the job that this process was started for."""
    return json.loads((Path(sys.argv[1]) / "job.json").read_text())


def run(functions: Mapping[str, Callable[..., Any]], form: str, packages: tuple[str, ...]) -> None:
    """Call the functions for every case and published model that they are for, and write what they return."""
    folder, given = Path(sys.argv[1]), job()
    with open(folder / "outcomes.jsonl", "w", encoding="utf-8") as log:

        def note(**line: object) -> None:
            print(json.dumps(line), file=log, flush=True)

        note(versions={name: version(name) for name in packages})
        suite = Path(given["suite"])
        for path in json.loads((suite / "suite.json").read_text())["cases"]:
            case = json.loads((suite / path / "case.json").read_text())
            if case["operation"] not in OPERATIONS:
                continue
            state, reason = _attempt(lambda case=case, path=path: _one_case(functions, form, given, suite, path, case, folder))
            if state != "skipped":
                note(case=path, state=state, reason=reason)
        for name, where in given["published"].items():
            arguments = (str(Path(where) / FORMS[form]), np.array(given["tokens"]))
            state, reason = _attempt(lambda name=name, a=arguments: _one_trace(functions, a, folder / "published" / name))
            note(published=name, state=state, reason=reason)


def _attempt(call: Callable[[], object]) -> tuple[str, str]:
    try:
        return ("skipped", "") if call() is False else ("done", "")
    except NotOffered as error:
        return "not offered", str(error)
    except Exception as error:  # whatever an implementation raises is a result, and stops no other
        text = " ".join(str(error).split())
        return "failed", f"{type(error).__name__}: {text}"[:400]


def _one_case(functions, form: str, given: dict, suite: Path, path: str, case: dict, folder: Path) -> bool | None:
    """Compute one case and write it; False for one that is in another form."""
    operation, constants = case["operation"], case["constants"]
    if operation not in functions and "path" not in constants:
        raise NotOffered("not offered by its API")
    arrays = {name: np.load(suite / path / x["file"]) for name, x in case["inputs"].items() if "/models/" not in x["file"]}
    if "path" in constants:
        file = Path(constants["path"])
        if file.name != (CONFIG_FILES if operation == "resolve_config" else FORMS)[form]:
            return False
        arguments = [str(suite / file), *arrays.values()]
    elif operation == "encode":
        if constants["tokenizer"] not in given["tokenizers"]:
            name = path.split("/")[-1].rpartition("_")[0]
            raise NotOffered(f"the file of the tokenizer {name} is not at hand")
        arguments = [given["tokenizers"][constants["tokenizer"]], constants["text"]]
    else:
        model = next(x["file"].split("/")[-2] for x in case["inputs"].values() if "/models/" in x["file"])
        arguments = [str(suite / "models" / model / FORMS[form])]
        arguments += [constants["passes"], constants["kept"]] if operation == "forward_passes" else []
        arguments += [arrays["tokens"], arrays["positions"]] if operation == "forward_at" else []
    if operation not in functions:
        raise NotOffered("not offered by its API")
    found = functions[operation](*arguments)
    if operation == "resolve_config":
        found = [float(found.get(name) or 0) for name in CONSTANTS]
    out = folder / "results" / path / f"{next(iter(case['outputs']))}.npy"
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, _plain(found, operation))
    return None


def _plain(x: Any, operation: str) -> np.ndarray:
    kind = {"resolve_config": np.float64, "encode": np.int64}.get(operation, np.float32)
    return np.asarray(x, kind)


def _one_trace(functions, arguments: tuple[str, np.ndarray], out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    if "capture" in functions:  # which writes a trace directory of npllama's
        functions["capture"](*arguments, out)
        return
    if "trace" in functions:
        found = functions["trace"](*arguments)
    elif "forward_file" in functions:
        found = {"logits": functions["forward_file"](*arguments)}
    else:
        raise NotOffered("it computes no logits")
    np.savez(out.with_name(f"{out.name}.npz"), **{name: np.asarray(x, np.float32) for name, x in found.items()})


# ------------------------------------------------------------------------------------------------------ for several adapters


def config_json(path: str) -> dict[str, Any]:
    """Return the config.json of a folder, or the file itself."""
    file = Path(path)
    return json.loads((file / "config.json" if file.is_dir() else file).read_text())


def rope_of(values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return θ and the scaling, if any, of a config.json in either spelling; for libraries that are given constants by hand."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    return float(theta), rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None


def constants(c: Any, theta: float, rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Return the result of resolve_config from a config object with Hugging Face's names; `rope` has the scaling's, if any."""
    scaling = rope if rope.get("rope_type", rope.get("type")) == "llama3" else {}
    return {
        "norm_eps": c.rms_norm_eps,
        "rope_theta": theta,
        "factor": scaling.get("factor"),
        "low_freq_factor": scaling.get("low_freq_factor"),
        "high_freq_factor": scaling.get("high_freq_factor"),
        "original_max_seq_len": scaling.get("original_max_position_embeddings"),
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "head_dim": head_dim,
        "ffn_dim": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "tied_embeddings": c.tie_word_embeddings,
    }


def with_tokenizer(path: str, folder: Path) -> str:
    """Return a copy of a Hugging Face folder with a tokenizer whose token N is "tN", for loaders that ask for one."""
    source, target = Path(path), folder / Path(path).parent.name
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())
    vocab = {f"t{n}": n for n in range(config_json(path)["vocab_size"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None, "model": model}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(target)


def chunks(kept: list[int | None], passes: list, feed: Callable[[list[int]], Any], cut: Callable[[int], object]) -> np.ndarray:
    """Feed passes of a single sequence one after the other, and cut the cache back to `kept` tokens before a pass."""
    if np.ndim(passes[0]) != 1:
        raise NotOffered("padded batches are its generation's business")
    found = []
    for i, tokens in enumerate(passes):
        if i < len(kept) and kept[i] is not None:
            cut(kept[i])
        found.append(np.asarray(feed(tokens), np.float32))
    return np.concatenate(found)


def recording(model: Any) -> tuple[dict[str, Any], list[Any]]:
    """Hook every module of a torch model; return the outputs by name, and the hooks."""
    found: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if hasattr(y, "detach"):
                found[name] = y.detach().float().numpy()

        return keep

    return found, [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
