"""npllama generate --profile: its sum is the time that passed, and the model is unchanged afterwards."""

from __future__ import annotations

import re

import numpy as np
import pytest

from npllama import Sampling, generate_steps, load
from npllama.cli import main
from npllama.evaluate import profile

from tiny import CONFIGS, random_params


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(profile, "LARGE", (64, 64))


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_every_product_has_its_name_and_the_parts_make_the_whole(dtype):
    demo = load(dtype=dtype)
    watched = profile.Profile(demo)
    steps = list(watched.watch(generate_steps(watched.model, [1, 2, 3], 6, Sampling())))
    assert watched.n_tokens == len(steps) - 1 == 5
    products = {"output", "attention.wo", "feed_forward.w2"}
    products |= {"attention.wq wk wv", "feed_forward.w1 w3"}
    assert products <= set(watched.read)
    assert "linear" not in watched.read
    assert sum(watched.read.values()) == 5 * watched.bytes_per_token
    assert 0 < sum(watched.spent.values()) <= watched.seconds


def test_the_first_token_is_not_counted():
    demo = load()
    watched = profile.Profile(demo)
    list(watched.watch(generate_steps(watched.model, [1, 2, 3], 1, Sampling())))
    assert watched.n_tokens == 0
    assert "no token was generated after the first" in watched.text()


def test_weights_read_per_token():
    """Count all matrices except an embedding that isn't the output matrix."""
    for config in CONFIGS.values():
        params = random_params(config, seed=1)
        expected = sum(x.nbytes for name, x in params.items() if x.ndim == 2)
        if not config.tied_embeddings:
            expected -= params["tok_embeddings.weight"].nbytes
        from npllama import Model

        assert profile.Profile(Model(config, params)).bytes_per_token == expected


def test_the_command_prints_it_to_standard_error(capsys):
    assert main(["generate", "ROMEO:", "-n", "4", "--profile"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ROMEO:")
    assert re.search(r"^mean of 3 tokens +ms +share +GB/s$", err, re.M)
    assert re.search(r"^memory-bandwidth limit: .* MB of weights per token at .* GB/s", err, re.M)
    assert {"attention", "cache", "rms_norm", "feed_forward.w2", "output"} <= set(re.findall(r"^([\w.]+) ", err, re.M))
    shares = [float(x) for x in re.findall(r" (-?\d+\.\d)%", err)]
    assert np.isclose(sum(shares), 100, atol=1)
