"""npllama generate: continue a prompt."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from ..checkpoint import Model
from ..generation import Step, generate_steps
from ..sampling import Sampling
from ..text.completion import Continuation, Stream, complete
from ..tokenizer import Tokenizer
from .console import Statistics, as_json, read_text, say_if_cut, write
from .options import (
    Commands,
    add_command,
    add_model_options,
    add_processes_option,
    add_sampling_options,
    load_model,
    prompt_ids,
    required_tokenizer,
    sampling_of,
    token_ids,
)


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "generate", run, "continue a prompt")
    p.epilog = "Output constrained by a grammar or a JSON schema is not supported."
    p.add_argument("prompt", nargs="?", help="text; empty: start from the BOS token; - reads standard input")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids; prints ids and needs no tokenizer")
    p.add_argument("-n", "--max-tokens", type=int, default=64, metavar="N", help="at most N new tokens (default 64)")
    p.add_argument("--prompts", metavar="FILE", help="continue each line of a file; - reads standard input")
    p.add_argument(
        "--json", action="store_true", help="print a JSON object: text, ids, finish reason, log-probabilities, timings"
    )
    p.add_argument("--no-echo", action="store_true", help="print the continuation without the prompt")
    p.add_argument("--special", action="store_true", help="parse the spelling of special tokens in the prompt as these tokens")
    p.add_argument(
        "--logprobs",
        type=count,
        metavar="K",
        help="print a line per token: id, piece, log-probability, and the K likeliest tokens",
    )
    p.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="K",
        help="prompt-lookup decoding: verify up to K proposed tokens per pass (with --temperature 0)",
    )
    p.add_argument("--profile", action="store_true", help="print the time of each operation to standard error")
    add_model_options(p)
    add_processes_option(p)
    add_sampling_options(p)


def count(text: str) -> int:
    """Parse a whole number, 0 or more. Raises argparse's error for anything else."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number, 0 or more")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Print a prompt, and its continuation as it is generated."""
    if sum(given is not None for given in (args.prompt, args.tokens, args.prompts)) != 1:
        raise ValueError("expected a prompt, or --tokens or --prompts instead of it")
    if args.stop and not args.json and (args.tokens or args.logprobs is not None):
        raise ValueError(
            f"--stop needs text, but {'--tokens' if args.tokens else '--logprobs'} prints none: expected --json too"
        )
    model = load_model(args)
    sampling = sampling_of(args, model)
    if args.prompts is not None:
        continue_lines(args, model, sampling)
        return
    ids = prompt_ids(args, model)
    profile = None
    if args.profile:
        from ..evaluate.profile import Profile

        profile = Profile(model)
        model = profile.model
    cache = profile.cache() if profile else None
    # Raises for a bad prompt before it is echoed.
    steps = generate_steps(model, ids, args.max_tokens, sampling, args.seed, cache=cache, lookup=args.lookup)
    statistics = Statistics(len(ids), args.note)
    steps = statistics.watch(steps)
    try:
        if profile:
            steps = profile.watch(steps)
        reason, n_made = print_steps(args, model, ids, steps, statistics)
        if args.json or args.logprobs is None:
            print()
        say_if_cut(reason, n_made)
    except (KeyboardInterrupt, ValueError):
        print()
        raise
    finally:
        statistics.print()
        if profile:
            print(profile.text(), file=sys.stderr)


def print_steps(
    args: argparse.Namespace, model: Model, ids: list[int], steps: Iterator[Step], statistics: Statistics
) -> tuple[str | None, int]:
    """Print the steps in the form that the options choose; return why they ended and how many there were."""
    if args.json:
        stream = Stream(Continuation(model, ids, args.max_tokens, args.stop, args.logprobs or 0), steps)
        deque(stream, maxlen=0)
        write(as_json(stream.completion, statistics.timings()))
        return stream.completion.finish_reason, len(stream.completion.tokens)
    if args.logprobs is None and args.tokens is None:
        if not args.no_echo:
            write(args.prompt)
        required_tokenizer(model)
        stream = Stream(Continuation(model, ids, args.max_tokens, args.stop), steps)
        for text in stream:
            write(text)
        return stream.completion.finish_reason, len(stream.completion.tokens)
    made: list[int] = []
    if args.logprobs is not None:
        print_logprobs(noted(steps, made), args.logprobs, model.tokenizer)
    else:
        echoed = [] if args.no_echo else ids
        write(",".join(map(str, echoed)))
        for i, step in enumerate(noted(steps, made)):
            write(("," if i or echoed else "") + str(step.token))
    if len(made) == args.max_tokens:
        return "length", len(made)
    return "context" if len(ids) + len(made) > model.config.max_seq_len else None, len(made)


def continue_lines(args: argparse.Namespace, model: Model, sampling: Sampling) -> None:
    """Continue each line of a file that isn't empty, several at once, and print them in order."""
    for option, given in (("--lookup", args.lookup), ("--profile", args.profile)):
        if given:
            raise ValueError(f"{option} takes one prompt, but --prompts gives several")
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs with --prompts needs --json, which prints an object per line")
    prompts = [line for line in read_text(args.prompts, model.params).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no text, expected a prompt on each line")
    found = complete(
        model,
        prompts,
        max_tokens=args.max_tokens,
        **asdict(sampling),
        seed=args.seed,
        stop=args.stop,
        logprobs=(args.logprobs or 0) if args.json else None,
        special=args.special,
    )
    for prompt, done in zip(prompts, found, strict=True):
        write((as_json(done) if args.json else ("" if args.no_echo else prompt) + done.text) + "\n")
    for reason, what in (("length", f"cut at {args.max_tokens:,} tokens: -n"), ("context", "context full")):
        if n := sum(done.finish_reason == reason for done in found):
            print(f"[{n:,} of {len(found):,} {what}]", file=sys.stderr)


def noted(steps: Iterable[Step], made: list[int]) -> Iterator[Step]:
    """Pass the steps on, and append their ids to `made`."""
    for step in steps:
        made.append(step.token)
        yield step


def print_logprobs(steps: Iterable[Step], k: int, tokenizer: Tokenizer | None) -> None:
    """Print a line per token, tab-separated: id, piece, log-probability; then the same for each of the k likeliest."""
    for step in steps:
        fields: list[str] = []
        for id, logprob in [(step.token, step.logprob), *step.top(k)]:
            fields += [str(id), tokenizer.piece(id) if tokenizer else "", f"{logprob:.6f}"]
        print("\t".join(fields), flush=True)
