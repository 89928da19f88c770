"""Each mistake in a port is named, at the operation that has it, and no other mistake is."""

from __future__ import annotations

import re

import numpy as np
import pytest

from npllama import LinearRopeScaling, ops
from npllama.checkpoint import Model
from npllama.golden.compare import compare
from npllama.golden.mistakes import Port, to_pairs
from npllama.golden.precision import Precision, round_bfloat16
from npllama.golden.trace import read_trace, record, write_trace

import broken_ports
import tiny

pytestmark = pytest.mark.once  # minutes; with every NumPy, test_mistakes.py has ten mistakes named
TOKENS = tiny.random_tokens(broken_ports.CONFIG, 2, 24)

# mistake -> where it shows first, words of its hint (each of which is in no other's), and whether it needs the model
EXPECTED = {
    "half_split": ("layers.0.attention.q_rope", "half-split RoPE", False),
    "no_rope": ("layers.0.attention.q_rope", "no RoPE", False),
    "no_mask": ("layers.0.attention.scores", "mask is missing", False),
    "mask_one_late": ("layers.0.attention.scores", "off by one in the causal mask", False),
    "position_1_late": ("layers.0.attention.q_rope", "position off by one: RoPE", False),
    "keys_and_values_tiled": ("layers.0.attention.scores", "keys are not repeated", False),
    "values_tiled": ("layers.0.attention.heads", "values are not repeated", False),
    "unscaled": ("layers.0.attention.scores", "1/sqrt(K) is missing", False),
    "theta_500000": ("layers.0.attention.q_rope", "θ = 500000, and 10000 was expected", False),
    "eps": ("layers.0.attention_norm", "eps = 1e-06, and 1e-05 was expected", False),
    "scale_factor": ("layers.0.attention.q_rope", "scale factor: 8, and 32 was expected", False),
    "no_scaling": ("layers.0.attention.q_rope", "scaling is missing", False),
    "transposed": ("layers.0.attention.q", "transposed weights", True),
    "value_from_k": ("layers.0.attention.v", "value is taken from k", False),
    "bfloat16_weights": ("layers.0.attention.q", "weights rounded to bfloat16", True),
    "bfloat16": ("tok_embeddings", "every number is exact in bfloat16", False),
    "rows_in_halves": ("layers.0.attention.q", "half-split order", False),
}
WORDS = {words for _, words, _ in EXPECTED.values()}


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """Write a float64 trace of a prompt and one decode step."""
    return write_trace(model, TOKENS, tmp_path_factory.mktemp("compare") / "reference", 1, Precision("float64")).path


def trace_of(bug, model, reference, out, taps=None):
    broken, port = broken_ports.port(bug, model)
    return write_trace(broken, TOKENS, out, read_trace(reference).meta["steps"], port).path


def test_every_mistake_is_expected_somewhere():
    assert set(EXPECTED) == set(broken_ports.BUGS)


@pytest.mark.parametrize("bug", EXPECTED)
def test_the_mistake_is_named_and_no_other(bug, model, reference, tmp_path):
    where, words, _ = EXPECTED[bug]
    found = compare(reference, trace_of(bug, model, reference, tmp_path / "mine"), model=model)
    assert found.exit_status == 1
    assert found.verdict.startswith(f"first divergence: {where} ("), found.verdict
    # The scores alone don't tell whether values are shared out wrongly too.
    assert len(found.hints) == (2 if bug == "keys_and_values_tiled" else 1), found.hints
    assert {w for w in WORDS if w in found.hints[0]} == {words}, found.hints


@pytest.mark.parametrize("bug", EXPECTED)
def test_most_need_no_model(bug, model, reference, tmp_path):
    """Find them from trace.json's constants and the activations alone; wrong weights show only against the right ones."""
    where, words, needs_model = EXPECTED[bug]
    found = compare(reference, trace_of(bug, model, reference, tmp_path / "mine"))
    assert found.verdict.startswith(f"first divergence: {where} ("), found.verdict
    assert {w for w in WORDS for hint in found.hints[:1] if w in hint} == (set() if needs_model else {words}), found.hints


def test_a_right_port_gets_no_hint(model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    found = compare(reference, write_trace(model, TOKENS, tmp_path / "mine", steps).path, model=model)
    assert found.equal, found.verdict
    assert found.hints == []
    assert found.wrong_by_themselves == []


def test_rounding_is_not_taken_for_a_mistake(model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    path = write_trace(model, TOKENS, tmp_path / "mine", steps).path
    found = compare(reference, path, model=model, atol=0, rtol=0)
    assert found.first.name == "layers.0.attention_norm"
    assert found.hints[0].startswith("its own operation is right")


def test_eps_is_read_from_the_tokens_that_show_it(tmp_path):
    """Ignore a token of large numbers, which hides eps in its rounding and must not drown the others."""
    model = broken_ports.tiny_model()
    embeddings = model.params["tok_embeddings.weight"].copy()
    embeddings[TOKENS[0]] *= 1000
    model = Model(model.config, {**model.params, "tok_embeddings.weight": embeddings})
    reference = write_trace(model, TOKENS, tmp_path / "reference", 0, Precision("float64")).path
    found = compare(reference, write_trace(model, TOKENS, tmp_path / "mine", precision=Port("eps")).path)
    assert found.hints == ["wrong eps: the norm is that of eps = 1e-06, and 1e-05 was expected"]


def test_a_layout_that_is_only_different_is_told_from_a_mistake(model, reference, tmp_path):
    """Blame the map, not the port: Hugging Face's rows with Hugging Face's rotation compute the same model."""
    steps = read_trace(reference).meta["steps"]
    port = Port("rows_in_halves", "half_split")
    found = compare(reference, write_trace(model, TOKENS, tmp_path / "mine", steps, port).path, model=model)
    assert "only the layout differs" in found.hints[0]


@pytest.mark.parametrize("bug", ["no_mask", "unscaled", "keys_and_values_tiled"])
def test_found_in_the_weights_when_the_scores_are_not_recorded(bug, model, reference, tmp_path):
    path = trace_of(bug, model, reference, tmp_path / "mine")
    arrays = {name: np.array(x) for name, x in read_trace(path).items() if not name.endswith("scores")}
    np.savez(tmp_path / "mine.npz", **arrays)
    found = compare(reference, tmp_path / "mine.npz", model=model, partial=True)
    assert found.first.name == "layers.0.attention.weights"
    assert EXPECTED[bug][1] in found.hints[0]


@pytest.fixture(scope="module")
def bare_reference(reference, tmp_path_factory):
    """Save the same numbers without trace.json: no constants are known."""
    file = tmp_path_factory.mktemp("bare") / "reference.npz"
    np.savez(file, **{name: np.array(x) for name, x in read_trace(reference).items()})
    return file


def test_without_constants_a_missing_scaling_is_no_wrong_theta(model, reference, bare_reference, tmp_path):
    """Name no expected θ, since none has the reference's angles."""
    found = compare(bare_reference, trace_of("no_scaling", model, reference, tmp_path / "mine"))
    assert found.hints == ["the reference's RoPE angles are scaled, yours are not: they are those of θ = 10000 alone"]
    found = compare(bare_reference, trace_of("scale_factor", model, reference, tmp_path / "factor"))
    assert found.hints[0].startswith("wrong RoPE angles: pair "), "both are scaled"


def test_without_constants_a_wrong_theta_is_one(tmp_path):
    model = broken_ports.tiny_model(rope_scaling=None)
    np.savez(tmp_path / "reference.npz", **record(model, TOKENS, precision=Precision("float64")))
    np.savez(tmp_path / "mine.npz", **record(model, TOKENS, precision=Port("theta_500000")))
    found = compare(tmp_path / "reference.npz", tmp_path / "mine.npz")
    assert found.hints == ["wrong RoPE θ: the angles are those of θ = 500000, and 10000 was expected"]


@pytest.mark.parametrize(
    ("scaling", "hint"),
    [
        (None, "RoPE's scaling is missing: the angles are those of θ alone"),
        (LinearRopeScaling(2.0), "wrong RoPE scale factor: every angle is 2 times the expected one"),
    ],
)
def test_mistakes_in_linear_scaling(scaling, hint, tmp_path):
    model = broken_ports.tiny_model(rope_scaling=LinearRopeScaling(4.0))
    reference = write_trace(model, TOKENS, tmp_path / "reference", 0, Precision("float64")).path
    mine = write_trace(broken_ports.tiny_model(rope_scaling=scaling), TOKENS, tmp_path / "mine").path
    assert compare(reference, mine, model=model).hints == [hint]


def half_split_rows_rotated_adjacently(model):
    """Run with Hugging Face's rows in wq and wk, but Meta's RoPE; recorded in adjacent pairs, as a right map writes them."""
    arrays = record(model, TOKENS, precision=Port("rows_in_halves"))
    rotated = [name for name in arrays if name.endswith(("q", "k", "q_rope", "k_rope"))]
    return {**arrays, **{name: to_pairs(arrays[name]) for name in rotated}}


def test_adjacent_pairs_rotated_in_hugging_faces_rows(model, reference, tmp_path):
    np.savez(tmp_path / "mine.npz", **half_split_rows_rotated_adjacently(model))
    found = compare(reference, tmp_path / "mine.npz", model=model, partial=True)
    assert found.first.name == "layers.0.attention.q_rope"
    assert found.hints[0].startswith("interleaved RoPE on rows in Hugging Face's order")


@pytest.mark.parametrize(
    ("bug", "where", "words"),
    [
        ("relu", "feed_forward.act", "ReLU instead of silu"),
        ("gelu_tanh", "feed_forward.act", "GELU instead of silu in the feed-forward, by its formula with tanh"),
        ("gelu_erf", "feed_forward.act", "GELU instead of silu in the feed-forward, by its formula with erf"),
        ("quick_gelu", "feed_forward.act", "QuickGELU"),
        ("sigmoid", "feed_forward.act", "the sigmoid instead of silu"),
        ("no_silu", "feed_forward.act", "silu is missing"),
        ("gate_up_exchanged", "feed_forward.act", "the gate and up are exchanged"),
        ("no_norm_weight", "attention_norm", "weight is missing"),
        ("norm_weight_plus_one", "attention_norm", "1 + weight"),
        ("no_norm", "attention_norm", "the norm is missing"),
        ("layer_norm", "attention_norm", "LayerNorm"),
    ],
)
def test_other_architectures_operations_are_named_without_the_model(bug, where, words, model, reference, tmp_path):
    found = compare(reference, trace_of(bug, model, reference, tmp_path / "mine"))
    assert found.first.name == f"layers.0.{where}"
    assert words in found.hints[0]
    assert len(found.hints) == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("norm", lambda a: a["layers.1.out"], "the norm is missing"),
        ("layers.1.attention_residual", lambda a: a["layers.1.attention.out"], "the residual connection is missing"),
        ("layers.1.out", lambda a: a["layers.1.attention_residual"], "feed_forward.out is not added"),
        ("layers.1.out", lambda a: a["layers.1.ffn_norm"] + a["layers.1.feed_forward.out"], "starts after the norm"),
        ("layers.0.attention_residual", lambda a: a["tok_embeddings"], "attention.out is not added"),
        (
            "layers.1.feed_forward.act",
            lambda a: ops.silu(a["layers.1.feed_forward.gate"]),
            "up is",
        ),
    ],
)
def test_what_is_left_out_is_named(name, change, words, model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    right = record(model, TOKENS, steps)
    np.savez(tmp_path / "mine.npz", **record(model, TOKENS, steps, patch={name: change(right)}))
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert found.first.name == name
    assert words in found.hints[0]


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (slice(1, None), "24 keys where 25 tokens have come so far: keys were dropped from the cache"),
        (slice(-1, None), "1 key where 25 tokens have come so far: the cache's are missing"),
        ([*range(25), 0, 0], "27 keys where 25 tokens have come so far: slots of the cache that hold no token's key"),
    ],
)
def test_scores_of_another_number_of_keys_say_what_the_cache_lacks(slots, words, model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    mine = record(model, TOKENS, steps)
    for name in [name for name in mine if name.startswith("step.0/") and name.endswith(("scores", "weights"))]:
        mine[name] = mine[name][..., slots]
    np.savez(tmp_path / "mine.npz", **mine)
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert found.first.name == "step.0/layers.0.attention.scores"
    [hint] = found.hints
    assert hint.startswith(words)


def test_an_output_matrix_taken_for_the_embedding(model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    broken = Model(model.config, {**model.params, "output.weight": model.params["tok_embeddings.weight"]})
    found = compare(reference, write_trace(broken, TOKENS, tmp_path / "mine", steps).path, model=model)
    assert found.first.name == "logits"
    assert found.hints[0].startswith("the output matrix is taken to be the embedding")


@pytest.mark.parametrize(
    ("bug", "ending", "where", "words"),
    [
        ("transposed", "w2.weight", "layers.0.feed_forward.out", "transposed weights"),
        ("layer_0_everywhere", "wk.weight", "layers.1.attention.k", "layer 0's instead of its own"),
    ],
)
def test_one_wrong_weight_is_named(bug, ending, where, words, model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    broken = broken_ports.only(bug, model, ending)
    found = compare(reference, write_trace(broken, TOKENS, tmp_path / "mine", steps).path, model=model)
    assert found.first.name == where
    assert words in found.hints[0]


def test_weights_cut_to_bfloat16(model, reference, tmp_path):
    found = compare(reference, trace_of("bfloat16_cut", model, reference, tmp_path / "mine"), model=model)
    assert found.first.name == "layers.0.attention.q"
    assert "cut off instead of rounded" in found.hints[0]


NEVER_WRITTEN = "every number is zero: was it ever written?"


@pytest.mark.parametrize(
    ("name", "change", "hints"),
    [
        ("layers.1.attention.v", lambda x: 0 * x, [NEVER_WRITTEN]),
        ("layers.1.out", lambda x: 0 * x, [NEVER_WRITTEN]),
        ("layers.1.ffn_norm", lambda x: 0 * x + 1, []),
        ("layers.1.attention.weights", lambda x: (x == x.max(-1, keepdims=True)).astype(x.dtype), []),
        ("layers.1.attention.weights", lambda x: np.where(x > 0, np.float32(0.125), np.float32(0)), []),
        ("layers.1.ffn_norm", lambda x: round_bfloat16(3 * x), []),
    ],
)
def test_numbers_that_bfloat16_has_are_not_always_rounded_ones(name, change, hints, model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    np.savez(tmp_path / "mine.npz", **record(model, TOKENS, steps, patch={name: change}))
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert (found.first.name, found.hints) == (name, hints)


def test_a_bfloat16_models_embeddings_taken_for_their_norm_are_not_rounded_ones(model, tmp_path):
    """Find that nothing was computed, not rounding: the embeddings are bfloat16 numbers themselves."""
    params = {name: round_bfloat16(x) for name, x in model.params.items()}
    model = Model(model.config, params)
    reference = write_trace(model, TOKENS, tmp_path / "reference", 0, Precision("float64")).path
    arrays = record(model, TOKENS)
    arrays = record(model, TOKENS, patch={"layers.0.attention_norm": arrays["tok_embeddings"]})
    np.savez(tmp_path / "mine.npz", **arrays)
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert found.first.name == "layers.0.attention_norm"
    assert not any("bfloat16" in hint for hint in found.hints)


def test_only_wrong_operations_are_wrong_by_themselves(model, reference, tmp_path):
    """Accuse only the mistaken operation, which fails on the candidate's own inputs; everything after it differs too."""
    found = compare(reference, trace_of("values_tiled", model, reference, tmp_path / "mine"), model=model)
    kinds = {name.partition("layers.")[2][2:] for name in found.wrong_by_themselves}
    assert kinds == {"attention.heads"}
    assert len(found.wrong_by_themselves) == 4, "two layers, in the prompt and in the step"
    assert sum(not row.passed for row in found.rows) > 40


def of_another_shape(x):
    return x.reshape(len(x), -1)


def not_a_number(x):
    x = x.copy()
    x[-1, 0, 0] = np.nan
    return x


@pytest.mark.parametrize("spoil", [of_another_shape, not_a_number])
@pytest.mark.parametrize(
    ("name", "unjudged"),
    [
        ("layers.1.attention.q", {"layers.1.attention.q", "layers.1.attention.q_rope"}),
        ("layers.1.attention.v", {"layers.1.attention.v", "layers.1.attention.heads", "step.0/layers.1.attention.heads"}),
    ],
)
def test_what_is_computed_from_unusable_numbers_is_not_accused(name, unjudged, spoil, model, reference, tmp_path):
    """Acquit the next operation, whose inputs are unknown; in the cache they stay inputs."""
    steps = read_trace(reference).meta["steps"]
    mine = record(model, TOKENS, steps, patch={name: lambda x: x * 1.5})
    np.savez(tmp_path / "mine.npz", **{**mine, name: spoil(mine[name])})
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert found.first.name == name
    assert found.wrong_by_themselves == []
    assert {row.name for row in found.rows if row.local is None} == unjudged
    partial = {key: x for key, x in mine.items() if not key.endswith(("scores", "weights"))}
    np.savez(tmp_path / "partial.npz", **{**partial, name: spoil(mine[name])})
    found = compare(reference, tmp_path / "partial.npz", model=model, partial=True)
    assert found.wrong_by_themselves == [], "nor is it by way of activations that aren't recorded"


@pytest.mark.slow
def test_inputs_are_what_an_activation_is_computed_from():
    """Change an input and see the activation change; change another one and see it stay."""
    from npllama.golden.compare.names import in_order, place

    model, tokens, steps = broken_ports.tiny_model(), TOKENS[:4], [[5], [6]]
    exact = record(model, tokens, steps)
    layer_1 = [name for name in exact if "layers.1." in name or name.rpartition("/")[2] in ("norm", "logits")]
    for name in layer_1:
        inputs = set(place(name).inputs(model.config.n_layers))
        assert inputs <= exact.keys(), inputs - exact.keys()
        fixed = {n: exact[n] for n in exact if n != name}
        for other in in_order(exact)[: in_order(exact).index(name)][-60:]:
            changed = record(
                model, tokens, steps, patch={**fixed, other: 2 * np.where(np.isneginf(exact[other]), 0, exact[other])}
            )
            assert (not np.array_equal(changed[name], exact[name])) == (other in inputs), (other, name)


def test_a_second_mistake_is_not_lost_in_what_follows_from_the_first(model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    broken = broken_ports.only("transposed", model, "w2.weight")
    found = compare(reference, write_trace(broken, TOKENS, tmp_path / "mine", steps, Port("half_split")).path, model=model)
    kinds = {name.partition("layers.")[2][2:] for name in found.wrong_by_themselves}
    assert kinds == {"attention.q_rope", "attention.k_rope", "feed_forward.out"}


def test_an_error_below_the_accumulated_noise_is_found_by_the_operation_alone(model, reference, tmp_path):
    """Find a norm that is off by eight millionths, less than the noise accumulated before it."""
    steps = read_trace(reference).meta["steps"]
    mine = record(model, TOKENS, steps, patch={"layers.1.ffn_norm": lambda x: x * np.float32(1 + 8e-6)})
    np.savez(tmp_path / "mine.npz", **mine)
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert re.match(r"first divergence: layers.1.ffn_norm \(local relative error (7.9|8.[01])e-06, noise floor ", found.verdict)
    assert found.wrong_by_themselves == ["layers.1.ffn_norm"]
    assert found.first.judged.passed, "the whole pass up to it doesn't show it"


# ------------------------------------------------------------------------------------- several, unrecorded, and only the logits


def kept(path, out, *parts, leave=()):
    """Save a trace's activations as an .npz: those whose names end in one of `parts`, or in none of `leave`."""
    found = {name: np.array(x) for name, x in read_trace(path).items() if not name.endswith(tuple(leave) or "\0")}
    np.savez(out, **{name: x for name, x in found.items() if name.endswith(parts or "")})
    return out


def test_each_group_that_is_wrong_by_itself_has_its_hint(model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    write_trace(model, TOKENS, tmp_path / "mine", steps, Port("half_split", "no_silu", "value_from_k"))
    found = compare(reference, tmp_path / "mine", model=model)
    assert [found.hints[0][:15], *(hint.partition(" is ")[0] for hint in found.hints[1:])] == [
        "the value is ta",
        "layers.0.attention.q_rope: half-split RoPE: it rotates x[j] with x[j + K/2], which",
        "layers.0.feed_forward.act: silu",
    ]


FUSED = ("q_rope", "k_rope", "scores", "weights", "heads")


@pytest.mark.parametrize("bug", ["no_scaling", "theta_500000", "half_split", "unscaled"])
def test_a_mistake_inside_of_fused_attention(bug, model, reference, tmp_path):
    words = {"theta_500000": "theta is 500000"}.get(bug, EXPECTED[bug][1])
    mine = kept(trace_of(bug, model, reference, tmp_path / "mine"), tmp_path / "mine.npz", leave=FUSED)
    found = compare(reference, mine, model=model, partial=True)
    assert found.first.name == "layers.0.attention.out"
    assert words in found.hints[0]
    assert not [hint for hint in found.hints if hint.startswith("layers.1")]


@pytest.mark.parametrize("bug", ["no_scaling", "theta_500000", "half_split", "eps"])
def test_a_port_that_gives_its_logits_alone(bug, model, reference, run_once, tmp_path):
    words = {"theta_500000": "theta is 500000", "eps": "eps is 1e-6"}.get(bug, EXPECTED[bug][1])
    mine = kept(trace_of(bug, model, reference, tmp_path / "mine"), tmp_path / "mine.npz", "logits")
    found = compare(reference, mine, model=model, partial=True)
    assert found.first.name == "logits"
    assert words in found.hints[0]
    assert found.hints[0].endswith("(running the model with this mistake gives the same numbers)")
    assert len(found.hints) == 1


def test_centred_logits_are_what_they_are(model, reference, run_once, tmp_path):
    logits = np.array(read_trace(reference)["logits"])
    np.savez(tmp_path / "mine.npz", logits=(logits - logits.mean(axis=-1, keepdims=True)).astype(np.float32))
    found = compare(reference, tmp_path / "mine.npz", model=model, partial=True)
    assert found.hints[0].startswith("logits are centred")


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        (("float16-cache",), "layers.0.attention.scores"),
        (("int8-activations", "float16-cache"), "layers.0.attention.q"),
        (("int8-activations-256",), "layers.0.attention.q"),
    ],
)
def test_what_a_quantised_port_rounds_is_named(parts, where, model, reference, tmp_path):
    steps = read_trace(reference).meta["steps"]
    rounded = Precision("float32", parts=parts)
    write_trace(model, TOKENS, tmp_path / "mine", steps, rounded)
    found = compare(reference, tmp_path / "mine", model=model, precision="float32")
    assert found.first.name == where
    for part in parts:
        assert [hint for hint in found.hints if hint.endswith(f"--profile {part}")], found.hints
    assert not [hint for hint in found.hints if "bfloat16" in hint]
    assert compare(reference, tmp_path / "mine", model=model).equal


def test_several_that_fit_are_all_listed(model, reference, tmp_path):
    mine = trace_of("keys_and_values_tiled", model, reference, tmp_path / "mine")
    found = compare(reference, mine, model=model)
    assert found.first.name == "layers.0.attention.scores"
    assert found.hints[0].startswith("keys are not repeated")
    assert found.hints[1].startswith("or: keys and values are not repeated")
    right_heads = trace_of("keys_tiled", model, reference, tmp_path / "keys")
    assert len(compare(reference, right_heads, model=model).hints) == 1
