"""Measure the tokens per second of `npllama serve` with one client and with several at once, on the loopback address.

By itself: python -m benchmarks.serving [-m MODEL] [--clients 1,8] [--tokens 64] [--json FILE]

Each client asks for one text, streamed, and counts its tokens. A round ends when all have their answers; the numbers of clients
alternate, round after round. The others are compared with the first number. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from npllama.cli.console import FORESEEN, error_text, say_error
from npllama.engine.threads import available_cpus

from .__main__ import machine, table
from .processes import PAUSE, prepare_environment
from .rows import Line

WANTED = {("smollm2-135m", 8): 2.5}  # (model, clients) -> times the tokens/s of one client
MOST_SECONDS = 600  # for one answer


@dataclass(frozen=True)
class Answer:
    """One client's figures: tokens as the server counts them, seconds to the first, the longest seconds between two events."""

    tokens: int
    first: float
    gap: float


@dataclass(frozen=True)
class Round:
    """All clients' answers, and the seconds from the first request to the last token."""

    answers: list[Answer]
    seconds: float

    @property
    def rate(self) -> float:
        """Return the tokens per second of all clients together, including the time of their prompts."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


@contextlib.contextmanager
def server(model: str | None, rows: int, n_threads: int) -> Iterator[tuple[str, int]]:
    """Start `npllama serve` on a free port; give the model's name and the port. Raises RuntimeError where it ends at once."""
    command = [sys.executable, "-m", "npllama", "serve", "--port", "0", "--rows", str(rows), "--threads", str(n_threads)]
    command += [] if model is None else ["-m", model]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        rest = threading.Thread(target=lambda: sys.stderr.writelines(process.stderr))
        try:
            for line in process.stderr:
                if found := re.match(r"(.*) at http://127\.0\.0\.1:(\d+)/v1", line):
                    break
                sys.stderr.write(line)
            else:
                raise RuntimeError(f"npllama serve ended with status {process.wait()}")
            rest.start()
            yield found[1], int(found[2])
        finally:
            process.terminate()
            process.wait()
            if rest.ident is not None:
                rest.join()


def ask(port: int, client: int, n_tokens: int) -> Answer:
    """Stream one text. Raises RuntimeError for an error of the server's."""
    body = {"prompt": f"Client {client}: Once upon a time", "max_tokens": n_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started, times, last = time.perf_counter(), [], b""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=MOST_SECONDS)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"the server answered with status {reply.status}: {reply.read()[:300]!r}")
        for line in reply:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                last = line
    usage = json.loads(last.removeprefix(b"data: ")).get("usage") if last else None
    if usage is None:
        raise RuntimeError(f"the stream ended without its usage, after {last[:300]!r}")
    # The usage is the last event, and comes with the one before it.
    gaps = [after - before for before, after in itertools.pairwise(times[:-1])]
    return Answer(usage["completion_tokens"], times[0] - started, max(gaps, default=0.0))


def play(port: int, n_clients: int, n_tokens: int) -> Round:
    """Run n_clients at once."""
    with ThreadPoolExecutor(n_clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda client: ask(port, client, n_tokens), range(n_clients)))
        return Round(answers, time.perf_counter() - started)


def lines_of(name: str, found: dict[int, list[Round]]) -> list[Line]:
    """Return the figures of each number of clients, compared with those of the first number."""
    base, lines = next(iter(found)), []
    of_base = f"{base} client{'s' * (base > 1)}"
    for n, rounds in found.items():
        work = f"{name}, {n} client{'s' * (n > 1)}"

        def line(what: str, unit: str, value, n=n, work=work, rounds=rounds, **wanted) -> None:
            ours, theirs = (statistics.median(map(value, of)) for of in (rounds, found[base]))
            peer = {"peer": of_base, "theirs": theirs} if n != base else {}
            lines.append(Line("serving", f"{work}: {what}", unit, ours, **peer, **wanted))

        line("all tokens", "tokens/s", lambda round: round.rate, wanted=None if n == base else WANTED.get((name, n)))
        line("first token", "s", lambda round: statistics.mean(a.first for a in round.answers), less_is_better=True)
        line("longest gap", "s", lambda round: max(a.gap for a in round.answers), less_is_better=True)
    return lines


def run(model: str | None, clients: Sequence[int], n_tokens: int, rounds: int, n_threads: int) -> dict[str, object]:
    """Measure, print the table, and return all of it."""
    found: dict[int, list[Round]] = {n: [] for n in clients}
    with server(model, max(clients), n_threads) as (name, port):
        play(port, max(clients), 2)  # every row has been used, and every page touched
        for _ in range(rounds):
            for n in clients:
                time.sleep(PAUSE)
                found[n].append(play(port, n, n_tokens))
    lines = lines_of(name, found)
    made = sum(answer.tokens for of in found.values() for round in of for answer in round.answers)
    asked = n_tokens * rounds * sum(clients)
    print(f"\n{name}: {rounds} rounds, {n_tokens} tokens for each client\n{table(lines)}")
    if made < asked:
        print(f"{asked - made:,} of {asked:,} tokens were not made, as texts ended before: rows were idle meanwhile")
    return {
        "model": name,
        "tokens": n_tokens,
        "rounds": {n: [asdict(round) for round in of] for n, of in found.items()},
        "lines": [{**asdict(line), "ratio": line.ratio, "met": line.met} for line in lines],
    }


def numbers(text: str) -> list[int]:
    """Read --clients. Raises ValueError, from which argparse makes its message."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1 or len(set(found)) < len(found):
        raise ValueError
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", metavar="MODEL", help="model directory or name (default: the embedded demo model)")
    parser.add_argument("--clients", type=numbers, default=[1, 8], metavar="N,N", help="at once, the base first (default 1,8)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="for each client (default 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--threads", type=int, default=min(2, available_cpus()), metavar="N", help="the server's (default: two)"
    )
    parser.add_argument("--json", type=Path, default=Path("serving.json"), metavar="FILE", help="default: serving.json")
    args = parser.parse_args(argv)
    if min(args.tokens, args.rounds, args.threads) < 1:
        parser.error("--tokens, --rounds and --threads are at least 1")
    if not args.json.parent.is_dir():  # found now rather than at the end
        parser.error(f"{args.json.parent} is not a folder")
    prepare_environment(args.threads)
    result: dict[str, object] = {"machine": machine(args.threads)}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None), flush=True)
    try:
        result |= run(args.model, args.clients, args.tokens, args.rounds, args.threads)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    except (*FORESEEN, RuntimeError) as error:
        say_error(f"benchmarks.serving: {error_text(error) if isinstance(error, FORESEEN) else error}")
        return 2
    print(f"\nwritten to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
