"""Make the walkthrough: docs/walkthrough.ipynb with its outputs, docs/walkthrough.md, and the pictures in docs/walkthrough/.

    pip install '.[notebook]' && python docs/make_walkthrough.py

The text and the code are below; the numbers are the outputs of running them. The comparison of Llama 3's tokenizer with
LLaMA 1 and 2's needs their files, which may not be in the repository: name them in NPLLAMA_LLAMA3_TOKENIZER and
NPLLAMA_LLAMA2_TOKENIZER.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat

import notebooks

FOLDER = Path(__file__).resolve().parent
NOTEBOOK, MARKDOWN, PICTURES = FOLDER / "walkthrough.ipynb", FOLDER / "walkthrough.md", FOLDER / "walkthrough"
SECONDS = 300  # the longest a cell may take
SVG = "image/svg+xml"

# The cells in their order: "# %% text" begins one of Markdown, "# %%" one of code.
CELLS = r'''
# %% text
# Llama, one step at a time

This page follows a prompt through a real Llama model, from its letters to the next word. The model is the small one
inside npllama: six layers, trained on Shakespeare. Its architecture is Llama 3's, so every step here is a step of Llama
3 8B, with smaller numbers. To run it yourself, `pip install '.[notebook]'` and open the notebook of this page,
[walkthrough.ipynb](walkthrough.ipynb), in Jupyter or an editor that runs notebooks.

Each table shows the numbers that the forward pass itself computed at that line of code, and each step ends with the
function and the line. A few numbers are not activations: scores before the mask, silu of the gate, lengths and sizes,
probabilities. They are computed from the activations with the model's own functions. The same lesson, for any model and
any prompt, is one command:

```console
$ npllama walkthrough "Before we proceed any further, hear me" --layer 3 --head 2
$ npllama walkthrough-tokenizer "the sentence of your choice"
```

# %%
import dataclasses
import os

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

import npllama
from npllama import ops
from npllama.learn import lesson
from npllama.learn.tokenizer_lesson import tokenizer_lesson
from npllama.learn.walkthrough import walkthrough
from npllama.model import PLAIN
from npllama.sampling import log_probabilities

model = npllama.load()
model.config

# %% text
`dim` is D, the width of everything that follows; `n_heads` is H, `n_kv_heads` G, `head_dim` K, `ffn_dim` F,
`vocab_size` V. T is the number of tokens. The whole page uses these letters, as the code does. In formulas, t counts
tokens, n keys, h query heads and j pairs; m is a token's position, and R = H/G query heads share a key/value head.

## 1. Text becomes numbers

A model computes with numbers. First the tokenizer encodes the text as a list of integers. Llama 3's does it in four
steps, and this sentence needs all of them.

# %%
def show(steps):
    """Format steps of a lesson, with links to the code."""
    return Markdown(lesson.markdown(steps, link=lambda source: f"../{source.file}#L{source.line}"))


show(tokenizer_lesson(model.tokenizer))

# %% text
The embedded model knows 2,000 pieces. The real Llama 3 knows 128,000, and LLaMA 1 and 2 know 32,000 of another kind.
Here is the same sentence through both. (Their files may not be redistributed: this cell reads them from the paths in two
environment variables.)

# %%
def tokenizer_at(variable):
    """Load the tokenizer of the file that an environment variable names, or return None."""
    try:
        return npllama.load_tokenizer(os.environ[variable])
    except KeyError:
        print(f"{variable} is not set: without it there is no comparison")
    except ValueError as error:  # sentencepiece isn't installed, or the file isn't there
        print(error)


llama3, llama2 = tokenizer_at("NPLLAMA_LLAMA3_TOKENIZER"), tokenizer_at("NPLLAMA_LLAMA2_TOKENIZER")
if llama3 and llama2:
    both = tokenizer_lesson(llama3, others=[llama2])
    comparison = show([both[4], both[-1]])  # the merges, and both side by side
else:
    comparison = None
comparison

# %% text
## 2. The prompt

Now a prompt. These are the first words of *Coriolanus*, which the model has read many times; the next one is "speak".

# %%
prompt = "First Citizen:\nBefore we proceed any further, hear me"
tokens = model.tokenizer.encode(prompt, bos=True)
steps = walkthrough(model, tokens, layer=0, head=0)
show(steps[0:2])

# %% text
The first token, BOS, is not in the text. It marks where a text begins, and every text of the training began with it.
Omitting it is a quiet mistake: everything runs, and in this small model only the first few words are predicted worse.

## 3. Attention, slowly

One layer does two things: attention, in which tokens attend to each other, and a feed-forward, which computes for each
token alone. Both read a normalized copy of the residual stream and add their result to the original.

# %%
show(steps[2:5])

# %% text
So far each token is computed alone, and no number depends on its position: exchange two tokens, and their rows are
exchanged likewise. Position enters in two places: RoPE, in the next two steps, and the causal mask after them.

# %%
show(steps[5:7])

# %% text
Rotation has a property worth checking once. A query at position 5 and a key at position 3 give the same product as the
same two at 105 and 103: only the distance counts.

# %%
seen = npllama.record(model, tokens)
q = seen["layers.0.attention.q"][16, :1].astype(np.float64)  # [1, K], not rotated yet
k = seen["layers.0.attention.k"][10, :1].astype(np.float64)
frequencies = ops.rope_frequencies(model.config.head_dim, model.config.rope_theta, None, np.float64)


def product(m, n):
    """Multiply the query at position m with the key at position n."""
    rotated = [ops.rope(x[None], *ops.rope_rotation(np.array([p]), frequencies)) for x, p in ((q, m), (k, n))]
    return float(np.vdot(*rotated))


for m, n in [(5, 3), (105, 103), (105, 3)]:
    print(f"query at {m:3}, key at {n:3}: {product(m, n):.12f}")

# %% text
Now each query is compared with each key.

# %%
show(steps[7:10])

# %% text
The mask is why one pass over a text predicts at all its positions at once: later tokens can't be seen. Change the last
token, and nothing before it changes, not by a bit:

# %%
changed = [*tokens[:-1], tokens[-1] + 1]
before = npllama.forward(model.params, model.config, tokens)
after = npllama.forward(model.params, model.config, changed)
print("rows of the logits that differ:", [t for t in range(len(tokens)) if not np.array_equal(before[t], after[t])])

# %%
show(steps[10:13])

# %% text
## 4. The feed-forward

Three quarters of a layer's weights are here, and each token is computed alone.

# %%
show(steps[13:16])

# %% text
## 5. All layers, and the next token

# %%
show(steps[16:21])

# %% text
This is the whole pass. Generating a text repeats it, once for each token.

## 6. Where tutorials go wrong

These four mistakes are common in tutorials and ports. None of them raises an error: the shapes fit, the program runs, and
the answer is words. Here each is made in the right model through its public interface: the parameters, the operations,
the configuration. To measure it, the model reads a passage from its training data, and we compute its surprise at each
token: minus the logarithm of the probability that it gave to the next token, in nats. 0 is certainty; guessing
among all 2,256 ids is ln 2256 = 7.7.

# %%
passage = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.

First Citizen:
First, you know Caius Marcius is chief enemy to the people.
"""
ids = model.tokenizer.encode(passage, bos=True)
params, config = model.params, model.config
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # distinct for colour-blind readers; lines differ in their dashes too
plt.rcParams.update({"axes.titlesize": "medium", "svg.fonttype": "none", "svg.hashsalt": "npllama"})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
set_matplotlib_formats("svg")
WIDTH = 4.8  # inches: a phone shows the letters in their size


def run(params=params, ops=PLAIN):
    """Compute the logits and every activation of a pass over the passage."""
    seen = npllama.Recording()
    return npllama.forward(params, config, ids, tap=seen, ops=ops), seen


def surprise(logits, ids=ids):
    """Compute minus the log-probability of each next token, in nats.    [T, V] -> [T - 1]"""
    return -log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]


def divergence(wrong):
    """Compute the KL divergence of the wrong probabilities from the right ones at each token, in nats.    [T]"""
    p, q = log_probabilities(right), log_probabilities(wrong)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def draw_divergence(ax, wrong):
    """Draw a bar for each token, with the mean surprise in the title."""
    ax.bar(np.arange(len(ids)), divergence(wrong), color=ORANGE, width=0.8)
    means = f"mean surprise {surprise(wrong).mean():.2f} nats instead of {surprise(right).mean():.2f}"
    ax.set(xlabel="position", ylabel="nats", title=f"KL divergence of the next token's probabilities\n{means}")


def draw_differences(ax, names, wrong_seen, title, prefix=""):
    """Draw a bar for each activation: how much the mistake changes it."""
    sizes = [difference(*(seen[prefix + name] for seen in (right_seen, wrong_seen))) for name in names]
    ax.barh(names[::-1], sizes[::-1], color=ORANGE)
    ax.set(xlabel="largest difference / largest number", title=title)


def difference(a, b):
    """Divide the largest difference by the largest number."""
    finite = np.isfinite(a)  # the mask's -inf is in both
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0) / np.max(np.abs(a[finite])))


right, right_seen = run()
print(f"{len(ids)} tokens, surprise {surprise(right).mean():.2f} nats on average")

# %% text
### Values taken from k

`k = x Wk` and `v = x Wv` are adjacent lines; one is copied, and a letter is not changed. wk and wv have the same shape, so
that no error is raised.

# %%
mistaken = dict(params)
for n in range(config.n_layers):
    mistaken[f"layers.{n}.attention.wv.weight"] = params[f"layers.{n}.attention.wk.weight"]
wrong, wrong_seen = run(mistaken)

figure, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), layout="constrained")
draw_divergence(top, wrong)
names = ["q", "k", "v", "q_rope", "k_rope", "scores", "weights", "heads", "out"]
title = "Difference of each activation in layer 0's attention"
draw_differences(bottom, names, wrong_seen, title, "layers.0.attention.")
plt.show()

# %% text
The attention maps of layer 0 are right: scores and weights have no difference at all, and these are what people plot. The
values that they average are wrong in every layer, and the model predicts little better than a guess.

### Layer 0's feed-forward in every layer

The loop runs over the layers, and one name in it has a fixed 0: `layers.0.feed_forward.w1.weight`.

# %%
mistaken = dict(params)
for n in range(config.n_layers):
    for w in ("w1", "w2", "w3"):
        mistaken[f"layers.{n}.feed_forward.{w}.weight"] = params[f"layers.0.feed_forward.{w}.weight"]
wrong, wrong_seen = run(mistaken)

figure, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 5), layout="constrained")
draw_divergence(top, wrong)
names = ["tok_embeddings", *(f"layers.{n}.out" for n in range(config.n_layers))]
draw_differences(bottom, names, wrong_seen, "Difference of the residual stream, layer by layer")
plt.show()

# %% text
A reader who follows a tutorial for one layer, and checks that layer, finds every number right: layer 0 does use layer 0's
weights. The mistake is in the loop, and the first number that shows it is in layer 1's feed-forward.

### Interleaved and half-split RoPE mixed

Code for Meta's checkpoints rotates adjacent pairs, `(x[0], x[1])`, `(x[2], x[3])`; Hugging Face's rotates `(x[0], x[K/2])`,
and stores wq and wk with their rows permuted to match. Both are right. Weights of one kind with the rotation of the
other are not.

# %%
def half_split(x, cos, sin):
    """Rotate pairs in Hugging Face's order of the rows."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


wrong, wrong_seen = run(ops=dataclasses.replace(PLAIN, rope=half_split))

figure, panels = plt.subplot_mosaic([["top", "top"], ["right", "half-split"]], figsize=(WIDTH, 5), layout="constrained")
draw_divergence(panels["top"], wrong)
layer, head, n = 4, 2, 24
for title, seen in (("right", right_seen), ("half-split", wrong_seen)):
    weights = seen[f"layers.{layer}.attention.weights"][head, :n, :n]
    image = panels[title].imshow(weights, cmap="cividis", vmin=0, vmax=0.6)
    panels[title].set(title=f"Weights of layer {layer},\nhead {head}: {title}", xlabel="key position")
panels["right"].set_ylabel("query position")
figure.colorbar(image, ax=[panels["right"], panels["half-split"]], shrink=0.8, label="weight")
plt.show()
print("position 0 is right to the last bit:", np.array_equal(right[0], wrong[0]))
print("KL divergence at positions 0 to 7, nats:", *(f"{x:.3f}" for x in divergence(wrong)[:8]))

# %% text
This is the mildest mistake of the four and the hardest to see. At position 0 nothing is rotated, so a test with a single
token passes. The text is made of words, even sensible ones. The maps show what is lost: this head attends to the token
just before, the bright line next to the diagonal, and with the mistake it doesn't.

### Positions past the trained length

The model was trained on texts of at most 512 tokens. Nothing in the mathematics depends on this number: raise
`max_seq_len`, and longer texts run. For a long text that the model predicts well we take one that it writes itself, from
at most 384 tokens at a time. Then it reads that text whole.

# %%
N, CHUNK, WINDOW = 1024, 128, 256
text = model.tokenizer.encode("CORIOLANUS:\n", bos=True)
while len(text) < N:
    text += npllama.generate(model, text[-WINDOW:], CHUNK, temperature=1.0, seed=len(text), stop_ids=[])
text = text[:N]


def read(rope_scaling, max_seq_len=N):
    """Compute the surprise at each token of the whole text in one pass."""
    longer = dataclasses.replace(config, max_seq_len=max_seq_len, rope_scaling=rope_scaling)
    return surprise(npllama.forward(params, longer, text), text)


windows = []  # the same, at most WINDOW + CHUNK tokens at a time
for end in range(CHUNK, N + 1, CHUNK):
    part = text[max(0, end - CHUNK - WINDOW) : end]
    windows.append(surprise(npllama.forward(params, config, part), part)[-CHUNK:])
windows = np.concatenate(windows)
whole, scaled = read(None), read(npllama.RopeScaling(2.0, 1.0, 4.0, 512))

figure, axis = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
for s, colour, dashes, name in (
    (windows, BLUE, "-", "windows of 384 tokens"),
    (whole, ORANGE, "--", "positions up to 1,023"),
    (scaled, GREEN, ":", "the same, RoPE scaled by 2 as in Llama 3.1"),
):
    mean, label = np.convolve(s, np.ones(64) / 64, mode="valid"), f"{name}: {s[512:].mean():.2f} past 512"
    axis.plot(np.arange(len(mean))[::4] + 64, mean[::4], colour, ls=dashes, lw=1.8, label=label)
axis.axvline(512, color="black", lw=0.8)
axis.annotate("trained up to here", (512, 0), (4, 4), xycoords=("data", "axes fraction"), textcoords="offset points")
axis.set(xlabel="position", ylabel="nats, mean of 64 tokens", title="Surprise at each token of a long text")
figure.legend(frameon=False, loc="outside lower center")
plt.show()

# %% text
Up to 512 the lines nearly coincide. Past it the text stays as easy as it was, and the model, although it has more context,
predicts it worse: its slow pairs are rotated to angles that never occurred in training. That no error is raised is the
danger; npllama refuses positions past `max_seq_len` for this reason. The third line is Llama 3.1's remedy: the slow pairs
are slowed down, so that their angles stay in the range of the training.

## 7. Next

- [Finding a bug in a port](finding-a-bug.md): the same for code that isn't yours, with the noise of rounding measured.
- The code itself: [npllama/model.py](../npllama/model.py) is the whole pass, [npllama/ops.py](../npllama/ops.py) the formulas.
- `npllama walkthrough "a prompt of yours" -m MODEL --layer 5 --head 3`: this page, for your model.
'''


def make_notebook() -> nbformat.NotebookNode:
    """Make the notebook without outputs."""
    made = []
    for cell in CELLS.strip().split("# %%")[1:]:
        is_text = cell.startswith(" text\n")
        source = cell.removeprefix(" text").strip()
        made.append(nbformat.v4.new_markdown_cell(source) if is_text else nbformat.v4.new_code_cell(source))
    return notebooks.new(made)


# Where the reader prefers dark colours, background and ink are exchanged; a program that ignores this shows white.
DARK = """<style>@media (prefers-color-scheme: dark) {
svg { fill: #e6e8ec }
[style*="fill: #ffffff"] { fill: #1c1f25 !important }
[style*="stroke: #000000"] { stroke: #e6e8ec !important }
}</style>"""


def for_light_and_dark(svg: str) -> str:
    """Remove the date from a picture of matplotlib's, and add its colours for readers who prefer dark."""
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}{DARK}{svg[start:]}".replace("\n", " ")  # one line, since nobody reads a diff of pictures


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run the notebook and keep its outputs. A cell that fails raises."""
    notebooks.run(notebook, FOLDER, SECONDS)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if SVG in output.get("data", {}):
                output["data"] = {SVG: for_light_and_dark(output["data"][SVG])}
    return notebook


def to_markdown(notebook: nbformat.NotebookNode) -> tuple[str, dict[str, bytes]]:
    """Format the notebook as Markdown, and return it with its pictures by name."""
    alt = "{heading}: its effect on the output"
    return notebooks.to_markdown("docs/make_walkthrough.py", notebook, f"{PICTURES.name}/picture", alt)


def main() -> None:
    """Run the notebook and write all files."""
    notebook = execute(make_notebook())
    nbformat.write(notebook, NOTEBOOK)
    page, pictures = to_markdown(notebook)
    MARKDOWN.write_text(page, encoding="utf-8")
    notebooks.replace_pictures(PICTURES, "picture-*", pictures)
    print(f"{NOTEBOOK}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
