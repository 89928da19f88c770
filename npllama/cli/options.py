"""Options that several commands share: functions that declare them, and that return models, prompts and settings from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypedDict

from ..checkpoint import Model, demo_path, load, open_model
from ..checkpoint.reading import fitting_processes, load_over
from ..checkpoint.store import locate
from ..engine import threads
from ..engine.ranks import mpi
from ..sampling import Sampling
from ..tokenizer import MissingPackage, Tokenizer, load_tokenizer
from .console import collected_log, read_text

if TYPE_CHECKING:
    from ..golden.trace import Selection

DTYPES = ["auto", "stored", "float32", "float64"]
SENTENCE = "the answer to the ultimate question of life, the universe, and everything is "  # the tutorials' prompt


class Parser(argparse.ArgumentParser):
    """Report bad arguments on one line, as all other errors are, without the usage text."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")

    def parse_known_args(  # type: ignore[override]  # its overloads for other kinds of namespaces are not needed
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse unknown arguments in the subcommand's parser, so that the error names the subcommand; argparse names none."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # what add_subparsers() returns


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> Parser:
    """Add a command, and return its parser, to which the caller adds options."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


# ---------------------------------------------------------------------------------------------------------------- declarations


def add_model_options(parser: Parser, computes: bool = True) -> None:
    """Declare -m and, for a command that computes as load_model() sets up, the options of add_compute_options()."""
    parser.add_argument("-m", "--model", metavar="MODEL", help="model directory or name (default: the embedded demo model)")
    if computes:
        add_compute_options(parser)


def add_compute_options(parser: Parser) -> None:
    """Declare --dtype and --threads, as load_model() reads them."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of packed weights in memory; auto: float32 if that fits half of the free memory, else as stored",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"compute with N threads (default: ${threads.VARIABLE}, or all)"
    )


def add_processes_option(parser: Parser) -> None:
    """Declare --processes, as load_model() reads it."""
    parser.add_argument(
        "--processes",
        type=process_count,
        default=1,
        metavar="N|auto",
        help="compute with N processes, each holding a share of every matrix; auto: one per core if weights stay packed",
    )


def add_tokenizer_option(parser: Parser) -> None:
    """Declare -m for tokenizer_of()."""
    parser.add_argument(
        "-m", "--model", metavar="MODEL", help="model directory, name or tokenizer file (default: the embedded demo model)"
    )


def add_prompt_options(parser: Parser, required: bool = True, batch: bool = False) -> None:
    """Declare --prompt and --tokens, of which one may be given."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--prompt", metavar="TEXT", help="text; - reads standard input")
    if batch:
        group.add_argument("--tokens", action=Batch, nargs="+", type=token_ids, metavar="1,2,3", help=BATCH_HELP)
    else:
        group.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids")


BATCH_HELP = "a prompt of ids; several are a batch, the shorter ones padded on the left"


class Batch(argparse.Action):
    """Store one sequence as a list of ids, and several as a batch, padded with -1 on the left."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:  # noqa: D102
        longest = max(map(len, values))
        batch = [[-1] * (longest - len(ids)) + ids for ids in values]
        setattr(namespace, self.dest, batch[0] if len(batch) == 1 else batch)


def add_trace_options(parser: Parser, storage: bool = True) -> None:
    """Declare the options that select activations and their directory; trace_options() reads them."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--taps", action="append", metavar="GLOB", help="only activations with matching names, '*.q_rope'; may be repeated"
    )
    parser.add_argument("--layers", metavar="0-3,7", help="only these layers")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, default=0, metavar="N", help="after the prompt, decode N tokens greedily")
    steps.add_argument("--step-tokens", type=token_ids, metavar="1,2,3", help="after the prompt, feed these ids one at a time")
    if storage:
        parser.add_argument(
            "--format", choices=["npy", "raw"], default="npy", help="raw: little-endian float32 without header, .f32"
        )
    parser.add_argument("--force", action="store_true", help="replace DIR if it is a trace")


def add_sampling_options(parser: Parser) -> None:
    """Declare the sampling options. The defaults are the model's recommendations, else greedy."""
    parser.add_argument("--temperature", type=float, metavar="X", help="0: greedy (default: the model's own, or 0)")
    parser.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling (default: the model's own, or 1: off)")
    parser.add_argument("--top-k", type=int, metavar="K", default=0, help="sample from the K likeliest tokens (default 0: all)")
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        default=0.0,
        help="drop tokens less likely than X times the likeliest (default 0: off)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        default=1.0,
        help="above 1: make earlier tokens less likely, as Hugging Face defines it (default 1: off)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], type=stop_text, metavar="TEXT", help="stop before this text; may be repeated"
    )


def token_ids(text: str) -> list[int]:
    """Parse `1,2,3`. Raises argparse's error for anything else."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of token ids such as 1,2,3") from None
    if min(ids) < 0:
        raise argparse.ArgumentTypeError(f"token id {min(ids)} is negative")
    if max(ids) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"token id {max(ids)} is in no vocabulary")
    return ids


def process_count(text: str) -> int | str:
    """Parse `auto` or a whole number. Raises argparse's error for anything else."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number of processes, expected one or auto") from None


def stop_text(text: str) -> str:
    """Return the text. Raises argparse's error if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


# --------------------------------------------------------------------------------------------------- models, prompts, settings


def load_model(args: argparse.Namespace) -> Model:
    """Open the model of -m with --dtype and --threads; warnings, such as that weights stay packed, go to standard error.

    Sets args.note, which is printed with the statistics.
    """
    if args.threads is not None:
        threads.set_threads(args.threads)
    threads.n_threads()  # a bad NPLLAMA_NUM_THREADS is refused before anything is read
    with collected_log() as log:
        model, processes = load_over_processes(args, args.dtype)
    if log.warnings:  # it will be slower than expected: say so first
        print(f"{args.model or model.path}: {'; '.join(log.warnings)}", file=sys.stderr)
    args.note = "; ".join([*log.information, *([f"{processes} processes"] if processes > 1 else [])])
    return model


def load_over_processes(args: argparse.Namespace, dtype: str, path: str | Path | None = None) -> tuple[Model, int]:
    """Open a model, by default that of -m, over --processes or over mpiexec's processes; return their number too.

    The choice of --processes auto goes to standard error.
    """
    processes, group = getattr(args, "processes", 1), mpi.world() if hasattr(args, "processes") else None
    path = args.model if path is None else path
    if group is not None:
        if processes != 1:
            raise ValueError(f"mpiexec has started {group.size} processes: expected no --processes")
        return load_over(path, dtype, group), group.size
    if processes == "auto":
        processes, reason = fitting_processes(path, dtype)
        print(f"--processes auto: {processes}, {reason}", file=sys.stderr)
    return load(path, dtype, processes), processes


def stored_tensors(model: Model) -> list[dict[str, Any]]:
    """Return the manifest's entry of each tensor: file, dtype, shape, bytes, sha256."""
    tensors: Any = model.manifest["tensors"]
    return list(tensors.values())


def required_tokenizer(model: Model) -> Tokenizer:
    """Return the model's tokenizer. Raises ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer: found text, expected --tokens with ids")
    return model.tokenizer


def tokenizer_of(path: str | None) -> Tokenizer:
    """Return the tokenizer of a model directory, or that of a tokenizer file (local, or remote through blobfile)."""
    if path is None or locate(path).is_dir():
        return required_tokenizer(open_model(path or demo_path()))
    return load_tokenizer(path)


def prompt_ids(args: argparse.Namespace, model: Model) -> list[int]:
    """Return --tokens, or the prompt encoded with BOS first; `-` reads standard input.

    Raises ValueError for a prompt of no tokens.
    """
    ids: list[int]
    if args.tokens is not None:
        go_without_tokenizer(model)
        ids = args.tokens
        return ids
    tokenizer = required_tokenizer(model)
    if args.prompt == "-":
        args.prompt = read_text("-", model.params)
    if not (ids := tokenizer.encode(args.prompt, bos=True, special=getattr(args, "special", False))):
        raise ValueError("the prompt is empty, and this model has no BOS token to start from")
    return ids


def lesson_ids(args: argparse.Namespace, model: Model) -> list[int]:
    """Return --tokens, or --prompt encoded; by default the tutorials' sentence."""
    if args.tokens is None and args.prompt is None:
        args.prompt = SENTENCE
    return prompt_ids(args, model)


def go_without_tokenizer(model: Model) -> None:
    """Drop a tokenizer whose package isn't installed, with a line on standard error: the prompt consists of ids."""
    try:
        _ = model.tokenizer
    except MissingPackage as error:
        print(f"{error}; without it there is no text, and no stop token ends the generation", file=sys.stderr)
        model.tokenizer = None


def sampling_of(args: argparse.Namespace, model: Model) -> Sampling:
    """Return the sampling settings of the options, else those recommended with the model, else greedy."""
    for option, value in (("-n", args.max_tokens), ("--seed", args.seed)):
        if value < 0:
            raise ValueError(f"{option} is {value}, expected 0 or more")

    def choice(name: str, otherwise: float) -> float:
        given: list[Any] = [getattr(args, name), model.generation.get(name)]
        return next((x for x in given if x is not None), otherwise)

    return Sampling(choice("temperature", 0.0), args.top_k, choice("top_p", 1.0), args.min_p, args.repetition_penalty)


class TraceOptions(TypedDict):
    """The arguments that write_trace(), write_golden() and capture() share."""

    out: Path
    steps: int | list[int]
    selection: Selection
    force: bool
    report: Callable[[str], object]


def trace_options(args: argparse.Namespace) -> TraceOptions:
    """Return the options of add_trace_options() as arguments of write_trace()."""
    from ..golden.trace import Selection, parse_layers

    layers = None if args.layers is None else parse_layers(args.layers)
    return {
        "out": args.out,
        "steps": args.steps if args.step_tokens is None else args.step_tokens,
        "selection": Selection(args.taps and tuple(args.taps), layers),
        "force": args.force,
        "report": lambda line: print(line, file=sys.stderr),
    }
