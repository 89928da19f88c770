"""Compare ranks, which sum in another order, with one process: within the noise floor of `npllama compare`."""

from __future__ import annotations

from npllama.checkpoint import Model
from npllama.golden.compare import compare
from npllama.golden.trace import write_trace

import thread_ranks
import tiny


def test_the_order_of_sums_is_within_the_noise(tmp_path):
    """Judge every activation, in a prompt and decode steps; an error of 1 % on one rank is beyond the noise."""
    config, size = tiny.CONFIGS["one_kv_head"], 5
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 9).tolist()
    one = Model(config, params)
    spread, ranks = thread_ranks.spread(params, config, size)
    write_trace(one, tokens, tmp_path / "one", [3, 4])
    write_trace(Model(config, spread), tokens, tmp_path / "ranks", [3, 4])
    found = compare(tmp_path / "one", tmp_path / "ranks", model=one)
    assert found.exit_status == 0, str(found)

    ranks[-1].everyones = wrong(ranks[-1].everyones)
    write_trace(Model(config, spread), tokens, tmp_path / "wrong", [3, 4])
    assert compare(tmp_path / "one", tmp_path / "wrong", model=one).exit_status == 1
    spread.lead.__self__.close()


def wrong(everyones):
    """Return the function that shows a rank's numbers to all, with an error of 1 % in its own."""
    return lambda x: everyones(x * x.dtype.type(1.01))
