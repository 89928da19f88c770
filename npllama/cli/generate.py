"""npllama generate: continue a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from ..generation import Step, generate_steps, stream_text
from ..tokenizer import StreamDecoder, Tokenizer
from .console import Statistics, write
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
        help="prompt-lookup decoding: verify up to K proposed tokens per pass (with --temperature 0)",
    )
    p.add_argument("--profile", action="store_true", help="print where a token's time goes, to standard error")
    add_model_options(p)
    add_processes_option(p)
    add_sampling_options(p)


def count(text: str) -> int:
    """Return a whole number, 0 or more; an error of argparse's otherwise."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number, 0 or more")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Print a prompt and its continuation, as it is made."""
    if (args.prompt is None) == (args.tokens is None):
        raise ValueError("expected a prompt, or --tokens instead of it")
    if args.stop and (args.tokens or args.logprobs is not None):
        raise ValueError(f"--stop ends a text, and with {'--tokens' if args.tokens else '--logprobs'} there is none")
    if args.profile and args.processes > 1:
        raise ValueError("--profile times the operations of one process, and there are --processes of them")
    model = load_model(args)
    sampling = sampling_of(args, model)
    ids = prompt_ids(args, model)
    profile = None
    if args.profile:
        from ..evaluate.profile import Profile

        profile = Profile(model)
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
            decoder = StreamDecoder(required_tokenizer(model), ids)
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


def print_logprobs(steps: Iterable[Step], k: int, tokenizer: Tokenizer | None) -> None:
    """Print a line per token, tab-separated: id, piece, log-probability; then the same three of each of the k likeliest."""
    for step in steps:
        fields: list[str] = []
        for id, logprob in [(step.token, step.logprob), *step.top(k)]:
            fields += [str(id), tokenizer.piece(id) if tokenizer else "", f"{logprob:.6f}"]
        print("\t".join(fields), flush=True)
