"""Make the walkthrough: docs/walkthrough.ipynb with its outputs, docs/walkthrough.md, and its pictures in docs/walkthrough/.

    pip install '.[notebook]' && python docs/make_walkthrough.py

The text and the code are below; the numbers are what running them gives. The comparison of Llama 3's tokenizer with LLaMA 1 and
2's needs their files, which may not be in the repository: name them in NPLLAMA_LLAMA3_TOKENIZER and NPLLAMA_LLAMA2_TOKENIZER.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
NOTEBOOK, MARKDOWN, PICTURES = FOLDER / "walkthrough.ipynb", FOLDER / "walkthrough.md", FOLDER / "walkthrough"
SECONDS = 300  # the longest a cell may take

# The cells in their order: "# %% text" begins one of Markdown, "# %%" one of code.
CELLS = r'''
# %% text
# Llama, one step at a time

This page follows a prompt through a real Llama model, from its letters to the next word. The model is the small one
inside npllama: six layers that have read Shakespeare. It is built as Llama 3 is, so every step here is a step of Llama
3 8B, with smaller numbers. To run it yourself, `pip install '.[notebook]'` and open
the notebook beside this page, [walkthrough.ipynb](walkthrough.ipynb), in Jupyter or an editor that runs notebooks.

Each table shows what the forward pass itself had in its hands at that line of code, and each step ends with the function
and the line. A few numbers it never holds by themselves: scores before the mask, silu of the gate, lengths and sizes,
probabilities. These are computed from the others with the model's own functions. The same lesson, for any model and any
prompt, is one command:

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

import npllama
from npllama import lesson, ops
from npllama.model import PLAIN
from npllama.sampling import log_probabilities
from npllama.tokenizer_lesson import tokenizer_lesson
from npllama.walkthrough import walkthrough

model = npllama.load()
model.config

# %% text
`dim` is D, the width of everything that follows; `n_heads` is H, `n_kv_heads` G, `head_dim` K, `ffn_dim` F,
`vocab_size` V. T is the number of tokens. The whole page uses these letters, as the code does.

## 1. Text becomes numbers

A model can't read. Before it begins, the tokenizer turns the text into a list of whole numbers. Llama 3's does it in
four moves, and this sentence needs all of them.

# %%
def show(steps):
    """Steps of a lesson, with links to the code."""
    return Markdown(lesson.markdown(steps, link=lambda source: f"../{source.file}#L{source.line}"))


show(tokenizer_lesson(model.tokenizer))

# %% text
The embedded model knows 2,000 pieces. The real Llama 3 knows 128,000, and LLaMA 1 and 2 know 32,000 of another kind.
Here is the same sentence through both. (Their files are not ours to give away: this cell looks for them where two
environment variables say.)

# %%
def tokenizer_at(variable):
    """The tokenizer of the file that an environment variable names, or None."""
    try:
        return npllama.load_tokenizer(os.environ[variable])
    except KeyError:
        print(f"{variable} is not set: without it there is no comparison")
    except ValueError as error:  # sentencepiece isn't installed, or the file isn't there
        print(error)


llama3, llama2 = tokenizer_at("NPLLAMA_LLAMA3_TOKENIZER"), tokenizer_at("NPLLAMA_LLAMA2_TOKENIZER")
if llama3 and llama2:
    beside = tokenizer_lesson(llama3, beside=[llama2])
    comparison = show([beside[4], beside[-1]])  # the merges, and both side by side
else:
    comparison = None
comparison

# %% text
## 2. The prompt, and where it goes

Now a prompt. These are the first words of *Coriolanus*, which the model has read many times; the next one is "speak".

# %%
prompt = "First Citizen:\nBefore we proceed any further, hear me"
tokens = model.tokenizer.encode(prompt, bos=True)
steps = walkthrough(model, tokens, layer=0, head=0)
show(steps[0:2])

# %% text
The first token, BOS, is not in the text. It says "a text begins here", and it was there in every text of the training.
To leave it out is a quiet mistake: everything runs, and in this small model only the first few words are guessed worse.

## 3. Attention, slowly

One layer does two things: attention, in which tokens look at each other, and a feed-forward, in which each thinks for
itself. Both get a normed copy of the stream and add their result to the original.

# %%
show(steps[2:5])

# %% text
So far every token is alone, and no number depends on where it stands: exchange two tokens, and their rows are exchanged
as they are. Position enters in two places: RoPE, in the next two steps, and the causal mask after them.

# %%
show(steps[5:7])

# %% text
Turning has a property worth seeing once with your own eyes. A query at position 5 and a key at position 3 give the same
product as the same two at 105 and 103: what counts is the distance.

# %%
seen = npllama.record(model, tokens)
q = seen["layers.0.attention.q"][16, :1].astype(np.float64)  # [1, K], not turned yet
k = seen["layers.0.attention.k"][10, :1].astype(np.float64)
frequencies = ops.rope_frequencies(model.config.head_dim, model.config.rope_theta, None, np.float64)


def product(m, n):
    """The query at position m times the key at position n."""
    turned = [ops.rope(x[None], *ops.rope_rotation(np.array([p]), frequencies)) for x, p in ((q, m), (k, n))]
    return float(np.vdot(*turned))


for m, n in [(5, 3), (105, 103), (105, 3)]:
    print(f"query at {m:3}, key at {n:3}: {product(m, n):.12f}")

# %% text
Now the queries meet the keys.

# %%
show(steps[7:10])

# %% text
The mask is why one pass over a text can answer for all its positions at once: what comes later can't be seen. Change
the last token, and nothing before it moves, not by a bit:

# %%
changed = [*tokens[:-1], tokens[-1] + 1]
before = npllama.forward(model.params, model.config, tokens)
after = npllama.forward(model.params, model.config, changed)
print("rows of the logits that differ:", [t for t in range(len(tokens)) if not np.array_equal(before[t], after[t])])

# %%
show(steps[10:13])

# %% text
## 4. The feed-forward

Three quarters of a layer's weights are here, and no token sees another.

# %%
show(steps[13:16])

# %% text
## 5. The same again, and a word

# %%
show(steps[16:21])

# %% text
That is the whole of it. Generating a text is this, once for each token.

## 6. Where tutorials go wrong

These four mistakes are common in tutorials and ports. What they share is that nothing complains: the shapes fit, the
program runs, and the answer is words. Here each is planted in the right model from outside, through the same three
openings that anyone has: the parameters, the operations, the configuration. To see what it does, the model reads a
passage that it has learned, and we ask at each token how surprised it is: the surprise is minus the logarithm of the
probability that it gave to what really came, in nats. 0 is certainty; guessing among all 2,256 ids is ln 2256 = 7.7.

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
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # told apart by colour-blind people, and by their dashes
plt.rcParams.update({"figure.dpi": 100, "axes.titlesize": 9, "font.size": 9})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def run(params=params, ops=PLAIN):
    """The logits and every activation of a pass over the passage."""
    seen = npllama.Recording()
    return npllama.forward(params, config, ids, tap=seen, ops=ops), seen


def surprise(logits, ids=ids):
    """At each token but the last, in nats, by what came next.    [T, V] -> [T - 1]"""
    return -log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]


def divergence(wrong):
    """How far the mistaken probabilities are from the right ones at each token: KL divergence, in nats.    [T]"""
    p, q = log_probabilities(right), log_probabilities(wrong)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def draw_divergence(ax, wrong):
    """A bar for each token, and what the mistake costs."""
    ax.bar(np.arange(len(ids)), divergence(wrong), color=ORANGE, width=0.8)
    title = f"surprise: {surprise(right).mean():.2f} right, {surprise(wrong).mean():.2f} mistaken"
    ax.set(xlabel="position", ylabel="KL divergence, nats", title=title)


def difference(a, b):
    """The largest difference over the largest number."""
    finite = np.isfinite(a)  # the mask's -inf is in both
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0) / np.max(np.abs(a[finite])))


right, right_seen = run()
print(f"{len(ids)} tokens, surprise {surprise(right).mean():.2f} nats on average")

# %% text
### Values taken from k

`k = x Wk` and `v = x Wv` stand below each other, one line is copied, and a letter stays. With grouped queries wk and wv
have the same shape, so that nothing can notice.

# %%
mistaken = dict(params)
for n in range(config.n_layers):
    mistaken[f"layers.{n}.attention.wv.weight"] = params[f"layers.{n}.attention.wk.weight"]
wrong, wrong_seen = run(mistaken)

figure, (left, axis) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
draw_divergence(left, wrong)
names = ["q", "k", "v", "q_rope", "k_rope", "scores", "weights", "heads", "out"]
sizes = [difference(*(seen[f"layers.0.attention.{name}"] for seen in (right_seen, wrong_seen))) for name in names]
axis.barh(names[::-1], sizes[::-1], color=ORANGE, hatch="//", edgecolor="white")
axis.set(xlabel="relative difference", title="layer 0's attention: scores and weights are right")
plt.show()

# %% text
The attention maps of layer 0 are perfect: scores and weights have no difference at all, and these are what people look
at. What is handed over along those lines is wrong, in every layer, and the model ends little better than guessing.

### Layer 0's feed-forward in every layer

The loop runs over the layers, and one name in it kept its 0: `layers.0.feed_forward.w1.weight`.

# %%
mistaken = dict(params)
for n in range(config.n_layers):
    for w in ("w1", "w2", "w3"):
        mistaken[f"layers.{n}.feed_forward.{w}.weight"] = params[f"layers.0.feed_forward.{w}.weight"]
wrong, wrong_seen = run(mistaken)

figure, (left, axis) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
draw_divergence(left, wrong)
names = ["tok_embeddings", *(f"layers.{n}.out" for n in range(config.n_layers))]
sizes = [difference(right_seen[name], wrong_seen[name]) for name in names]
axis.barh(names[::-1], sizes[::-1], color=ORANGE, hatch="//", edgecolor="white")
axis.set(xlabel="relative difference", title="the residual stream, layer by layer")
plt.show()

# %% text
Whoever follows a tutorial for one layer and checks that layer finds every number right: layer 0 does use layer 0's
weights. The mistake is in the loop, and the first number that shows it is in layer 1's feed-forward.

### Interleaved and half-split RoPE mixed

Meta's checkpoints turn neighbours, `(x[0], x[1])`, `(x[2], x[3])`; Hugging Face's turn halves, `(x[0], x[K/2])`, and
store wq and wk with their rows permuted to match. Both are right. Weights of one kind with the rotation of the other
are not.

# %%
def half_split(x, cos, sin):
    """RoPE for Hugging Face's order of the rows."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


wrong, wrong_seen = run(ops=dataclasses.replace(PLAIN, rope=half_split))

figure, (left, one, two) = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=[4, 3, 3])
draw_divergence(left, wrong)
layer, head, n = 4, 2, 24
for axis, seen, title in ((one, right_seen, "right"), (two, wrong_seen, "half-split")):
    weights = seen[f"layers.{layer}.attention.weights"][head, :n, :n]
    image = axis.imshow(weights, cmap="cividis", vmin=0, vmax=0.6)
    axis.set(title=f"{title}: layer {layer}, head {head}", xlabel="looked at", ylabel="token" if axis is one else "")
figure.colorbar(image, ax=two, shrink=0.8, label="weight")
plt.show()
print("position 0 is right to the last bit:", np.array_equal(right[0], wrong[0]))
print("KL divergence at positions 0 to 7, nats:", *(f"{x:.3f}" for x in divergence(wrong)[:8]))

# %% text
This is the mildest mistake of the four and the hardest to see. At position 0 nothing turns, so a test with a single
token passes. Words come out, even sensible ones. The maps show what is lost: this head looks at the token just before,
the bright line beside the diagonal, and cannot find it any more.

### Positions past the trained length

The model was trained on texts of at most 512 tokens. Nothing in the code knows this number: raise `max_seq_len` and it
runs on. For a long text that the model understands we take one that it writes itself, seeing never more than 384
tokens. Then it reads that text whole.

# %%
N, CHUNK, WINDOW = 1024, 128, 256
text = model.tokenizer.encode("CORIOLANUS:\n", bos=True)
while len(text) < N:
    text += npllama.generate(model, text[-WINDOW:], CHUNK, temperature=1.0, seed=len(text), stop_ids=[])
text = text[:N]


def read(rope_scaling, max_seq_len=N):
    """The surprise at each token of the whole text in one pass."""
    longer = dataclasses.replace(config, max_seq_len=max_seq_len, rope_scaling=rope_scaling)
    return surprise(npllama.forward(params, longer, text), text)


windows = []  # the same, never more than WINDOW + CHUNK tokens at a time
for end in range(CHUNK, N + 1, CHUNK):
    part = text[max(0, end - CHUNK - WINDOW) : end]
    windows.append(surprise(npllama.forward(params, config, part), part)[-CHUNK:])
windows = np.concatenate(windows)
whole, scaled = read(None), read(npllama.RopeScaling(2.0, 1.0, 4.0, 512))

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for s, colour, dashes, name in (
    (windows, BLUE, "-", "read in windows of 384 tokens"),
    (whole, ORANGE, "--", "read whole, positions up to 1,023"),
    (scaled, GREEN, ":", "read whole, with Llama 3.1's RoPE scaling, factor 2"),
):
    mean = np.convolve(s, np.ones(64) / 64, mode="valid")
    axis.plot(np.arange(len(mean)) + 64, mean, colour, ls=dashes, lw=1.8, label=f"{name}: {s[512:].mean():.2f} past 512")
axis.axvline(512, color="black", lw=0.8)
axis.annotate("trained up to here", (512, 1), (4, 2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top")
axis.set(xlabel="position", ylabel="surprise, nats\n(mean of 64 tokens)")
axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% text
Up to 512 the lines are as good as one. Past it the text stays as easy as it was, and the model, which now has more to look back
on, reads it worse: its slow pairs have turned to angles that it never met in training. That no error is raised is the
danger; npllama refuses positions past `max_seq_len` for this reason. The third line is the cure that Llama 3.1 brought:
the slow pairs are slowed down, so that their angles stay in the range that was trained.

## 7. Go on

- [Finding a bug in a port](finding-a-bug.md): the same against code that isn't yours, with the noise of rounding measured.
- The code itself: [npllama/model.py](../npllama/model.py) is the whole pass, [npllama/ops.py](../npllama/ops.py) the formulas.
- `npllama walkthrough "a prompt of yours" -m MODEL --layer 5 --head 3`: this page, for your model.
'''


def make_notebook() -> nbformat.NotebookNode:
    """The notebook without outputs."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python"}
    for i, cell in enumerate(CELLS.strip().split("# %%")[1:]):
        is_text = cell.startswith(" text\n")
        source = cell.removeprefix(" text").strip()
        made = nbformat.v4.new_markdown_cell(source) if is_text else nbformat.v4.new_code_cell(source)
        made["id"] = f"cell-{i}"
        notebook.cells.append(made)
    return notebook


def smaller(png: str) -> str:
    """The picture, base64 before and after, in 256 colours: a fifth of the bytes, and nobody sees it."""
    from PIL import Image

    image, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what its cells give, and nothing of when they ran. A cell that fails raises."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": smaller(output["data"]["image/png"])}
    return notebook


def to_markdown(notebook: nbformat.NotebookNode) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by name."""
    parts, pictures = ["<!-- made by docs/make_walkthrough.py: edit that -->"], {}
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            heading = ([heading] + [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")])[-1]
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"picture-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{heading}: what it does to the output]({PICTURES.name}/{name})")
            elif "text/markdown" in data:
                parts.append(data["text/markdown"].strip())
            else:
                parts.append(f"```text\n{(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def main() -> None:
    """Run it and write all files."""
    notebook = execute(make_notebook())
    nbformat.write(notebook, NOTEBOOK)
    page, pictures = to_markdown(notebook)
    MARKDOWN.write_text(page, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for file in PICTURES.glob("picture-*.png"):
        file.unlink()
    for name, content in pictures.items():
        (PICTURES / name).write_bytes(content)
    print(f"{NOTEBOOK}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
