"""npllama chat: talk with a model."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from ..chat import FORMATS, chat_format
from . import chat_loop
from .options import (
    Commands,
    add_command,
    add_model_options,
    add_processes_option,
    add_sampling_options,
    load_model,
    required_tokenizer,
    sampling_of,
)


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "chat", run, "talk with a model that was trained for it")
    p.add_argument("--system", metavar="TEXT", help="the system prompt; empty for the template's (default: the model's own)")
    p.add_argument("--format", help=f"{', '.join(FORMATS)}, or one of the model's templates by its name (default: its own)")
    p.add_argument("-n", "--max-tokens", type=int, default=512, metavar="N", help="at most N tokens an answer (default 512)")
    add_model_options(p)
    add_processes_option(p)
    add_sampling_options(p)


def run(args: argparse.Namespace) -> None:
    """Question and answer in turn, at a terminal or in a pipe."""
    model = load_model(args)
    required_tokenizer(model)
    sampling = sampling_of(args, model)
    format = chat_format(model, args.format)
    if args.system is not None:  # an empty one is none
        format = dataclasses.replace(format, system=None)
    conversation = chat_loop.Conversation(model, format, args.system, sampling, args.max_tokens, args.seed, args.stop)
    if sys.stdin.isatty():
        chat_loop.at_a_terminal(conversation)
    else:
        chat_loop.in_a_pipe(conversation)
