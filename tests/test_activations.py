"""The activation table against the pass that it describes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from npllama import KVCache, activations, forward, model, ops, parameter_shapes
from npllama.activations import AFTER, BEFORE, LAYER, STREAM, TABLE, TOKENS, Context
from npllama.engine import linear
from npllama.golden.compare.maps import BUILT_IN
from npllama.golden.compare.names import place
from npllama.model import PLAIN
from npllama_convert import capture

from tiny import CONFIGS, random_params, random_tokens

PROMPT, STEP = 5, 1


def run(config, params, tokens, cache):
    """Run one pass: name -> activation, in the order in which the tap sees them."""
    seen = {}
    forward(params, config, tokens, cache, tap=lambda name, x: seen.setdefault(name, x.copy()))
    return seen


def context_at(config, positions, slot_positions, operations=PLAIN):
    frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)
    rotation = ops.rope_rotation(positions, frequencies)
    return Context(config, rotation, ops.causal_mask(positions, slot_positions, np.float64), ops=operations)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_the_rows_are_what_a_pass_shows_in_this_order_and_shape(name, batch):
    config = CONFIGS[name]
    params, cache, n_slots = random_params(config, seed=1), KVCache(config, batch), 0
    for n in (PROMPT, STEP):
        n_slots += n
        seen = run(config, params, random_tokens(config, 2, (*batch, n)), cache)
        expected = activations.activation_shapes(config, n, n_slots, batch)
        assert {name: x.shape for name, x in seen.items()} == expected
        assert list(seen) == list(expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_and_a_decode_step_are_recomputed_from_the_rows(name):
    """Check each activation against one operation on those before it.

    Measured: equal to the bit. A BLAS may sum in another order where keys lie otherwise in memory than in the cache: ten units
    of rounding, of the activation's largest magnitude.
    """
    config = CONFIGS[name]
    params, cache, passes = random_params(config, seed=1, dtype="float64"), KVCache(config, (2,)), []
    prompt = np.array([[-1, -1, 3, 5, 7], [2, 4, 6, 8, 1]])
    for tokens in (prompt, np.array([[9], [11]])):
        passes.append(seen := run(config, params, tokens, cache))
        T = tokens.shape[-1]
        context = context_at(config, cache.positions[..., -T:], cache.positions)
        for full_name, x in seen.items():
            row, layer = TABLE[place(full_name).kind], place(full_name).layer
            given = {TOKENS: tokens, STREAM: seen.get(activations.stream_before(config.n_layers if layer is None else layer))}
            given |= {other.name: seen.get(other.full_name(layer)) for other in TABLE.values()}
            if row.slots:
                all_passes = [earlier[TABLE[row.slots].full_name(layer)] for earlier in passes]
                context = replace(context, slots={row.slots: np.concatenate(all_passes, axis=-3).swapaxes(-2, -3)})
            weight = params[row.parameter(config, layer)] if row.weight else None
            found = row.compute([given[name] for name in row.inputs], weight, context)
            assert found.shape == x.shape, full_name
            finite = np.isfinite(x)
            np.testing.assert_array_equal(finite, np.isfinite(found))
            assert np.max(np.abs(found[finite] - x[finite])) <= 10 * np.finfo(float).eps * np.max(np.abs(x[finite])), full_name


def test_an_operation_that_is_replaced_changes_the_rows_that_it_computes():
    config = CONFIGS["grouped"]
    context = context_at(config, np.arange(3), np.arange(3), replace(PLAIN, softmax=np.negative))
    scores = np.ones((6, 3, 3))
    np.testing.assert_array_equal(TABLE["attention.weights"].compute([scores], None, context), -scores)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_the_functions_are_the_operation_and_what_the_formula_names(row):
    public = {name: value for module in (model, ops, linear) for name, value in vars(module).items() if callable(value)}
    names = {function.__name__ for function in row.functions}
    assert [public[function.__name__] for function in row.functions] == list(row.functions)
    if row.operation == activations.ADD:
        assert row.functions == (model.block,)
    else:
        assert getattr(PLAIN, row.operation) in row.functions
    for called in re.findall(r"\b(\w+)\(", row.formula):
        assert called in names or hasattr(np, called), called


def test_the_rows_take_every_parameter_once_and_every_activation_but_the_logits():
    for config in CONFIGS.values():
        rows = [(row, None) for row in (*BEFORE, *AFTER)] + [(row, i) for i in range(config.n_layers) for row in LAYER]
        named = [row.parameter(config, layer) for row, layer in rows if row.weight]
        if config.tied_embeddings:
            named.remove("tok_embeddings.weight")  # by two rows
        assert sorted(named) == sorted(parameter_shapes(config))
    taken = {name for row in TABLE.values() for name in (*row.inputs, row.slots)}
    assert taken - {TOKENS, STREAM, ""} == TABLE.keys() - {"tok_embeddings", "out", "norm", "logits"} | {"norm"}


@pytest.mark.parametrize("layout", [capture.HUGGING_FACE, capture.META], ids=lambda layout: layout.source)
def test_capture_knows_every_activation(layout):
    """Collect most from modules, the rest from the rotary function and the softmax."""
    of_functions = [f"attention.{name}" for name in ("q_rope", "k_rope", "scores", "weights")]
    assert list(layout.inner) == [row.name for row in LAYER if row.name not in of_functions]
    assert sorted(layout.outer) == sorted(row.name for row in (*BEFORE, *AFTER))


def each_of(rules):
    """Return the rules of a name, which may be one, several or none."""
    return rules if isinstance(rules, tuple) else filter(None, [rules])


@pytest.mark.parametrize("title", BUILT_IN)
def test_the_name_maps_lead_to_activations_and_their_weights(title):
    rules = [(pattern, rule) for pattern, several in BUILT_IN[title].items() for rule in each_of(several)]
    assert rules
    for pattern, rule in rules:
        row = place(rule.name.replace("{i}", "0")).row
        assert row is not None, pattern
        if rule.weight:
            assert rule.weight.replace("{i}", "0") == row.parameter(CONFIGS["grouped"], 0), pattern
        for choice in rule.axes.split("|") if rule.axes else []:
            assert sorted(re.findall(r"[A-Z]", choice)) == sorted(row.axes), pattern  # axes of one have no letter


def test_the_logits_have_the_embedding_s_letter_where_it_is_the_output_matrix():
    for tied in (True, False):
        rows = activations.table_of(replace(CONFIGS["grouped"], tied_embeddings=tied))
        assert [row.name for row in rows] == list(TABLE)
        assert [("Eᵀ" in row.formula, "E^" in row.tex) for row in rows] == [(False, False)] * (len(rows) - 1) + [(tied, tied)]


@pytest.mark.parametrize("row", [*TABLE.values(), *activations.table_of(CONFIGS["one_kv_head"])], ids=lambda row: row.name)
def test_every_row_is_told_and_can_be_typeset(row):
    mathtext = pytest.importorskip("matplotlib.mathtext", reason="matplotlib is not installed")
    assert row.sentence[-1] in ".?"
    assert row.sentence[0].isupper()
    assert " = " in row.formula
    assert " = " in row.tex
    mathtext.MathTextParser("path").parse(f"${row.tex}$")
