"""npllama chat: chat with a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..chat import FORMATS, chat_format
from ..text.conversation import Conversation
from . import chat_loop
from .console import read_text
from .options import (
    Commands,
    Parser,
    add_command,
    add_compute_options,
    add_model_options,
    add_processes_option,
    add_sampling_options,
    load_model,
    required_tokenizer,
    sampling_of,
)


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "chat", run, "chat with a model that was trained to follow instructions")
    add_model_options(p, computes=False)
    add_options(p)


def add_options(p: Parser) -> None:
    """Declare the options of a chat, which `npllama run` has too."""
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = f"commands, at a terminal or as a line of standard input:\n{chat_loop.COMMANDS}"
    p.add_argument("question", nargs="?", help="answer this question and exit; - reads standard input as one question")
    p.add_argument("--json", action="store_true", help="print each answer as a JSON object: text, ids, finish reason, timings")
    p.add_argument("--load", metavar="FILE", help="continue a conversation that /save has written")
    p.add_argument("--system", metavar="TEXT", help="the system prompt; empty: the template's (default: the model's own)")
    p.add_argument("--format", help=f"{', '.join(FORMATS)}, or the name of one of the model's templates (default: its own)")
    p.add_argument("-n", "--max-tokens", type=int, default=512, metavar="N", help="at most N tokens per answer (default 512)")
    add_compute_options(p)
    add_processes_option(p)
    add_sampling_options(p)


def run(args: argparse.Namespace) -> None:
    """Answer one question, or hold a conversation at a terminal or in a pipe."""
    model = load_model(args)
    required_tokenizer(model)
    if args.load and args.system is not None:
        raise ValueError("found --load and --system, expected one of them: a saved conversation has its own system prompt")
    options: dict[str, Any] = {
        "format": chat_format(model, args.format),
        "sampling": sampling_of(args, model),
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "stop": args.stop,
        "logprobs": 0 if args.json else None,
    }
    if args.load:
        conversation = Conversation.load(model, args.load, **options)
    else:
        conversation = Conversation(model, args.system, **options)
    if args.model is None:
        chat_loop.report("the embedded model writes plays and follows no instructions: choose one that does with -m MODEL")
    loop = chat_loop.Loop(conversation, args.json, {chat_loop.absolute(args.load)} if args.load else set())
    if args.question is not None:
        chat_loop.answer(loop, read_text("-", model.params) if args.question == "-" else args.question)
    elif sys.stdin.isatty():
        chat_loop.at_a_terminal(loop)
    else:
        chat_loop.in_a_pipe(loop)
