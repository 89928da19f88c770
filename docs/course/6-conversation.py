# %% [markdown]
# # 6. Finding a bug, and a conversation
#
# You have seen all parts of a Llama. Suppose now that you have written one yourself, in C, Rust or
# CUDA. It runs, and it writes words. Is it right? [Notebook 5](5-precision.ipynb) ended with a
# warning: a language model survives noise, and it survives many bugs as well. This notebook finds
# one. Then the pieces are put together, and we talk to the model.
#
# ## The question
#
# Here is a port with a single mistake, in one line. (`Port` makes it, under a name that is encoded
# so as not to give it away.) Does its text betray it?

# %%
import codecs
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama import ops, sampling
from npllama.cache import KVCache
from npllama.golden import compare
from npllama.golden.mistakes import Port
from npllama.learn.course import BLUE, GREEN, ORANGE, grade, pictures, table
from npllama.sampling import Sampling, log_probabilities, sample

pictures()
model = npllama.load()
params, config = model.params, model.config
suspect = Port(codecs.decode("ebcr_onpxjneqf", "rot13"))


def greedy(forward, text, n=24):
    """Continue a text with the most likely tokens."""
    ids = model.tokenizer.encode(text, bos=True)
    start = len(ids)
    for _ in range(n):
        ids.append(int(forward(params, config, ids)[-1].argmax()))
    return model.tokenizer.decode(ids[start:])


for name, forward in (("the original", npllama.forward), ("the port", suspect.forward)):
    print(f"--- {name}\n{greedy(forward, 'ROMEO:')}")

# %% [markdown]
# Both write English words, and both begin to repeat themselves, as small models do when they
# always take the most likely token. They differ, but two right programs can differ as well once
# two logits are close together. If you had only the port, you would probably blame the model.
#
# ## One number for a text
#
# The surprise is better than reading. It is the mean of minus the logarithm of the probability
# that the model gave to the token that came next, in nats.

# %%
passage = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
    "You are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n"
)
ids = np.array(model.tokenizer.encode(passage, bos=True))


def surprise(logits):
    """Return the mean surprise at the tokens of the passage, in nats."""
    return -log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()


right, wrong = npllama.Recording(), npllama.Recording()
npllama.forward(params, config, ids, tap=right)
suspect.forward(params, config, ids, tap=wrong)
table(
    ["program", "surprise, nats"],
    [("original", surprise(right["logits"])), ("port", surprise(wrong["logits"]))],
)

# %% [markdown]
# The port is worse, by 0.07 nats. Is that a bug? In [notebook 5](5-precision.ipynb) rounding
# everything to bfloat16 changed this number by 0.004, so it is. (Without the original to compare
# with, you wouldn't know.) But what is wrong, and where? A model has hundreds of intermediate
# arrays, and they all depend on each other. This is the rule of the search:
#
# > **Find the first activation that differs by more than rounding.** Its inputs are right and its
# > output is wrong, so the bug is in the operation between them.
#
# "First" is easy: the order of computation is known. "More than rounding" takes two ideas.
#
# ## How different is different?
#
# A difference of 0.001 is nothing for numbers around 100 and everything for numbers around 0.001.
# So errors are measured relative to the size of what is right:
#
# $$
# \text{error} = \sqrt{\frac{\sum (\text{candidate} - \text{reference})^2}{\sum \text{reference}^2}}
# $$
#
# A worked number: reference (3, 4), candidate (3, 4.5). The difference is (0, 0.5), its length
# 0.5, and the reference's length is 5: the error is 0.1.
#
# ### Exercise: `relative_error`
#
# Mind the scores: masked ones are -inf in both arrays, and -inf minus -inf is NaN. Leave out what
# is not finite in both.


# %% tags=["exercise"]
def relative_error(candidate, reference):
    raise NotImplementedError


grade(relative_error)


# %% tags=["answer"]
def relative_error(candidate, reference):
    both = np.isfinite(candidate) & np.isfinite(reference)
    difference = candidate[both] - reference[both]
    return np.sqrt(np.sum(difference**2) / np.sum(reference[both] ** 2))


# %% [markdown]
# Now compute it for all activations, in the order of computation. `npllama.golden.compare.judging`
# has the function.

# %%
from npllama.golden.compare.judging import relative_error as error_of

errors = {name: error_of(wrong[name].astype(np.float64), right[name].astype(np.float64)) for name in right}
figure, ax = plt.subplots()
ax.semilogy([max(error, 1e-9) for error in errors.values()], color=ORANGE, marker=".", ls="")
ax.set(xlabel="activations in the order of computation", ylabel="relative error (0 drawn at 10⁻⁹)")
ax.set_title("error of the port, activation by activation")
plt.show()

# %% [markdown]
# The picture has a cliff. At its left the error is exactly zero: this port is npllama except for one
# line, so it even rounds alike. A port in another language rounds differently, and there the left
# part is not zero but about 10⁻⁷. Then the cliff has to be told from ordinary rounding.
#
# ## The noise floor
#
# How much error does rounding alone make? Don't guess: **measure** it. Compute the same tokens in
# float64, where rounding is negligible, and in float32. The difference is what a right float32
# program may have. We do the same for the port.

# %%
from npllama.golden.precision import Precision

exact = npllama.Recording()
Precision("float64").forward(params, config, ids, tap=exact)
floor = {name: error_of(right[name].astype(np.float64), exact[name]) for name in exact}
found = {name: error_of(wrong[name].astype(np.float64), exact[name]) for name in exact}
figure, ax = plt.subplots()
ax.semilogy([max(error, 1e-9) for error in found.values()], color=ORANGE, marker=".", ls="", label="the port")
ax.semilogy(
    [max(error, 1e-9) for error in floor.values()],
    color=BLUE,
    marker=".",
    ls="",
    label="rounding: the noise floor",
)
ax.set(xlabel="activations in the order of computation", ylabel="relative error against float64")
ax.set_title("error of the port and of rounding alone")
ax.legend(frameon=False)
plt.show()
first = next(name for name in found if found[name] > 32 * floor[name] + 1e-12)
print("first activation above 32 times its noise floor:", first)

# %% [markdown]
# The factor of 32 is npllama's limit for float32: two right programs add up in different orders,
# and each order has its own errors. Against a bug it is generous and still strict: the bug stands
# two million times above the floor.
#
# **Question.** The first wrong activation is known. Which operation is between it and the ones
# before? Which lines of your program would you read now?

# %%
order = list(found)
at = order.index(first)


def shown(error):
    """Format an error; the digits of rounding differ from machine to machine."""
    return f"{error:.2f}" if error > 1e-5 else "below 0.000001"


rows = [(name, shown(found[name]), shown(floor[name])) for name in order[at - 4 : at + 2]]
table(["activation", "error", "noise floor"], rows)

# %% [markdown] tags=["answer"]
# The norm before attention, the queries, keys and values are right. The rotated queries are not.
# Only RoPE is between: its frequencies, its positions, or the rotation itself. Everything after it
# is wrong as well, but that says nothing: it was computed from wrong inputs.

# %% [markdown]
# ## Which mistake is it?
#
# The operation is found. Now look at the numbers: how does the wrong array differ? Take one head
# of one token, before and after.

# %%
t, h = 5, 0
before, good, bad = (x[t, h] for x in (right["layers.0.attention.q"], right[first], wrong[first]))
pairs = range(0, 6)
table(
    ["pair", "before", "right", "port"],
    [(j, *(f"({x[2 * j]:+.3f}, {x[2 * j + 1]:+.3f})" for x in (before, good, bad))) for j in pairs],
)

# %% [markdown]
# Use what you know. A rotation keeps the length of each pair. Does the port's? And by what angle
# did it rotate?


# %%
def angle(a, b, j):
    """Return the angle between pair j of a and of b, in radians, and the ratio of their lengths."""
    x, y = complex(*a[2 * j : 2 * j + 2]), complex(*b[2 * j : 2 * j + 2])
    return np.angle(y / x), abs(y / x)


frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, None, np.float64)
wrapped = [np.angle(np.exp(1j * t * f)) for f in frequencies]  # angles from -π to π
rows = [(j, wrapped[j], angle(before, good, j)[0], *angle(before, bad, j)) for j in pairs]
table(["pair", "t·θ_j expected", "right", "port", "port's length / right length"], rows)

# %% [markdown]
# **Question.** What did the port do?

# %% [markdown] tags=["answer"]
# The lengths are right: it is a rotation. The angles are right in size and have the wrong sign: it
# rotates backwards, with -sin for sin. Somebody wrote the minus into the second line of the
# formula instead of the first:
#
# y[2j] = x[2j]·cos + x[2j+1]·sin and y[2j+1] = -x[2j]·sin + x[2j+1]·cos.
#
# It is a hard bug to see. Position 0 is right, since sin 0 = 0; queries and keys are rotated
# alike, so that their products still depend on the distance only, with the wrong sign.

# %%
mistake = suspect.mistakes[0]
print(mistake.name, "-", mistake.sentence)

# %% [markdown]
# ## Let the tool do it
#
# All of this is one command, `npllama compare`. It takes two folders of activations, computes the
# noise floor, finds the first divergence, feeds each operation the *port's own* inputs to see
# whether it is wrong by itself, and tries over a hundred mistakes it knows. Here we call it from
# Python.

# %%
folder = Path(tempfile.mkdtemp())
npllama.write_trace(model, ids[:16], folder / "reference", precision=Precision("float64"))
npllama.write_trace(model, ids[:16], folder / "port", precision=suspect)
result = compare.compare(folder / "reference", folder / "port", model=model)
print("first divergence:", result.first.name)
print("hint:", result.hints[0])
print(
    "wrong by themselves:", ", ".join(sorted({name.split(".", 2)[-1] for name in result.wrong_by_themselves}))
)

# %% [markdown]
# [Finding a bug in a port](../finding-a-bug.md) does the same with a program in C, from the
# command line.
#
# ### A second port
#
# Now you. This port has another mistake. Find the first wrong activation with the cell below, form
# a suspicion, and check it before you open the answer.

# %%
second = Port(codecs.decode("xrlf_gvyrq", "rot13"))
traces = npllama.Recording()
second.forward(params, config, ids, tap=traces)
found = {name: error_of(traces[name].astype(np.float64), exact[name]) for name in exact}
first = next(name for name in found if found[name] > 32 * floor[name] + 1e-12)
print("surprise", f"{surprise(traces['logits']):.2f},", "first wrong activation:", first)
print("shapes alike:", traces[first].shape == right[first].shape)
for h in range(config.n_heads):
    error = error_of(traces[first][h].astype(np.float64), right[first][h].astype(np.float64))
    print(f"head {h}: error {error:.2f}")

# %% [markdown] tags=["answer"]
# Heads 1 and 4 are wrong, and the other four are right to the last bit. A wrong formula or a wrong
# scale would hit all heads, so it must be the pairing of heads. Query head h has to use key head h
# // 3, which is 0, 0, 0, 1, 1, 1. If it used h % 2, that is 0, 1, 0, 1, 0, 1, exactly heads 1 and
# 4 would get the wrong key head.
#
# So the keys are repeated by `np.tile` where `np.repeat` is meant. All shapes fit, and with as
# many key heads as query heads (Llama 2 7B) or with only one, the bug doesn't exist. Check it:
# `second.mistakes[0].sentence`.

# %% [markdown]
# A port that passes needs a test that stays: [`npllama conformance`](../conformance.md) is a suite
# of test vectors for any language, and [porting](../porting.md) shows how to record activations.
#
# ## From logits to a choice
#
# Now to the pleasant part. The model is right; let it speak. Each step needs a choice among 2,256
# logits. *Greedy*, always the most likely, is safe and soon repeats itself. Drawing by chance is
# livelier, and two settings tame it:
#
# - **temperature** divides the logits: below 1 the likely ones become likelier, above 1 all become
#   more alike
# - **top-p** keeps the most likely tokens that together have probability p, and never draws the
#   rest
#
# A worked example: probabilities 0.5, 0.3, 0.15 and 0.05 with top-p 0.8. The first two reach 0.8,
# so they stay and become 0.625 and 0.375.

# %%
logits = npllama.forward(params, config, model.tokenizer.encode("ROMEO:\nI", bos=True))[-1]
best = np.argsort(-logits)[:10]
figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.4), sharey=True)
for ax, (t, top_p) in zip(axes, ((0.5, 1.0), (1.0, 1.0), (1.0, 0.5)), strict=True):
    chances = sampling.probabilities(logits, Sampling(t, top_p=top_p))
    ax.barh([repr(model.tokenizer.piece(i)) for i in best], chances[best], color=BLUE)
    ax.set(title=f"temperature {t}, top-p {top_p}", xlim=(0, 0.3), xticks=(0, 0.1, 0.2), xlabel="probability")
    ax.title.set_fontsize(9)
axes[0].invert_yaxis()
figure.suptitle("the next token after 'I'")
plt.show()

# %% [markdown]
# ### Exercise: `probabilities`
#
# Temperature first, then top-p: keep the fewest most likely tokens that together *reach* top_p, at
# least one.


# %% tags=["exercise"]
def probabilities(logits, temperature, top_p):
    raise NotImplementedError


grade(probabilities)


# %% tags=["answer"]
def probabilities(logits, temperature, top_p):
    p = np.exp((logits - logits.max()) / temperature)
    p = p / p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # what the more likely ones have together
    p[order[before >= top_p]] = 0
    return p / p.sum()


# %% [markdown]
# How does one draw a token with given probabilities? Lay them end to end on a line from 0 to 1,
# throw a dart, and see which one it hits:

# %%
p = np.array([0.1, 0.2, 0.4, 0.3])
edges = np.concatenate([[0], np.cumsum(p)])
figure, ax = plt.subplots(figsize=(6.4, 1.5))
for i, colour in enumerate((BLUE, ORANGE, GREEN, "#777777")):
    ax.barh(0, p[i], left=edges[i], color=colour)
    ax.text(edges[i] + p[i] / 2, 0, f"token {i}", ha="center", va="center", color="white", fontsize=9)
ax.set(xlim=(0, 1), yticks=[], title="the probabilities, end to end")
ax.spines["left"].set_visible(False)
plt.show()

# %% [markdown]
# ### Exercise: `draw`
#
# Given probabilities and a number u from 0 to below 1, return the id that the dart hits. Can a
# token with probability 0 ever be hit by yours? Try u = 0.


# %% tags=["exercise"]
def draw(p, u):
    raise NotImplementedError


grade(draw)


# %% tags=["answer"]
def draw(p, u):
    return np.searchsorted(np.cumsum(p), u, side="right")


# %% [markdown]
# In floating point the sum may end a little below 1, and a dart just below 1 then hits nothing.
# npllama's `sample` therefore multiplies u by the sum.
#
# ## The loop
#
# Everything is there: tokens (notebook 1), a pass (2 and 3), a cache (4) and a draw. This loop
# writes text:


# %%
def write(text, n, settings, seed=0):
    """Continue a text by n tokens: prefill once, then one token at a time."""
    rng, cache = np.random.default_rng(seed), KVCache(config)
    ids = model.tokenizer.encode(text, bos=True)
    logits = npllama.forward(params, config, ids, cache, last_only=True)[-1]
    for _ in range(n):
        token = sample(logits, settings, rng)
        if token in model.tokenizer.stop_ids:
            break
        ids.append(token)
        logits = npllama.forward(params, config, [token], cache, last_only=True)[-1]
    return model.tokenizer.decode(ids[1:])


print(write("ROMEO:\n", 60, Sampling(0.8, top_p=0.95), seed=4))

# %% [markdown]
# `npllama.generate` is this loop with a few checks. Change the temperature to 0.2 and to 1.5, and
# see why 0.8 is a good value.
#
# ## A conversation is a text
#
# A chat model is no different machine. It continues a text, like every other. The text just looks
# like a dialogue, with special tokens that say who speaks. This is what a Llama 3 reads when you
# ask a question:

# %%
from npllama.chat import chat_format

messages = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": "Who are you?"},
]
prompt = chat_format(model, "llama3").prompt(messages)
print(prompt.text)
print(len(prompt.ids), "tokens")

# %% [markdown]
# The prompt ends where the answer has to begin: after the header that says "assistant". The model
# writes until it draws `<|eot_id|>`, "end of turn", and the program hands over to you. The next
# prompt is this one, plus the answer, plus your next question, and the cache keeps what is already
# computed.
#
# **Question.** A user writes `<|eot_id|>` in a message. What should happen, and what if the
# program just encodes the whole text at once?

# %% [markdown] tags=["answer"]
# It must stay text: eight ordinary tokens that spell it. Were it encoded as the special
# token, the user could end their own message and write the next one in the name of somebody else,
# "system" for example. So special tokens may only come from the format, never from a message.
# npllama encodes the parts separately, and its conformance suite has cases for it (level L8).

# %% [markdown]
# And now, a conversation.

# %%
talk = npllama.Conversation(model, max_tokens=40, seed=1)
for question in ("Who goes there?", "What news from the king?", "Farewell, good sir."):
    print("you  >", question)
    print("model>", talk.say(question).strip().replace("\n", "\n       "), "\n")

# %% [markdown]
# That is no clever answer. This model has 2.8 million numbers and has read only Shakespeare; it
# was never trained to answer anybody. It writes as it has learned to, in the same way as the large
# ones. For a model that answers, take one that was trained to; the code is the same, line for
# line:
#
# ```console
# $ pip install '.[convert]' && npllama fetch smollm2-135m
# $ npllama chat -m smollm2-135m
# ```
#
# ## What you have now
#
# You have written a linear layer, byte-pair encoding, softmax, attention with grouped heads and a
# mask, RoPE with its scaling, a cache, RMSNorm, SwiGLU, bfloat16 rounding, sampling, and a measure
# that finds a bug among a hundred activations. That is all of Llama. To keep your functions, put
# them into the files that `npllama exercise start` writes.
#
# Where to go on:
#
# - [A tour of the source](../reading.md): you can read `npllama/model.py` from top to bottom now.
# - Write a port in a language you like, and run [the conformance suite](../conformance.md) on it.
# - [From other tutorials](../tutorials.md): the same model as others explain it.
