# %% [markdown]
# # 2. Attention
#
# [The first notebook](1-tokens.ipynb) ended with a problem: a vector that knows only its own token
# can only repeat that token. Something must carry information from earlier tokens to later ones.
# In a Llama exactly one operation does this: attention.
#
# ## The question
#
# How much does the model know if it sees only the last word? We ask for the token after "me": once
# with nothing before it, and once with the whole prompt.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama import model as code
from npllama import ops
from npllama.learn.course import BLUE, grade, heat_map, pictures, source, table
from npllama.learn.lens import token_labels
from npllama.sampling import log_probabilities

pictures()
model = npllama.load()
params, config = model.params, model.config


def best(tokens, n=4):
    """Return the n most likely next tokens and their probabilities."""
    p = ops.softmax(npllama.forward(params, config, tokens)[-1])
    return [(repr(model.tokenizer.piece(i)), p[i]) for i in np.argsort(-p)[:n]]


prompt = "First Citizen:\nBefore we proceed any further, hear me"
tokens = model.tokenizer.encode(prompt, bos=True)
alone = [tokens[0], tokens[-1]]  # BOS and " me"
rows = [(*a, *b) for a, b in zip(best(alone), best(tokens), strict=True)]
table(["only ' me'", "p", "whole prompt", "p"], rows)

# %% [markdown]
# With the whole prompt the answer is " speak": the words before made the difference. The vector of
# " me" has learned of them on its way through the layers.
#
# ## The residual stream
#
# The embedding gives a matrix `x [T, D]`: a row for each of the T tokens. Each layer computes
# something from x and **adds** it to x. Nothing is ever replaced, so this matrix is called the
# residual stream. In npllama's words:

# %%
source(code.block)

# %% [markdown]
# `s["..."]` is a weight, and `s.see("...", x)` passes an intermediate array to a recorder; you
# can read past it. `rms_norm` brings each row to the same size before it is used (notebook 5). What
# remains is two additions: attention, in which rows exchange information, and a feed-forward, which
# treats each row alone.
#
# ## An average with weights
#
# How can a row take information from other rows? The simplest way is an average. Attention is an
# **average with weights**, and the weights are computed from the rows themselves. A worked example
# with three tokens whose vectors have two numbers:

# %%
values = np.array([[4, 0], [0, 4], [2, 2]], np.float32)  # what each token has to tell
weights = np.array([0.75, 0.25, 0], np.float32)  # how much the last token listens to each
print(weights @ values, "= 0.75 * [4 0] + 0.25 * [0 4] + 0 * [2 2]")

# %% [markdown]
# So one product with the values does the averaging. The question is where the weights come from.
# They should be large for tokens that matter to this one, none negative, and sum to 1. You know a
# function for the last two: softmax. It needs a score for each token, and a score that says "these
# two vectors belong together" is a dot product.
#
# But what a token looks for is not what it is, and what it has to tell is something else again. So
# each token gets three vectors, by three matrix products:
#
# - the **query** $q = W_q x$: what this token looks for
# - the **key** $k = W_k x$: what this token can be found by
# - the **value** $v = W_v x$: what it passes on when it is found
#
# $$
# \text{scores}_{ts} = \frac{q_t \cdot k_s}{\sqrt{K}} \qquad
# \text{weights}_t = \text{softmax}(\text{scores}_t) \qquad
# \text{heads}_t = \sum_s \text{weights}_{ts} \, v_s
# $$

# %%
source(code.self_attention, code.attention)

# %% [markdown]
# Read it once from top to bottom: three products, RoPE (the third notebook), the cache (the
# fourth), attention, one more product. There is nothing else.
#
# Attention runs several times in parallel, each time in a **head** with K = 32 of the numbers.
# This model has H = 6 query heads.

# %%
seen = npllama.record(model, tokens)
layer = "layers.4.attention."
shapes = [
    (name, str(list(seen[layer + name].shape))) for name in ("q", "k", "v", "scores", "weights", "heads", "out")
]
table(["activation of layer 4", "shape"], shapes)

# %% [markdown]
# T is 17 here: 16 tokens of the prompt after BOS. The six numbers in `q` are heads; keys and
# values have only two, to which we will come.
#
# ## Scores, and the square root
#
# Why divide by $\sqrt K$? Take vectors of K random numbers of size 1. Their dot product is a sum
# of K terms with random signs, so its size grows like $\sqrt K$:

# %%
rng = np.random.default_rng(0)
for K in (4, 32, 128):
    a, b = rng.standard_normal((2, 10_000, K))
    products = (a * b).sum(-1)
    size = products.std()
    print(f"K = {K:3}: size of q·k {size:5.1f}   after dividing by sqrt(K) {size / K**0.5:.1f}")

# %% [markdown]
# Softmax turns a difference of 1 into a factor of 2.7, and a difference of 11 into a factor of
# 60,000. Without the root, almost all weight would go to a single token, just because vectors are
# long. See what it does to eight random scores:

# %%
scores = rng.standard_normal(8) * 128**0.5
figure, axes = plt.subplots(1, 2, sharey=True)
for ax, s, title in ((axes[0], scores, "unscaled"), (axes[1], scores / 128**0.5, "divided by sqrt(128)")):
    ax.bar(range(8), ops.softmax(s), color=BLUE)
    ax.set(title=title, xlabel="key position")
axes[0].set_ylabel("weight")
plt.show()

# %% [markdown]
# ## One key for several queries
#
# `q` has six heads and `k` two. Query heads 0, 1 and 2 share key head 0; 3, 4 and 5 share key
# head 1. This is *grouped-query attention*. It makes the keys and values three times smaller,
# which is what counts when many of them have to be kept (notebook 4). In code it is one reshape:
# the queries that share a key head are put below each other.

# %%
source(ops.query_key_products, ops.attention_scores)

# %% [markdown]
# ### Exercise: `attention_scores`
#
# `q [T, H, K]`, `keys [G, S, K]` and a mask that is added, `[1, T, S]`, give `[H, T, S]`. Query
# head h uses key head h // (H/G). Keep float32: `math.sqrt` does, `np.sqrt(64)` is a float64.


# %% tags=["exercise"]
def attention_scores(q, keys, mask):
    raise NotImplementedError


grade(attention_scores)

# %% tags=["answer"]
import math


def attention_scores(q, keys, mask):
    keys = np.repeat(keys, q.shape[1] // keys.shape[0], axis=0)  # [H, S, K]
    return np.einsum("thk,hsk->hts", q, keys) / math.sqrt(q.shape[-1]) + mask


# %% [markdown]
# `np.tile` in the place of `np.repeat` gives the right shape and the wrong heads: 0, 1, 0, 1,
# 0, 1. The grader knows this mistake.
#
# ## No looking ahead
#
# The model is trained to predict every token of a text at once: row t predicts token t + 1. If row
# t could attend to token t + 1, it would just copy the answer. So scores of later tokens are set
# to -inf, and softmax makes 0 of them.

# %%
mask = ops.causal_mask(np.arange(5), np.arange(5), np.float32)
print(mask[0])

# %% [markdown]
# Row 2 says: the token at position 2 may attend to positions 0, 1 and 2. The function compares
# positions, not indices. That way the same line also serves when only one new token is computed
# and the others come from a cache.

# %%
source(ops.causal_mask)

# %%
one_new = ops.causal_mask(np.array([5]), np.arange(6), np.float32)
other_order = ops.causal_mask(np.array([1]), np.array([2, 0, 1]), np.float32)
print("one new token at position 5, six slots:", one_new[0])
print("slots in another order:                ", other_order[0])

# %% [markdown]
# ### Exercise: `causal_mask`
#
# From `query_positions [T]` and `slot_positions [S]` make a float32 mask `[1, T, S]`: 0 where the
# slot's position is not after the query's, -inf elsewhere.


# %% tags=["exercise"]
def causal_mask(query_positions, slot_positions):
    raise NotImplementedError


grade(causal_mask)


# %% tags=["answer"]
def causal_mask(query_positions, slot_positions):
    visible = slot_positions[None, :] <= query_positions[:, None]
    return np.where(visible, np.float32(0), np.float32(-np.inf))[None]


# %% [markdown]
# A property is worth more than an example: **a later token changes nothing before it**. We
# exchange the last token of the prompt and compare all rows of the logits.

# %%
changed = [*tokens[:-1], tokens[-1] + 1]
before, after = (npllama.forward(params, config, ids) for ids in (tokens, changed))
print("rows that differ:", [t for t in range(len(tokens)) if not np.array_equal(before[t], after[t])])

# %% [markdown]
# Not "differ a little": the rows before are equal to the last bit. This property is what makes the
# cache of notebook 4 possible.
#
# ## Looking at weights
#
# Here are the weights of one head: each row is a query (a token that attends), each column a key
# (a token that is attended to). Rows sum to 1. Masked cells, whose weight is exactly 0, are grey.

# %%
labels = token_labels(model.tokenizer, tokens)
visible = np.tri(len(tokens), dtype=bool)
shown = np.where(visible, seen["layers.4.attention.weights"][2], np.nan)  # masked cells in grey
axes = heat_map(shown, labels, labels, title="weights of layer 4, head 2 (· is a space)", unit="weight")
axes.set(xlabel="key position", ylabel="query position")
plt.show()

# %% [markdown]
# The dark line next to the diagonal says that in this head a token attends to **the token just
# before it**, or, inside of a word of several tokens (" f", "ur", "ther"), to the end of the word
# before. Nobody programmed that. It is useful: to predict what follows, it helps to know which two
# words came last. Which heads do it? We measure the mean weight on the previous token for all 36
# heads.


# %%
def on_previous(weights):
    """Return the mean weight that each head puts on the previous token.    [H, T, S] -> [H]"""
    return np.array([np.diagonal(head, offset=-1).mean() for head in weights])


previous = np.stack([on_previous(seen[f"layers.{n}.attention.weights"]) for n in range(config.n_layers)])
layers, heads = [f"layer {n}" for n in range(config.n_layers)], [f"head {h}" for h in range(config.n_heads)]
heat_map(previous, layers, heads, title="mean weight on the previous token", unit="weight")
plt.show()

# %% [markdown]
# **Question.** Every head puts a tenth to three tenths of its weight on BOS, the first token, which
# tells it nothing. Why might that be useful?

# %%
on_first = np.stack([seen[f"layers.{n}.attention.weights"][:, 1:, 0].mean(-1) for n in range(config.n_layers)])
print("mean weight on BOS, head by head:")
print(on_first.round(2))

# %% [markdown] tags=["answer"]
# Weights must sum to 1, so a head can't attend to nothing. When it finds nothing that it looks
# for, its weight has to go somewhere, and BOS is always there. Its value is learned to do little
# harm. In large models this is so strong that removing the first tokens from the cache breaks the
# output ("attention sinks", Xiao et al. 2023).

# %% [markdown]
# ## The average
#
# The weights are used once: to average the values. It is one matrix product for each head.

# %%
source(ops.attention_heads)

# %% [markdown]
# ### Exercise: `attention_heads`
#
# `weights [H, T, S]` and `values [G, S, K]` give `[T, H, K]`. Mind the order of the axes in the
# result: tokens first.


# %% tags=["exercise"]
def attention_heads(weights, values):
    raise NotImplementedError


grade(attention_heads)


# %% tags=["answer"]
def attention_heads(weights, values):
    values = np.repeat(values, weights.shape[0] // values.shape[0], axis=0)  # [H, S, K]
    return np.einsum("hts,hsk->thk", weights, values)


# %% [markdown]
# ## Put together
#
# With the functions above, layer 4's attention is three lines. We take the model's own rotated
# queries and keys and compare with what it computed:

# %%
q, k, v = seen[layer + "q_rope"], seen[layer + "k_rope"].swapaxes(0, 1), seen[layer + "v"].swapaxes(0, 1)
positions = np.arange(len(tokens))
by_hand = ops.attention_heads(
    ops.softmax(ops.attention_scores(q, k, ops.causal_mask(positions, positions, q.dtype))), v
)
print("shape", by_hand.shape, " equal to the model's:", np.allclose(by_hand, seen[layer + "heads"], atol=1e-6))

# %% [markdown]
# ## What is a head worth?
#
# A picture shows where a head attends, not whether it matters. To find out, remove it: a *tap* can
# replace any activation while the model runs. We set one head's output to zero and measure how
# much worse the model predicts a passage.
#
# The measure is the **surprise**, minus the logarithm of the probability that the model gave to the
# token that came next, averaged over the text. With the natural logarithm its unit is the nat: 0 is
# certain, and guessing among all tokens is ln 2256 = 7.7. Mind the shift: row t of the logits
# predicts token t + 1. So the last row has nothing to be compared with, and the first token is
# predicted by no row.
#
# A worked example: the text has three tokens, and the model gave 0.5 to the second and 0.25 to the
# third. The surprises are 0.69 and 1.39, and their mean is 1.04.
#
# ### Exercise: `surprise`
#
# `logits [T, V]` and `ids [T]` give one number. Where a probability is too small for a float, its
# logarithm is still an ordinary number: take the logarithm of the softmax's formula on paper first.


# %% tags=["exercise"]
def surprise(logits, ids):
    raise NotImplementedError


grade(surprise)


# %% tags=["answer"]
def surprise(logits, ids):
    z = logits[:-1] - logits[:-1].max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]].mean()


# %% [markdown]
# ### Remove each head
#
# npllama's own logarithm of softmax is `log_probabilities`. Now remove each of the 36 heads in turn:

# %%
passage = (
    prompt
    + " speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved rather to die than to famish?\n"
)
ids = np.array(model.tokenizer.encode(passage, bos=True))


def mean_surprise(tap=None, ops=None):
    """Return the mean surprise at the tokens of the passage, in nats."""
    logits = npllama.forward(params, config, ids, tap=tap, ops=ops)
    return -log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()


def without(layer, head):
    """Return a tap that sets one head's output to zero."""

    def tap(name, x):
        if name != f"layers.{layer}.attention.heads":
            return x
        x = x.copy()
        x[:, head] = 0
        return x

    return tap


whole = mean_surprise()
loss = np.array(
    [[mean_surprise(without(n, h)) - whole for h in range(config.n_heads)] for n in range(config.n_layers)]
)
heat_map(loss, layers, heads, title=f"surprise added by removing a head (with all: {whole:.2f})", unit="nats")
plt.show()

# %% [markdown]
# Two heads stand out. One is the head of the picture above: without it the model is 0.1 nats
# worse. The other, layer 0's head 3, has a picture that says nothing special. Most others can be
# removed one at a time with hardly any effect. So when you read that "head 2 does X", do both:
# look, and remove.
#
# ## The other half of a layer
#
# After attention, each row goes through the **feed-forward** alone. It is three matrix products
# and holds most of the weights: two products to a larger width F = 512, one gates the other, and
# one product back.
#
# $$
# \text{feed-forward}(x) = W_2 \left( \text{silu}(W_1 x) \odot W_3 x \right)
# \qquad \text{silu}(z) = \frac{z}{1 + e^{-z}}
# $$
#
# `silu` is a soft switch. For large z it lets the number pass, for very negative z it gives
# nearly 0. A worked number: silu(1) = 1 / (1 + 0.368) = 0.731.

# %%
z = np.linspace(-6, 6, 200, dtype=np.float32)
figure, ax = plt.subplots()
ax.plot(z, ops.silu(z), color=BLUE, label="silu(z)")
ax.plot(z, np.maximum(z, 0), color="black", ls=":", label="max(z, 0)")
ax.set(xlabel="z", title="silu, and the hard switch max(z, 0)")
ax.legend(frameon=False)
plt.show()

# %%
source(ops.silu, ops.swiglu)

# %% [markdown]
# ### Exercise: `swiglu`
#
# Write silu(gate) · up. A gate may be 1000 or -1000; a warning about overflow is no problem, a
# wrong number is.


# %% tags=["exercise"]
def swiglu(gate, up):
    raise NotImplementedError


grade(swiglu)


# %% tags=["answer"]
def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


# %% [markdown]
# **Question.** How large is the surprise without any attention, and how large without any
# feed-forward? Guess before you run the cell.

# %%
no_attention = replace(code.PLAIN, attention=lambda q, keys, values, mask, s: np.zeros_like(q))
no_feed_forward = replace(code.PLAIN, feed_forward=lambda x, s: np.zeros_like(x))
rows = [
    ("both", whole),
    ("no attention", mean_surprise(ops=no_attention)),
    ("no feed-forward", mean_surprise(ops=no_feed_forward)),
]
table(["model", "surprise, nats"], [*rows, ("guessing", np.log(config.vocab_size))])

# %% [markdown]
# Without attention the model still knows which tokens are frequent after the present one, and
# loses 0.6 nats. Without feed-forwards it is worse than guessing: sure of itself, and wrong.
#
# ## What you have now
#
# - Attention averages values. The weights are the softmax of scaled dot products of queries with
#   keys.
# - The mask makes a row depend on itself and on earlier rows only, to the last bit.
# - Heads do it in parallel; in grouped-query attention several query heads share a key head.
# - A layer is attention plus a feed-forward, each added to the residual stream.
#
# One thing is still missing. The mask hides what is later, but among the earlier tokens nothing
# says which is *before* which: the dot product of a query and a key is the same wherever they
# stand. How can a head attend to the previous token, then? Next: [RoPE and long
# contexts](3-rope.ipynb).
