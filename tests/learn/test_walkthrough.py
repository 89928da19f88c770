"""Check the lesson of a pass: its numbers are the pass's own, its lines are where the code is, and it fits a terminal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import npllama
from npllama import checkpoint, ops
from npllama.activations import table_of
from npllama.checkpoint import Model
from npllama.cli import main
from npllama.learn import lesson
from npllama.learn.lesson import Source, Step, Table, cell_width
from npllama.learn.walkthrough import Pass, walkthrough
from npllama.model import forward

from commands import fails
from system import ROOT
from tiny import CONFIGS, random_params

N_STEPS = 21


@pytest.fixture(scope="module")
def demo() -> Model:
    return npllama.load()


def tiny_model(name: str) -> Model:
    return Model(CONFIGS[name], random_params(CONFIGS[name], seed=1))


def floats(step: Step) -> list[float]:
    return [cell for table in step.tables for row in table.rows for cell in row if isinstance(cell, float)]


def step_of(steps: list[Step], title: str) -> Step:
    (found,) = [step for step in steps if step.title.startswith(title)]
    return found


def numbers_of(x: object) -> set[float]:
    return set(np.asarray(x, np.float64).ravel().tolist())


# ------------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (4, 5)])
def test_the_numbers_are_the_taps(demo, layer, head):
    """Find each float of a step in a recording of the same pass, or derive it as stated here."""
    ids = demo.tokenizer.encode("First Citizen:\nBefore we proceed", bos=True)
    seen = npllama.record(demo, ids)
    name, last = f"layers.{layer}.", len(ids) - 1
    before = "tok_embeddings" if layer == 0 else f"layers.{layer - 1}.out"
    steps = walkthrough(demo, ids, layer, head)
    assert len(steps) == N_STEPS
    expected = {
        "Embeddings": seen["tok_embeddings"],
        "Queries": np.concatenate([seen[name + f"attention.{x}"][last].ravel() for x in "qkv"]),
        "Heads joined": seen[name + "attention.out"],
        "The causal mask": seen[name + "attention.scores"][head],
        "The residual": [*seen[before][last], *seen[name + "attention.out"][last], *seen[name + "attention_residual"][last]],
        "Back to": [
            *seen[name + "attention_residual"][last],
            *seen[name + "feed_forward.out"][last],
            *seen[name + "out"][last],
        ],
        "SwiGLU": [
            *seen[name + "feed_forward.gate"][last],
            *ops.silu(seen[name + "feed_forward.gate"][last]),
            *seen[name + "feed_forward.up"][last],
            *seen[name + "feed_forward.act"][last],
        ],
        f"RMSNorm, before layer {layer}": [
            *seen[before][last],
            *demo.params[name + "attention_norm.weight"],
            *seen[name + "attention_norm"][last],
        ],
        "RMSNorm, before the feed": [
            *seen[name + "attention_residual"][last],
            *demo.params[name + "ffn_norm.weight"],
            *seen[name + "ffn_norm"][last],
        ],
        "The final": [*seen["layers.5.out"][last], *demo.params["norm.weight"], *seen["norm"][last]],
        "Logits": seen["logits"],
        "The chosen": seen["logits"][last],
        "Probabilities": [*seen["logits"][last], *ops.softmax(seen["logits"][last])],
    }
    for title, activations in expected.items():
        shown = floats(step_of(steps, title))
        assert shown
        assert set(shown) <= numbers_of(activations), title
    softmax = step_of(steps, "Softmax")
    weights = seen[name + "attention.weights"][head]
    for row in softmax.tables[0].rows:
        if row[0] != "…":
            assert row[-1] == pytest.approx(1)
            assert set(row[1:-1]) - {"…"} <= numbers_of(weights)
    assert [row[2] for row in softmax.tables[1].rows] == sorted(map(float, weights[last]), reverse=True)[:5]


@pytest.mark.parametrize(("head", "group"), [(1, 0), (4, 1)])
def test_what_is_not_tapped_is_what_the_pass_computed(demo, head, group):
    ids = demo.tokenizer.encode("ROMEO:", bos=True)
    seen = npllama.record(demo, ids)
    steps = walkthrough(demo, ids, layer=2, head=head)
    c = demo.config
    θ = ops.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling, np.float32)
    for j, shown, turn, angle in (row for row in step_of(steps, "RoPE: a speed").tables[0].rows if row[0] != "…"):
        assert shown == θ[j]
        assert turn * shown == pytest.approx(2 * math.pi)
        assert angle == pytest.approx((len(ids) - 1) * θ[j])
    pair = step_of(steps, "RoPE: one pair").tables[0].rows
    for row, what, n in ((0, "q", head), (1, "q_rope", head), (2, "k", group), (3, "k_rope", group)):
        assert list(pair[row][1:3]) == seen[f"layers.2.attention.{what}"][-1, n, 2:4].tolist()
    assert pair[0][3] == pytest.approx(pair[1][3]) != pytest.approx(pair[2][3])  # a rotation keeps lengths
    turned = pair[1][4] - pair[0][4] - (len(ids) - 1) * θ[1]
    assert math.remainder(turned, 2 * math.pi) == pytest.approx(0, abs=1e-5)
    scores, masked = (step_of(steps, title).tables[0].rows for title in ("Scores", "The causal mask"))
    q, k = seen["layers.2.attention.q_rope"][:, head], seen["layers.2.attention.k_rope"][:, group]
    every = q @ k.T / math.sqrt(c.head_dim)
    assert len(ids) <= 5  # so that every token is shown
    np.testing.assert_allclose([row[1:] for row in scores], every, rtol=1e-4, atol=1e-6)
    for i, (row, masked_row) in enumerate(zip(scores, masked, strict=True)):
        for j, (score, masked_score) in enumerate(zip(row[1:], masked_row[1:], strict=True)):
            assert masked_score == (pytest.approx(score, rel=1e-5) if j <= i else -math.inf)


def test_a_replaced_activation_is_what_is_shown(demo):
    ids = demo.tokenizer.encode("ROMEO:", bos=True)

    def tap(name, x):
        return np.full_like(x, 0.125) if name == "layers.1.attention.heads" else x

    usual, changed = walkthrough(demo, ids, 1), walkthrough(demo, ids, 1, tap=tap)
    assert step_of(changed, "Values").tables[0].rows[-1][1:5] == (0.125,) * 4
    assert 0.125 not in step_of(usual, "Values").tables[0].rows[-1]
    assert step_of(changed, "Softmax") == step_of(usual, "Softmax")
    assert step_of(changed, "Probabilities") != step_of(usual, "Probabilities")
    assert changed[-1].called == usual[-1].called
    assert step_of(changed, "Values").called == step_of(usual, "Values").called  # the place is the model's, not the tap's


def test_layers_are_all_there_with_their_size(demo):
    ids = [2000, 5, 7]
    seen = npllama.record(demo, ids)
    rows = step_of(walkthrough(demo, ids), "All the layers").tables[0].rows
    assert [row[0] for row in rows] == ["tok_embeddings", *(f"layers.{i}.out" for i in range(6))]
    for name, first, rms, mean in rows:
        assert first == seen[name][-1, 0]
        sizes = np.sqrt(np.mean(seen[name].astype(float) ** 2, axis=-1))
        assert (rms, mean) == (pytest.approx(sizes[-1]), pytest.approx(sizes.mean()))


def test_the_chosen_token_is_the_one_that_generation_takes(demo):
    ids = demo.tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me", bos=True)
    (made,) = npllama.generate(demo, ids, max_tokens=1)
    steps = walkthrough(demo, ids)
    assert steps[-1].tables[0].rows[0][0] == made == step_of(steps, "Probabilities").tables[0].rows[0][0]


# ------------------------------------------------------------------------------------------------------------- where it is from


def definitions(file: str) -> dict[str, int]:
    """Map each qualified name to the line of its `def`, without importing the module."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")), "")
    return found


def check_source(source: Source) -> None:
    module, _, name = source.name.partition(".")
    assert source.file in files(module)
    assert definitions(source.file)[name] == source.line, source


def files(module: str) -> list[str]:
    """List the package's files that are the source of a module of this name."""
    return [path.relative_to(ROOT).as_posix() for path in (ROOT / "npllama").rglob(f"{module}.py")]


def test_sources_point_at_the_functions(demo):
    steps = walkthrough(demo, [2000, 5, 7], layer=1)
    for step in steps:
        assert step.sources
        for source in step.sources:
            check_source(source)
    named = {source.name for step in steps for source in step.sources}
    public = {f"ops.{name}" for name in definitions("npllama/ops.py")}
    assert public <= named, "a formula of ops.py is in no step"
    assert {source.file for step in steps for source in step.sources if source.name.startswith("linear.")} == {
        "npllama/engine/linear.py"
    }


def test_the_line_is_the_one_that_calls_the_function(demo):
    lines = (lesson.ROOT / "npllama" / "model.py").read_text(encoding="utf-8").splitlines()
    found = set()
    for step in walkthrough(demo, [2000, 5, 7], layer=1):
        if not step.called:
            continue
        assert step.called.file == "npllama/model.py"
        line = lines[step.called.line - 1]
        function = step.sources[0].name.rpartition(".")[2]
        if step.title == "All the layers":
            assert line.strip().startswith("x = block("), line
        elif step.title.startswith("Back to"):  # the feed-forward is called through a name of its own
            assert 's.see("out"' in line, line
        elif step.title not in ("Scores", "The causal mask", "RoPE: a speed for each pair"):
            assert re.search(rf"\b{function}\(", line), (step.title, line)
            found.add(function)
            if function != "linears":
                suffix = step.taps[0].rpartition(".")[2]
                assert f's.see("{suffix}"' in line, (step.title, line)
    assert {"linears", "linear", "embed", "rms_norm", "split_heads", "rope", "join_heads"} <= found


def test_the_syntax_tree_has_the_lines_that_a_pass_comes_by(demo):
    """Compare each activation's line with the frame of the running pass."""
    passed = {}

    def tap(name, x):
        frame = inspect.currentframe().f_back.f_back  # above Scope.see()
        passed[name.removeprefix("layers.0.")] = (f"model.{frame.f_code.co_name}", frame.f_lineno)
        return x

    forward(demo.params, dataclasses.replace(demo.config, n_layers=1), [2000, 5], tap=tap)
    found = lesson.computed_at()
    assert {name: (source.name, source.line) for name, source in found.items()} == passed
    for name, source in found.items():
        assert f's.see("{name.rpartition(".")[2]}"' in source.text


def test_a_call_is_looked_for_in_its_function_alone_and_not_below():
    def calls(line, function):
        return Source("model.x", "npllama/model.py", line).calling(function).line

    lines = (ROOT / "npllama" / "model.py").read_text(encoding="utf-8").splitlines()
    first, second = (i for i, line in enumerate(lines, start=1) if "ops.linears(" in line)
    assert calls(second + 1, npllama.engine.linear.linears) == second
    assert calls(second, npllama.engine.linear.linears) == second
    assert calls(second - 1, npllama.engine.linear.linears) == second - 1  # the first is in another function
    assert calls(first + 5, npllama.engine.linear.linears) == first
    assert calls(first + 5, npllama.engine.linear.embed) == first + 5


def test_each_step_has_few_words(demo):
    """Check that a step has one sentence, or up to three short ones."""
    for layer, tokens in ((0, [2000]), (1, [2000, 5, 7])):
        for step in walkthrough(demo, tokens, layer=layer):
            assert step.sentence.endswith("."), step.sentence
            assert len(step.sentence) <= 280, step.sentence
            *before, _ = sentences = re.split(r"(?<=\.) (?=[A-Z])", step.sentence)
            assert len(sentences) <= 3, step.sentence
            assert not before or max(map(len, sentences)) <= 130, step.sentence


def test_one_token_that_is_much_larger_than_the_others_is_named(demo):
    """Explain the column of means, a riddle otherwise; SmolLM2's first token is such a token."""
    ids = demo.tokenizer.encode("First Citizen:\nBefore", bos=True)

    def sentence(which: int, factor: float) -> str:
        def tap(name, x):
            if name == "layers.2.out":
                x = x.copy()
                x[which] *= factor
            return x

        return step_of(walkthrough(demo, ids, tap=tap), "All the layers").sentence

    usual = step_of(walkthrough(demo, ids), "All the layers").sentence
    assert usual.endswith("mostly grows.")
    assert sentence(0, 2) == sentence(len(ids) - 1, 1000) == usual  # the last token's own size is in the table
    size = 1000 * np.sqrt(np.mean(np.square(npllama.record(demo, ids)["layers.2.out"][0])))
    assert f"because of one, the first, '<|begin_o…': after layers.2.out its own is {size:.0f}." in sentence(0, 1000)
    assert "because of one, position 2, " in sentence(2, 1000)


# -------------------------------------------------------------------------------------------------------------- models and text


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_model(name):
    """Cover grouped queries and none, tied and untied, scaled RoPE, odd widths, no tokenizer, one token and many."""
    model = tiny_model(name)
    config = model.config
    for tokens in ([3], [3, 1], list(range(40))):
        steps = walkthrough(model, tokens, config.n_layers - 1, config.n_heads - 1)
        assert len(steps) == N_STEPS
        text = lesson.text(steps)
        assert f"[{len(tokens)}, {config.vocab_size}]" in text
        assert max(map(cell_width, text.splitlines())) <= 80
    sharing = next(step for step in steps if step.title == "Heads").sentence
    if config.n_heads == config.n_kv_heads:
        assert "of its own" in sharing
    else:
        assert f"= {config.n_kv_heads - 1}." in sharing
    assert ("(tied)" in step_of(steps, "Logits").sentence) == config.tied_embeddings
    assert "output.weight" in step_of(steps, "Logits").given or config.tied_embeddings


@pytest.mark.parametrize("dtype", ["stored", "float64"])
def test_packed_and_float64_models(demo, dtype):
    """Show the float32 model's numbers for bfloat16 weights, which widen exactly; float64 shows its own."""
    ids = [2000, 5, 7]
    expected, found = walkthrough(demo, ids, 3, 2), walkthrough(npllama.load(dtype=dtype), ids, 3, 2)
    for a, b in zip(expected, found, strict=True):
        assert a.title == b.title
        np.testing.assert_allclose(floats(b), floats(a), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\n   \n", "你好，世界！今日は。", "🦙🦙", "a" * 300, "क्षि é́", "| `x` <b> *y* _z_ [1](2) # ~"],
    ids=repr,
)
def test_any_text_fits_eighty_columns(demo, text):
    ids = demo.tokenizer.encode(text, bos=True)
    steps = walkthrough(demo, ids, 5, 5)
    shown = lesson.text(steps)
    assert "\033" not in shown
    for line in shown.splitlines():
        assert cell_width(line) <= 80, line
        assert line.rstrip() == line
    for i, step in enumerate(steps, start=1):
        assert f"{i:>2}  {step.title}" in shown


def test_wide_characters_are_aligned():
    table = Table(("piece", "x"), (("'你好'", 1.0), ("'ab'", 2.0)))
    assert [cell_width(line) for line in lesson.table_text(table)] == [14, 14, 14]
    assert lesson.label("你" * 20) == "'你你你你…'"
    assert lesson.label("'s") == '"\'s"'
    assert [lesson.number(x) for x in (0.0, -math.inf, 1.0, -0.00001, 123456.0, 0.5)] == [
        "0",
        "-inf",
        "1.0000",
        "-1.0e-05",
        "1.2e+05",
        "0.5000",
    ]


def test_markdown_has_every_cell_and_nothing_that_breaks_a_table(demo):
    steps = walkthrough(demo, demo.tokenizer.encode("| `x` <b> *y*", bos=True))
    page = lesson.markdown(steps, link=lambda source: f"../{source.file}#L{source.line}")
    assert page.count("### ") == N_STEPS
    rows = [line for line in page.splitlines() if line.startswith("|")]
    tables = [table for step in steps for table in step.tables]
    assert len(rows) == sum(2 + len(table.rows) for table in tables)
    widths = [len(table.columns) for table in tables for _ in range(2 + len(table.rows))]
    assert [row.count("|") - 1 for row in rows] == widths
    assert "<" not in "".join(rows)
    assert f"(../npllama/ops.py#L{definitions('npllama/ops.py')['rms_norm']})" in page


def test_formulas_are_typeset_in_markdown_and_plain_in_the_terminal(demo):
    steps = walkthrough(demo, [2000, 5, 7])
    page, shown = lesson.markdown(steps), " ".join(lesson.text(steps).split())
    assert "$$" not in shown
    blocks = re.findall(r"^\$\$\n(.+)\n\$\$$", page, re.MULTILINE)
    assert blocks == [tex for step in steps for tex in step.tex]
    assert page.count("$") == 4 * len(blocks)
    assert "| gate&nbsp;=&nbsp;w1&nbsp;x |" in page  # a label of a wide table doesn't wrap
    for step in steps:
        assert bool(step.tex) != ("(" in step.formula and step.title in ("Tokens", "Heads", "All the layers")), step.title
        for line in (*step.formula.splitlines(), step.given):
            assert " ".join(line.split()) in shown
        section = page.partition(f"### {step.title}")[2].partition("### ")[0]
        assert ("- formula: `" in section) == (bool(step.formula) and not step.tex), step.title
        assert not step.given or f"- given: `{' '.join(step.given.split())}`" in section
    for row in table_of(demo.config):
        assert any(row.tex in tex for tex in blocks) or row.name == "attention.k_rope", row.name
        assert " ".join(row.formula.split()) in shown or row.name == "attention.k_rope", row.name


def test_the_formulas_of_a_step_s_own_are_tex(demo):
    mathtext = pytest.importorskip("matplotlib.mathtext", reason="matplotlib is not installed")
    for step in walkthrough(demo, [2000, 5, 7]):
        for tex in step.tex:
            mathtext.MathTextParser("path").parse(f"${tex}$")


def test_it_costs_no_more_memory_than_a_layer(demo):
    """Keep only `out` of the layers that are not shown."""
    seen = Pass(demo, [2000, 5], layer=2)
    others = {name for name in seen.taps if name.startswith("layers.") and not name.startswith("layers.2.")}
    assert others == {f"layers.{i}.out" for i in (0, 1, 3, 4, 5)}
    logits = forward(demo.params, demo.config, [2000, 5])
    np.testing.assert_array_equal(seen["logits"], logits)  # a tap changes nothing


# -------------------------------------------------------------------------------------------------------------- command line


def test_the_command(capsys):
    assert main(["walkthrough", "ROMEO:", "--layer", "2", "--head", "3"]) == 0
    out = capsys.readouterr().out
    model = npllama.load()
    assert out == lesson.text(walkthrough(model, model.tokenizer.encode("ROMEO:", bos=True), 2, 3))
    assert "layers.2.attention.q_rope" in out
    assert main(["walkthrough", "--tokens", "2000,5", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### Tokens")


def test_it_says_in_a_line_what_it_cannot_do(capsys):
    assert fails(capsys, "walkthrough", "x", "--layer", 6).endswith("layer 6 is not in this model, which has layers 0 to 5")
    assert fails(capsys, "walkthrough", "x", "--layer", -1).endswith("layer -1 is not in this model, which has layers 0 to 5")
    assert fails(capsys, "walkthrough", "x", "--head", 6).endswith("head 6 is not in this model, which has heads 0 to 5")
    assert "expected a prompt, or --tokens" in fails(capsys, "walkthrough")
    assert "expected a prompt, or --tokens" in fails(capsys, "walkthrough", "x", "--tokens", "1")
    assert "outside the vocabulary" in fails(capsys, "walkthrough", "--tokens", "5000")
    assert "do not fit the model's context" in fails(capsys, "walkthrough", "--tokens", ",".join(["1"] * 513))
    assert "--tokenizer" in fails(capsys, "walkthrough", "x", "--compare", "y")
    assert "takes a text" in fails(capsys, "walkthrough", "--tokenizer", "--tokens", "1")
    for option in ("--layer", "--head"):
        assert "--tokenizer shows no forward pass" in fails(capsys, "walkthrough", "x", "--tokenizer", option, 0)


def test_a_model_without_a_tokenizer_takes_ids(tmp_path, capsys):
    config = dataclasses.replace(CONFIGS["grouped"], n_layers=1)
    with checkpoint.create(tmp_path / "bare", config, "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(config, seed=1).items():
            writer.add(name, array)
    assert main(["walkthrough", "-m", str(tmp_path / "bare"), "--tokens", "1,2,3"]) == 0
    assert "came without a tokenizer" in " ".join(capsys.readouterr().out.split())
    assert "expected --tokens" in fails(capsys, "walkthrough", "-m", tmp_path / "bare", "text")


def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["walkthrough", "x"])
    assert "\033[1m" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    main(["walkthrough", "x"])
    assert "\033" not in capsys.readouterr().out


def test_a_terminal_that_knows_only_ascii():
    command = [sys.executable, "-m", "npllama", "walkthrough", "你好"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"The chosen token" in done.stdout


def test_a_real_model(smollm2, capsys):
    prompt = "the answer to the ultimate question of life, the universe, and everything is "
    assert main(["walkthrough", prompt, "-m", str(smollm2), "--layer", "29", "--head", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_width, lines)) <= 80
    assert any("query head 8 uses key/value head 8 // 3" in line for line in lines)
    assert "large because of one, the first, 'the': after layers." in " ".join(" ".join(lines).split())
