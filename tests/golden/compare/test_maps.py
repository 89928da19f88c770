"""Other programs' names and layouts: Hugging Face's from the real model, the others from their documented shapes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from npllama.golden.compare import compare, comparison
from npllama.golden.compare.maps import BUILT_IN, MapError, Rule, read_map
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision
from npllama.golden.trace import read_trace, record, write_trace

import broken_ports
import tiny

T = 12
TOKENS = tiny.random_tokens(broken_ports.CONFIG, 2, T)


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    return write_trace(model, TOKENS, tmp_path_factory.mktemp("maps") / "reference", 0, Precision("float64"))


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    trace = write_trace(model, TOKENS, tmp_path_factory.mktemp("maps") / "mine")
    return {name: np.array(x) for name, x in trace.items()}


def halves(x):
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def joined(x):
    return x.reshape(len(x), -1)


def layerwise(names: dict[str, str], layers: int = 2) -> dict[str, str]:
    return {k.replace("{i}", str(i)): v.replace("{i}", str(i)) for k, v in names.items() for i in range(layers)}


@pytest.mark.torch
def test_hugging_faces_modules(model, reference, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_reference import hf_model, hf_module_outputs

    recorded = hf_module_outputs(hf_model(model.config, model.params), TOKENS)
    np.savez(tmp_path / "theirs.npz", **recorded)
    found = compare(reference.path, tmp_path / "theirs.npz", names="hf", model=model)
    assert found.equal, found.verdict
    assert {row.name for row in found.rows} >= {"tok_embeddings", "layers.1.attention.q", "layers.1.attention.k", "logits"}
    assert any("no name in the map hf" in warning for warning in found.warnings)

    recorded["model.layers.1.self_attn.k_proj"] = np.ascontiguousarray(recorded["model.layers.1.self_attn.k_proj"][..., ::-1])
    np.savez(tmp_path / "wrong.npz", **recorded)
    assert compare(reference.path, tmp_path / "wrong.npz", names="hf", model=model).first.name == "layers.1.attention.k"


def transformerlens(model, ours) -> dict[str, np.ndarray]:
    """Rename the activations as run_with_cache() returns them: a batch axis, halves, norms before their weights."""
    names = layerwise(
        {
            "blocks.{i}.attn.hook_v": "layers.{i}.attention.v",
            "blocks.{i}.attn.hook_attn_scores": "layers.{i}.attention.scores",
            "blocks.{i}.attn.hook_pattern": "layers.{i}.attention.weights",
            "blocks.{i}.attn.hook_z": "layers.{i}.attention.heads",
            "blocks.{i}.hook_attn_out": "layers.{i}.attention.out",
            "blocks.{i}.hook_resid_mid": "layers.{i}.attention_residual",
            "blocks.{i}.mlp.hook_pre": "layers.{i}.feed_forward.gate",
            "blocks.{i}.mlp.hook_pre_linear": "layers.{i}.feed_forward.up",
            "blocks.{i}.mlp.hook_post": "layers.{i}.feed_forward.act",
            "blocks.{i}.hook_mlp_out": "layers.{i}.feed_forward.out",
            "blocks.{i}.hook_resid_post": "layers.{i}.out",
        }
    )
    rotated = layerwise(
        {
            "blocks.{i}.attn.hook_q": "layers.{i}.attention.q",
            "blocks.{i}.attn.hook_k": "layers.{i}.attention.k",
            "blocks.{i}.attn.hook_rot_q": "layers.{i}.attention.q_rope",
            "blocks.{i}.attn.hook_rot_k": "layers.{i}.attention.k_rope",
        }
    )
    normed = layerwise(
        {"blocks.{i}.ln1.hook_normalized": "layers.{i}.attention_norm", "blocks.{i}.ln2.hook_normalized": "layers.{i}.ffn_norm"}
    ) | {"ln_final.hook_normalized": "norm"}
    found = {"hook_embed": ours["tok_embeddings"], "logits": ours["logits"]}
    found |= {theirs: ours[name] for theirs, name in names.items()}
    found |= {theirs: halves(ours[name]) for theirs, name in rotated.items()}
    found |= {theirs: ours[name] / model.params[f"{name}.weight"] for theirs, name in normed.items()}
    found |= {"blocks.1.attn.q.hook_out": np.ones((T, 6, 16), np.float32), "hook_unembed": ours["logits"]}
    found |= {"blocks.0.hook_resid_pre": ours["tok_embeddings"], "blocks.0.ln1.hook_scale": np.ones((T, 1), np.float32)}
    return {name: x[None] for name, x in found.items()}


def ggml(model, ours, T=T, slots=None) -> dict[str, np.ndarray]:
    """Rename the activations as a callback sees them, the last dimension of ne[] first.

    The cache has 32 cells; the last layer computes one token only.
    """
    K, cells = model.config.head_dim, 32
    names = layerwise(
        {
            "attn_norm-{i}": "layers.{i}.attention_norm",
            "Qcur-{i}": "layers.{i}.attention.q_rope",
            "Kcur-{i}": "layers.{i}.attention.k_rope",
            "attn_out-{i}": "layers.{i}.attention.out",
            "ffn_inp-{i}": "layers.{i}.attention_residual",
            "ffn_norm-{i}": "layers.{i}.ffn_norm",
            "ffn_gate-{i}": "layers.{i}.feed_forward.gate",
            "ffn_up-{i}": "layers.{i}.feed_forward.up",
            "ffn_swiglu-{i}": "layers.{i}.feed_forward.act",
            "ffn_out-{i}": "layers.{i}.feed_forward.out",
            "l_out-{i}": "layers.{i}.out",
        }
    )
    last_only = ("ffn_inp-1", "ffn_norm-1", "ffn_gate-1", "ffn_up-1", "ffn_swiglu-1", "ffn_out-1", "l_out-1")
    found = {theirs: ours[name][-1:] if theirs in last_only else ours[name] for theirs, name in names.items()}
    for i in range(2):
        name = f"layers.{i}.attention."
        found |= {f"Vcur-{i}": joined(ours[name + "v"]), f"kqv_out-{i}": joined(ours[name + "heads"])}
        S = slots or T
        if slots is None:
            q, k = ours[name + "q_rope"], np.repeat(ours[name + "k_rope"], 3, axis=1)
            products = np.einsum("thk,shk->hts", q, k)
        else:  # the cache has the keys of the passes before
            scores = ours[name + "scores"]
            products = np.where(np.isfinite(scores), scores * np.float32(4), np.float32(7))
        kq = np.zeros((6, T, cells), np.float32)
        kq[..., :S] = products
        found[f"kq-{i}"] = kq
        found[f"kq_soft_max-{i}"] = np.pad(ours[name + "weights"], ((0, 0), (0, 0), (0, cells - S)))
    assert K == 16
    found |= {"inp_embd": ours["tok_embeddings"], "result_norm": ours["norm"][-1:], "result_output": ours["logits"][-1:]}
    return found | {"norm-0": ours["tok_embeddings"], "kqv-0": np.ones((6, T, 16), np.float32)}


def keras_hub(model, ours) -> dict[str, np.ndarray]:
    """Lay activations out as its layers return them: a batch axis, heads apart, halves."""
    layer = "transformer_layer_{i}/"
    names = {
        "self_attention_layernorm": "attention_norm",
        "self_attention/value": "attention.v",
        "self_attention/attention_output": "attention.out",
        "feedforward_layernorm": "ffn_norm",
        "feedforward_gate_dense": "feed_forward.gate",
        "feedforward_intermediate_dense": "feed_forward.up",
        "feedforward_output_dense": "feed_forward.out",
    }
    found = layerwise({layer + theirs: "layers.{i}." + name for theirs, name in names.items()} | {layer[:-1]: "layers.{i}.out"})
    rotated = {layer + "self_attention/query": "layers.{i}.attention.q", layer + "self_attention/key": "layers.{i}.attention.k"}
    made = {theirs: ours[name] for theirs, name in found.items()}
    made |= {theirs: halves(ours[name]) for theirs, name in layerwise(rotated).items()}
    made |= {"token_embedding": ours["tok_embeddings"], "sequence_output_layernorm": ours["norm"], "logits": ours["logits"]}
    made["transformer_layer_0/self_attention"] = ours["layers.0.attention.out"]
    return {name: x[None] for name, x in made.items()}


def of_modules(names: dict[str, str], ours) -> dict[str, np.ndarray]:
    """Lay activations out as torch modules with Meta's order of rows return them: a batch axis, heads joined."""
    made = {theirs: ours[name] for theirs, name in layerwise({k: "layers.{i}." + v for k, v in names.items()}).items()}
    made |= {"tok_embeddings": ours["tok_embeddings"], "norm": ours["norm"], "layers.0.attention": ours["norm"]}
    return {name: (joined(x) if x.ndim == 3 else x)[None] for name, x in made.items()}


def meta(model, ours) -> dict[str, np.ndarray]:
    """Name the modules of Meta's Transformer."""
    products = {f"attention.w{name}": f"attention.{name}" for name in "qkv"} | {"attention.wo": "attention.out"}
    gates = {"w1": "gate", "w3": "up", "w2": "out"}
    products |= {f"feed_forward.{theirs}": f"feed_forward.{name}" for theirs, name in gates.items()}
    names = products | {"attention_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    found = of_modules({f"layers.{{i}}.{theirs}": name for theirs, name in names.items()} | {"layers.{i}": "out"}, ours)
    return found | {"output": ours["logits"][None]}


def torchtune(model, ours) -> dict[str, np.ndarray]:
    """Name the modules of torchtune's TransformerDecoder."""
    products = {f"attn.{name}_proj": f"attention.{name}" for name in "qkv"} | {"attn.output_proj": "attention.out"}
    products |= {"mlp.w1": "feed_forward.gate", "mlp.w3": "feed_forward.up", "mlp.w2": "feed_forward.out"}
    names = products | {"sa_norm": "attention_norm", "mlp_norm": "ffn_norm"}
    found = of_modules({f"layers.{{i}}.{theirs}": name for theirs, name in names.items()} | {"layers.{i}": "out"}, ours)
    del found["layers.0.attention"]
    return found | {"logits": ours["logits"][None], "layers.1.sa_scale": ours["norm"], "layers.0.attn": ours["norm"]}


def llama2_c(model, ours) -> dict[str, np.ndarray]:
    """Lay activations out as docs/capturing.md records them: one row for each position."""
    names = {"rms_att": "attention_norm", "rms_ffn": "ffn_norm", "x_att": "attention_residual", "x": "out"}
    names |= {f"w{name}": f"attention.{name}" for name in "qkv"} | {"wo": "attention.out", "att": "attention.heads"}
    names |= {"rope_q": "attention.q_rope", "rope_k": "attention.k_rope", "swiglu": "feed_forward.act"}
    names |= {"w1": "feed_forward.gate", "w3": "feed_forward.up", "w2": "feed_forward.out"}
    found = layerwise({f"{theirs}.{{i}}": f"layers.{{i}}.{name}" for theirs, name in names.items()})
    found |= {"token_embedding_table": "tok_embeddings", "rms_final": "norm", "wcls": "logits"}
    return {theirs: joined(ours[name]) for theirs, name in found.items()}


MADE = {
    "transformerlens": transformerlens,
    "ggml": ggml,
    "keras-hub": keras_hub,
    "meta": meta,
    "torchtune": torchtune,
    "llama2.c": llama2_c,
}


@pytest.mark.parametrize("program", MADE)
def test_other_programs_names_and_layouts(program, model, reference, ours, tmp_path, monkeypatch):
    theirs = MADE[program](model, ours)
    np.savez(tmp_path / "theirs.npz", **theirs)
    partial = program not in ("transformerlens", "ggml", "llama2.c")  # the others have fused attention
    found = compare(reference.path, tmp_path / "theirs.npz", names=program, model=model, partial=partial)
    assert found.equal, found.verdict
    rules = [rule for rule in BUILT_IN[program].values() if isinstance(rule, Rule)]
    assert len(found.rows) >= len({r.name for r in rules if "{i}" in r.name}) * 2 - 2

    monkeypatch.setattr(comparison, "hints", lambda *args: [])  # which activation is wrong, of fifty, is asked here, not why
    for name, x in theirs.items():
        if read_map(program).find(name) is None or np.ptp(x) == 0:
            continue
        np.savez(tmp_path / "wrong.npz", **{name: x * np.float32(1.001)})
        found = compare(reference.path, tmp_path / "wrong.npz", names=program, model=model, partial=True, atol=2e-5, rtol=2e-4)
        meant = {canonical for canonical, _ in read_map(program).find_all(name)}
        assert len(failed := {row.name for row in found.rows if not row.passed}) == 1, name
        assert failed <= meant, name


def all_four_axes(x):
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


@pytest.mark.parametrize("form", [all_four_axes, np.squeeze])
@pytest.mark.parametrize("T", [T, 1])
def test_ggmls_natural_shapes_need_no_partial(form, T, model, tmp_path):
    """Read every tensor of a graph as a callback dumps it: axes of one, views, the cache's contents, token ids."""
    write_trace(model, TOKENS[:T], tmp_path / "reference", 1, Precision("float64"))
    mine = record(model, TOKENS[:T], read_trace(tmp_path / "reference").meta["steps"])
    theirs = {"inp_tokens": TOKENS[:T].astype(np.int32), "leaf_3": np.arange(4)}
    for step, n, slots in (("", T, T), ("step.0/", 1, T + 1)):
        one = {name.removeprefix(step): x for name, x in mine.items() if name.startswith(step) and "/" not in name[len(step) :]}
        for name, x in ggml(model, one, n, slots).items():
            theirs[step + name] = form(x)
        theirs |= {f"{step}cache_k_l0 (view)": np.ones((32, 32), np.float32), f"{step}Qcur-0 (view)": form(x)}
        theirs |= {f"{step}Kcur-1_(view)_(permuted)": np.ones(3, np.float32), f"{step}node_26": np.ones((1, 2), np.float32)}
    np.savez(tmp_path / "theirs.npz", **theirs)
    found = compare(tmp_path / "reference", tmp_path / "theirs.npz", names="ggml", model=model)
    assert found.equal, found.verdict
    rows = {row.name for row in found.rows}
    assert {"layers.1.attention.q_rope", "step.0/layers.0.attention.k_rope", "step.0/layers.0.attention.scores"} <= rows
    assert "layers.0.attention.q" not in rows
    assert any(w.startswith("8 of the reference's activations are not in the candidate") for w in found.warnings)
    assert any("whole numbers" in w and "inp_tokens" in w for w in found.warnings)


@pytest.mark.parametrize("T", [T, 1])
def test_ggmls_queries_before_rope_are_told_from_those_after_it(T, model, tmp_path):
    """Tell them apart by shape: a dump of each name's first tensor has rows before RoPE; a flattened one has either."""
    write_trace(model, TOKENS[5 : 5 + T], tmp_path / "reference", [3], Precision("float64"))
    mine = record(model, TOKENS[5 : 5 + T], [3])
    for step in ("", "step.0/")[T == 1 :]:  # at position 0 nothing is rotated
        for kind in ("q", "q_rope"):
            np.savez(tmp_path / "mine.npz", **{f"{step}Qcur-0": joined(mine[f"{step}layers.0.attention.{kind}"])})
            found = compare(tmp_path / "reference", tmp_path / "mine.npz", names="ggml", model=model, partial=True)
            assert found.equal
            assert [row.name for row in found.rows] == [f"{step}layers.0.attention.{kind}"]


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("unscaled", "1/sqrt(K) is missing"),
        ("scaled_by_k", "divided by K instead of sqrt(K)"),
        ("no_mask", "the causal mask is missing"),
        ("mask_one_late", "each token sees the one after it"),
        ("mask_one_early_but_first", "no token but the first sees itself"),
    ],
)
def test_raw_scores_prove_neither_scale_nor_mask(bug, words, model, reference, tmp_path):
    """Prove nothing from ggml's kq, before scale and mask: the map's rule, not the port, has put them into the scores."""
    mine = record(model, TOKENS, precision=Port(bug))
    np.savez(tmp_path / "theirs.npz", **ggml(model, mine))
    found = compare(reference.path, tmp_path / "theirs.npz", names="ggml", model=model)
    assert found.first.name == "layers.0.attention.weights"
    assert words in found.hints[0]


def test_norms_before_their_weight_are_left_out_aloud_without_a_model(model, reference, ours, tmp_path):
    np.savez(tmp_path / "theirs.npz", **transformerlens(model, ours))
    found = compare(reference.path, tmp_path / "theirs.npz", names="transformerlens")
    assert found.equal
    assert any(w.startswith("layers.0.attention_norm, ") and "needs the model (-m)" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("rule", "layout"),
    [
        ({"axes": "H T K"}, lambda x: x.swapaxes(0, 1)),
        ({"axes": "T H*K"}, joined),
        ({"axes": "H*K T"}, lambda x: joined(x).T),
        ({"axes": "K T H"}, lambda x: x.transpose(2, 0, 1)),
        ({"axes": "H T K", "pairs": "halves"}, lambda x: halves(x).swapaxes(0, 1)),
        ({"axes": "T H*K", "pairs": "halves"}, lambda x: joined(halves(x))),
        ({"axes": "T H*K", "scale": "1/sqrt(K)"}, lambda x: joined(x * 4)),
        ({}, lambda x: x[None]),
    ],
)
def test_a_map_of_the_users(rule, layout, reference, ours, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"block{i}/q": {"name": "layers.{i}.attention.q", **rule}, "noise": None}))
    name = "layers.{}.attention.q"
    np.savez(tmp_path / "mine.npz", **{f"block{i}/q": layout(ours[name.format(i)]) for i in (0, 1)}, noise=np.ones(3))
    found = compare(reference.path, tmp_path / "mine.npz", names=str(tmp_path / "map.json"))
    assert found.equal, found.verdict
    assert [row.name for row in found.rows] == [name.format(0), name.format(1)]


def test_a_steps_prefix_is_kept():
    assert read_map("ggml").find("step.3/l_out-1")[0] == "step.3/layers.1.out"
    assert read_map("hf").find("step.0/lm_head")[0] == "step.0/logits"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("{}", "expected an object"),
        ('{"a": "layers.0.attention.qq"}', "not the name of an activation"),
        ('{"a": 3}', "a is 3, expected a canonical name"),
        ('{"a": {"name": "norm", "axis": "T D"}}', "axis 'T D'"),
        ('{"a": {"name": "norm", "axes": "T F"}}', "expected T D in some order"),
        ('{"a": {"name": "norm", "pairs": "both"}}', "adjacent or halves"),
        ('{"a": {"name": "norm", "axes": "T-*D"}}', "expected T D in some order"),
        ('{"a": {"name": "norm", "axes": "T D-"}}', "expected T D in some order"),
        ('{"a": ""}', "a stands for '', which is not the name of an activation"),
        ('{"a": "a\\nb"}', "which is not the name of an activation"),
        ('{"a": [["b"]]}', r"a is \['b'\], expected a canonical name"),
        ('{"a": []}', r"a is \[\], expected a canonical name"),
        ('{"a": ' + "[" * 10**5, "nested deeper"),
    ],
)
def test_a_broken_map_is_said_to_be(content, message, tmp_path):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(MapError, match=message):
        read_map(str(tmp_path / "map.json"))


def test_an_unknown_map_is_told_the_known_ones():
    with pytest.raises(MapError, match="hf, transformerlens, ggml"):
        read_map("mlx")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("norm.wieght", "norm: weight is norm.wieght, which the model doesn't have; norm.weight it has"),
        ("layers.0.attention.wk.weight", "norm: weight layers.0.attention.wk.weight has the shape [32, 96], expected [96]"),
    ],
)
def test_a_maps_weight_that_the_model_lacks(weight, message, model, reference, ours, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"norm": {"name": "norm", "weight": weight}}))
    np.savez(tmp_path / "mine.npz", norm=ours["norm"])
    with pytest.raises(MapError, match=re.escape(f"map {tmp_path / 'map.json'}: {message}")):
        compare(reference.path, tmp_path / "mine.npz", names=str(tmp_path / "map.json"), model=model)


def test_two_names_for_one_activation_are_refused(reference, ours, tmp_path):
    np.savez(tmp_path / "mine.npz", inp_embd=ours["tok_embeddings"], embd=ours["tok_embeddings"])
    with pytest.raises(MapError, match="both inp_embd and embd stand for tok_embeddings"):
        compare(reference.path, tmp_path / "mine.npz", names="ggml")


def test_a_name_that_the_map_does_not_know_is_a_difference(reference, ours, tmp_path):
    np.savez(tmp_path / "mine.npz", inp_embd=ours["tok_embeddings"], atn_norm=ours["tok_embeddings"])
    found = compare(reference.path, tmp_path / "mine.npz", names="ggml")
    assert [row.name for row in found.rows if row.problem == "not in the reference"] == ["atn_norm"]
    assert compare(reference.path, tmp_path / "mine.npz", names="ggml", partial=True).equal


def test_a_wrong_shape_is_a_difference_that_says_what_was_expected(reference, ours, tmp_path):
    np.savez(tmp_path / "mine.npz", **{"Qcur-0": ours["layers.0.attention.q_rope"].swapaxes(0, 1)})
    found = compare(reference.path, tmp_path / "mine.npz", names="ggml", partial=True)
    assert found.verdict == "first divergence: layers.0.attention.q_rope (shape [6, 12, 16], expected [12, 6, 16])"


def test_a_noise_trace_may_have_the_candidates_names(model, reference, ours, tmp_path):
    """Take the floor from another program's run under the same map; it must not be the candidate's own."""
    theirs = ggml(model, ours)
    np.savez(tmp_path / "mine.npz", **theirs)
    other = {name: x * np.float32(1 + 1e-6) for name, x in theirs.items()}
    np.savez(tmp_path / "noise.npz", **other)
    found = compare(reference.path, tmp_path / "mine.npz", names="ggml", noise=tmp_path / "noise.npz")
    assert found.equal, found.verdict
    q = found.noise.accumulated["layers.1.attention.q_rope"]
    expected = np.sqrt(np.mean((other["Qcur-1"] - np.float64(reference["layers.1.attention.q_rope"])) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(q.rms, expected)
    with pytest.raises(ValueError, match="equal to the candidate"):
        compare(reference.path, tmp_path / "mine.npz", names="ggml", noise=tmp_path / "mine.npz")
    np.savez(tmp_path / "bad.npz", **{**other, "l_out-0": np.ones((5, 5), np.float32)})
    with pytest.raises(ValueError, match=r"bad.npz: layers.0.out: shape \[5, 5\], expected \[12, 96\]"):
        compare(reference.path, tmp_path / "mine.npz", names="ggml", noise=tmp_path / "bad.npz")
