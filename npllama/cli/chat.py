"""npllama chat: talk with a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..chat import FORMATS, chat_format_of
from . import chat_loop
from .options import (
    Commands,
    add_command,
    add_model_options,
    add_sampling_options,
    load_model,
    required_tokenizer,
    sampling_of,
)


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "chat", run, "talk with a model that was trained for it")
    p.add_argument("--system", metavar="TEXT", help="the system prompt; empty for none (default: the model's own)")
    p.add_argument("--format", choices=list(FORMATS), help="the prompt format (default: the model's own)")
    p.add_argument("-n", "--max-tokens", type=int, default=512, metavar="N", help="at most N tokens an answer (default 512)")
    add_model_options(p)
    add_sampling_options(p)


def run(args: argparse.Namespace) -> None:
    """Question and answer in turn, at a terminal or in a pipe."""
    model = load_model(args)
    tokenizer = required_tokenizer(model)
    sampling = sampling_of(args, model)
    own: dict[str, Any] = model.generation
    name = args.format or own.get("chat_format")
    if name is None:
        name = chat_format_of(tokenizer)
        print(f"{model.path}: comes without a chat format; {name} is guessed from its tokenizer (--format)", file=sys.stderr)
    elif name not in FORMATS:
        where = model.path / "config.json" if model.path else "config.json"
        raise ValueError(f"{where}: chat_format is {name!r}, expected {', '.join(FORMATS)}")
    system = own.get("system") if args.system is None else args.system
    conversation = chat_loop.Conversation(model, FORMATS[name], system, sampling, args.max_tokens, args.seed, args.stop)
    if sys.stdin.isatty():
        chat_loop.at_a_terminal(conversation)
    else:
        chat_loop.in_a_pipe(conversation)
