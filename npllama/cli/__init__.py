"""The command line: arguments in, text on standard output, statistics on standard error. A command is a file of its name.

Exit status: 0 done, 1 a comparison or verification failed, 2 bad usage, bad input or an unforeseen error, 130 interrupted.

| file | what is in it |
|---|---|
| options.py | the options that several commands share, and what is made of them |
| console.py | output: streams, errors in a line, statistics |
| chat_loop.py | the conversation of `npllama chat` |
| all others | a command: add_parser() declares its options, run() does it and returns the exit status, None for 0 |

Files import at their top what every command needs. What only some need is imported in their run(), so that all start quickly.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..errors import printable
from . import (
    capture,
    chat,
    check,
    compare,
    conformance,
    convert,
    exercise,
    explain,
    fetch,
    generate,
    golden,
    info,
    logits,
    models,
    perplexity,
    plot,
    tokenize,
    trace,
    verify,
    walkthrough,
    walkthrough_tokenizer,
)
from .console import error_text, flush_output, open_streams, say_error
from .options import Parser

COMMANDS = (  # in the order of --help
    *(
        convert,
        fetch,
        models,
        generate,
        chat,
        logits,
        trace,
        capture,
        golden,
        compare,
        conformance,
        walkthrough,
        walkthrough_tokenizer,
    ),
    *(plot, explain, tokenize, perplexity, info, verify, check, exercise),
)


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


def build_parser() -> Parser:
    """Return the parser of all commands; each sets `run`."""
    parser = Parser(prog="npllama", description="Llama in pure NumPy.")
    parser.add_argument("--version", action="version", version=f"npllama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
