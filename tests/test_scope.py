"""The scope of a pass: the operations that it calls and no others, weights and activations under one prefix."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import numpy as np
import pytest

from npllama import KVCache, Model, forward, generate, generate_batch, model, no_tap, ops
from npllama.evaluate.perplexity import perplexity
from npllama.model import FAST, PLAIN
from npllama.scope import Ops, Scope

from tiny import CONFIGS, random_params, relative_error

GROUPED = CONFIGS["grouped"]
PARAMS = random_params(GROUPED, seed=1)
TOKENS = [3, 1, 4, 1, 5]


def counting(operations: Ops) -> tuple[Ops, dict[str, int]]:
    """Return the operations with every call counted."""
    calls = {field.name: 0 for field in dataclasses.fields(operations) if getattr(operations, field.name) is not None}

    def counted(name: str):
        function = getattr(operations, name)

        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    return dataclasses.replace(operations, **{name: counted(name) for name in calls}), calls


@pytest.mark.parametrize("operations", [PLAIN, FAST], ids=["plain", "fast"])
def test_every_operation_of_a_set_is_called_as_often_as_the_formulas_say(operations):
    counted, calls = counting(operations)
    found = forward(PARAMS, GROUPED, TOKENS, ops=counted)
    np.testing.assert_array_equal(found, forward(PARAMS, GROUPED, TOKENS, ops=operations))
    L = GROUPED.n_layers
    once = dict.fromkeys(("embed", "rope_frequencies", "rope_rotation", "causal_mask"), 1)
    in_layers = {"linear": 2 * L + 1, "linears": 2 * L, "rms_norm": 2 * L + 1, "rope": 2 * L, "swiglu": L, "feed_forward": L}
    inside = dict.fromkeys(("attention_scores", "softmax", "attention_heads"), L) if operations is PLAIN else {}
    assert calls == {**once, **in_layers, "attention": L, **inside}


def test_an_operation_that_is_not_called_can_not_be_replaced():
    for name in ("silu", "query_key_products", "matmul"):
        with pytest.raises(TypeError, match=name):
            dataclasses.replace(PLAIN, **{name: ops.silu})
    with pytest.raises(ValueError, match="softmax would not be called"):
        dataclasses.replace(FAST, softmax=ops.softmax)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.softmax = ops.silu


def test_the_two_sets_agree_within_rounding_and_a_tap_takes_the_plain_one():
    tokens = np.random.default_rng(0).integers(0, GROUPED.vocab_size, (2, 40))
    plain, fast = (forward(PARAMS, GROUPED, tokens, ops=operations) for operations in (PLAIN, FAST))
    assert relative_error(fast, plain) < 2e-6
    seen = []
    watched = forward(PARAMS, GROUPED, tokens, tap=lambda name, x: seen.append(name) or x)
    np.testing.assert_array_equal(watched, plain)
    assert "layers.0.attention.scores" in seen
    np.testing.assert_array_equal(forward(PARAMS, GROUPED, tokens, tap=no_tap), fast)


def test_fast_operations_show_a_tap_all_but_scores_and_weights():
    def names(operations):
        seen = []
        forward(PARAMS, GROUPED, TOKENS, tap=lambda name, x: seen.append(name) or x, ops=operations)
        return seen

    hidden = [name for name in names(PLAIN) if name.endswith(("attention.scores", "attention.weights"))]
    assert names(FAST) == [name for name in names(PLAIN) if name not in hidden]
    assert len(hidden) == 2 * GROUPED.n_layers


@pytest.mark.parametrize(("tap", "taken"), [(None, "FAST"), (lambda name, x: x, "PLAIN")], ids=["no tap", "tap"])
def test_a_pass_is_fast_unless_it_is_watched(tap, taken, monkeypatch):
    called = []
    for name in ("FAST", "PLAIN"):

        def swiglu(gate, up, name=name):
            called.append(name)
            return ops.swiglu(gate, up)

        monkeypatch.setattr(model, name, dataclasses.replace(getattr(model, name), swiglu=swiglu))
    forward(PARAMS, GROUPED, TOKENS, tap=tap)
    assert called == [taken] * GROUPED.n_layers


def test_an_empty_recording_is_a_tap():
    """Call it: it is false, as every empty dict is, so the code must compare with None."""

    class Recording(dict):
        def __call__(self, name, x):
            self[name] = x
            return x

    recording = Recording()
    forward(PARAMS, GROUPED, TOKENS, tap=recording)
    assert "layers.0.attention.scores" in recording


def test_a_weight_and_its_activation_have_the_prefix_of_the_scope():
    seen = {}
    s = Scope(PARAMS, GROUPED, KVCache(GROUPED), PLAIN, lambda name, x: seen.setdefault(name, x))
    assert s["norm"] is PARAMS["norm.weight"]
    attention = s.in_layer(1).under("attention")
    assert (attention.layer, attention.prefix) == (1, "layers.1.attention.")
    assert attention["wq"] is PARAMS["layers.1.attention.wq.weight"]
    x = np.ones(3)
    assert attention.see("q", x) is x
    assert seen == {"layers.1.attention.q": x}


def test_a_model_carries_its_operations_through_generation_and_perplexity():
    calls = []

    def swiglu(gate, up):
        calls.append(gate.shape)
        return ops.swiglu(gate, up)

    carried = Model(GROUPED, PARAMS, ops=dataclasses.replace(FAST, swiglu=swiglu))
    plain = Model(GROUPED, PARAMS)
    runs = {
        "generate": lambda m: list(generate(m, TOKENS, max_tokens=3)),
        "lookup": lambda m: list(generate(m, [7, 8, 9, 7, 8, 9, 7, 8], max_tokens=3, lookup=2)),
        "batch": lambda m: list(generate_batch(m, [TOKENS, TOKENS[:2]], max_tokens=3)),
        "perplexity": lambda m: perplexity(m, TOKENS * 8, context=8).nll.tolist(),
    }
    for name, run in runs.items():
        calls.clear()
        expected = run(plain)
        assert not calls
        assert run(carried) == expected
        assert len(calls) >= GROUPED.n_layers, name
        assert len(calls) % GROUPED.n_layers == 0, name


def test_functions_of_the_model_take_five_arguments_at_most():
    tree = ast.parse(inspect.getsource(model))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "forward"):
        assert len(function.args.args) <= 5, function.name


def test_no_function_of_the_model_asks_for_the_tap_but_forward():
    tree = ast.parse(inspect.getsource(model))
    asking = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if (isinstance(node, ast.Name) and node.id in ("tap", "FAST", "PLAIN"))
        or (isinstance(node, ast.Attribute) and node.attr == "tap")
    ]
    assert set(asking) == {"forward"}
