"""The command line: arguments in, text on standard output, statistics on standard error. A command is a file of its name.

Exit status: 0 done, 1 a comparison or verification failed, 2 bad usage, bad input or an unforeseen error, 130 interrupted.

| file | content |
|---|---|
| options.py | options that several commands share, and functions that turn them into models, prompts and settings |
| console.py | standard input and output, errors, statistics |
| chat_loop.py | the loops of `npllama chat` |
| all others | a command: add_parser() declares its options, run() executes it and returns the exit status, None for 0 |

Modules import at the top only what every command needs. The rest is imported in run(), so that every command starts quickly.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..engine.ranks import mpi
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
    serve,
    tokenize,
    trace,
    verify,
    walkthrough,
    walkthrough_tokenizer,
)
from . import run as run_command
from .console import error_text, flush_output, open_streams, say_error
from .options import Parser

COMMANDS = (  # in the order of --help
    *(
        convert,
        fetch,
        models,
        generate,
        chat,
        run_command,
        serve,
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
    """Run one command and return its exit status. Under mpiexec, rank 0 runs it and the other ranks follow."""
    open_streams()
    if (launched := mpi.launched()) is None:
        return run(argv)
    try:
        group = mpi.world()
    except ValueError as error:
        if launched[0] == 0:
            say_error(f"npllama: {error}")
        return 2
    if group is None or group.rank == 0:
        return _lead(argv, group)
    from ..engine.ranks.following import follow_world

    try:
        follow_world(group)
    except BaseException as error:  # exiting without telling MPI would leave the other ranks waiting
        group.report(error)
    return 0


def _lead(argv: Sequence[str] | None, group: mpi.World | None) -> int:
    """Run the command as rank 0, then end the other ranks."""
    status = 2
    try:
        status = run(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 2
        raise
    finally:
        if group is not None:
            group.end(status)
    return status


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command in this process and return its exit status."""
    command = "npllama"
    try:
        try:
            args = build_parser().parse_args(argv)
            command += f" {args.command}"
            return args.run(args) or 0
        finally:
            flush_output()
    except SystemExit:  # from argparse, or SIGTERM
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has exited, as in `npllama generate ... | head`: flush_output() has closed the stream
        return 0
    except BaseException as error:  # a panic in a library written in Rust raises a BaseException
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
