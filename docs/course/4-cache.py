# %% [markdown]
# # 4. The cache and its cost
#
# A model predicts one token. To write a text, the token is added to the prompt, and the model is
# run again, and again. Done naively, that computes nearly everything many times over. This
# notebook removes the repetition, and then asks what the remedy costs: the cache is why long
# conversations need so much memory.
#
# ## The question
#
# The prompt has 100 tokens, and we want 100 more. How many token rows does the model compute if
# each step runs the whole text?
#
# 100 + 101 + 102 + ... + 199 = 14,950. And if each token were computed once? 199. **75 times
# less.** At a thousand tokens each it is 750 times less. Is that possible without changing a
# single number of the result?

# %%
import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama.cache import KVCache
from npllama.learn.course import BLUE, ORANGE, grade, pictures, source, table

pictures()
model = npllama.load()
params, config = model.params, model.config


def rows(prompt, new):
    """Return how many rows are computed without a cache and with one."""
    return sum(prompt + i for i in range(new)), prompt + new - 1


sizes = [(p, n, *rows(p, n)) for p, n in ((100, 100), (1000, 1000), (8000, 192))]
table(["prompt", "new tokens", "rows without cache", "rows with cache"], sizes)

# %% [markdown]
# ## What can change, and what can't
#
# [Notebook 2](2-attention.ipynb) showed the key: **later tokens change nothing before them**. So
# when a token is added, the rows of all earlier tokens are the same as in the pass before, in
# every layer. Let us check it for every activation of the model.

# %%
tokens = model.tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me speak", bos=True)
short, long = npllama.record(model, tokens[:-1]), npllama.record(model, tokens)
n = len(tokens) - 1
names = [name for name in long if not name.endswith(("scores", "weights"))]
print(
    len(names),
    "activations, largest change of an earlier row below 0.0001:",
    all(np.abs(long[name][:n] - short[name]).max() < 1e-4 for name in names),
)

# %% [markdown]
# So the old rows need not be computed again. But the *new* token's row needs something from them.
# What exactly?
#
# Look at the operations of a layer once more: norms, matrix products, SwiGLU and additions treat
# each row alone. Only attention mixes rows, and of an earlier token it takes two vectors: its
# **key** and its **value**.
#
# $$
# \text{heads}_t = \sum_{s \le t} \text{softmax}_s \left( \frac{q_t \cdot k_s}{\sqrt K} \right) v_s
# $$
#
# The earlier queries, scores and everything else are not used any more. So it is enough to keep
# keys and values. This is the **key/value cache**.
#
# **Question.** Keys are kept after RoPE has rotated them. Why is that possible, although the new
# token's position is different?

# %% [markdown] tags=["answer"]
# A key is rotated by the angle of its own position, which never changes. The query is rotated by
# the angle of its own. Their product depends on the difference (notebook 3). Were keys rotated
# relative to the query, all of them would have to be rotated again at each step.

# %% [markdown]
# ## The cache in npllama
#
# A cache is made for a model's constants and given to `forward`. First the prompt (*prefill*),
# then one token at a time (*decode*):

# %%
cache = KVCache(config)
first = npllama.forward(params, config, tokens[:-1], cache)
print("after the prompt:", cache.length, "slots;  logits", first.shape)
then = npllama.forward(params, config, tokens[-1:], cache)
print("after one more:  ", cache.length, "slots;  logits", then.shape)

whole = npllama.forward(params, config, tokens)
print("same logits as in one pass:", np.allclose(then[-1], whole[-1], atol=1e-4))

# %% [markdown]
# "Same within rounding", to be precise: BLAS adds up the numbers in another order when it has one
# row instead of eighteen. [Notebook 5](5-precision.ipynb) is about that.
#
# Any division into passes gives the same result: all at once, one by one, or in chunks. That is a
# good property to test, because a cache has several ways to be wrong: an empty slot, a slot
# written twice, positions that start again at 0.


# %%
def in_chunks(size):
    """Return the last logits when the tokens come in chunks."""
    cache = KVCache(config)
    for start in range(0, len(tokens), size):
        logits = npllama.forward(params, config, tokens[start : start + size], cache)
    return logits[-1]


print({size: bool(np.allclose(in_chunks(size), whole[-1], atol=1e-4)) for size in (1, 2, 3, 5, 100)})

# %% [markdown]
# What does the cache do in each layer? `update` takes the new keys and values and returns those of
# all tokens so far. This is the method that writes:

# %%
source(KVCache.update, KVCache._write)

# %% [markdown]
# The store grows by doubling, like a Python list: growing by one slot at each token would copy
# everything every time.
#
# ### Exercise: `cache_update`
#
# Here the store is given: `[G, C, K]`, of which the first `length` slots are in use. `k` is `[T,
# G, K]`, tokens first, heads second. Write the new keys into the next T slots and return all keys
# so far, `[G, length + T, K]`. Heads come first in the store so that one head's keys lie together
# in memory.


# %% tags=["exercise"]
def cache_update(store, length, k):
    raise NotImplementedError


grade(cache_update)


# %% tags=["answer"]
def cache_update(store, length, k):
    end = length + len(k)
    store[:, length:end] = k.swapaxes(0, 1)
    return store[:, :end]


# %% [markdown]
# `k.reshape(G, T, K)` in the place of `swapaxes` has the right shape, too, and mixes heads with
# tokens. For a single new token both are the same, so a test with one token at a time doesn't see
# it.
#
# ## What it costs in memory
#
# For each token, each layer keeps a key and a value for each key/value head, of K numbers each. A
# worked example, Llama 3 8B: 32 layers, 8 key/value heads of 128 numbers, 2 bytes each:
#
# $$
# 2 \cdot 32 \cdot 8 \cdot 128 \cdot 2 \text{ bytes} = 131{,}072 \text{ bytes} = 128 \text{ KiB for one token}
# $$
#
# With the full context of 8,192 tokens it is 1 GiB, for one conversation.
#
# ### Exercise: `cache_bytes`
#
# Write the general formula.


# %% tags=["exercise"]
def cache_bytes(n_layers, n_heads, n_kv_heads, head_dim, n_tokens, n_bytes):
    raise NotImplementedError


grade(cache_bytes)


# %% tags=["answer"]
def cache_bytes(n_layers, n_heads, n_kv_heads, head_dim, n_tokens, n_bytes):
    return 2 * n_layers * n_kv_heads * head_dim * n_tokens * n_bytes


# %% [markdown]
# Compare with what the embedded model's cache really holds after our 18 tokens (in float32, 4
# bytes each):

# %%
memory, *_ = cache.view
held = sum(array[..., : cache.length, :].nbytes for array in (*memory.keys, *memory.values))
formula = 2 * config.n_layers * config.n_kv_heads * config.head_dim * cache.length * 4
print(f"{held:,} bytes held, {formula:,} by the formula")

# %% [markdown]
# Now the published models. Llama 2 7B has a key/value head for each of its 32 query heads; Llama 3
# 8B shares each among four.

# %%
published = {  # layers, query heads, key/value heads, head_dim, parameters in billions
    "Llama 2 7B": (32, 32, 32, 128, 6.7),
    "Llama 3 8B": (32, 32, 8, 128, 8.0),
    "Llama 3 70B": (80, 64, 8, 128, 70.6),
    "Llama 3.1 405B": (126, 128, 8, 128, 405.9),
}
lines = []
for name, (layers, _, kv_heads, head_dim, billions) in published.items():
    per_token = 2 * layers * kv_heads * head_dim * 2
    sizes = per_token / 2**10, per_token * 8192 / 2**30, per_token * 131072 / 2**30, billions * 2
    lines.append((name, *(f"{size:.1f}" for size in sizes)))
table(["model", "KiB per token", "GiB at 8,192", "GiB at 131,072", "weights, GB"], lines)

# %%
n_tokens = np.arange(0, 131073, 1024)
figure, ax = plt.subplots()
for (name, (layers, _, kv_heads, head_dim, billions)), colour in zip(
    list(published.items())[:2], (ORANGE, BLUE), strict=True
):
    ax.plot(
        n_tokens, 2 * layers * kv_heads * head_dim * 2 * n_tokens / 1e9, color=colour, label=f"{name}: cache"
    )
    ax.axhline(billions * 2, color=colour, ls=":", label=f"{name}: weights")
ax.set(xlabel="tokens in the context", ylabel="GB in 16 bits", title="memory of the cache and of the weights")
ax.xaxis.set_major_formatter("{x:,.0f}")
ax.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# With one head for each query, the cache of a long context is several times as large as the model
# itself. This is the reason for grouped-query attention: quality falls little, and the cache
# shrinks by H/G.
#
# **Question.** A server with 80 GB has Llama 3 8B (16 GB) in memory. How many conversations of
# 8,192 tokens fit? How many would fit with Llama 2's 32 key/value heads?

# %% [markdown] tags=["answer"]
# 64 GB are left. At 1.07 GB each: 59 conversations. With four times the heads each takes 4.3 GB:
# 14 conversations. The cache, not the weights, decides how many people a server can talk to.

# %% [markdown]
# ## What it costs in time
#
# With a cache, one new token takes one row through all layers. How long is that? There are two
# limits.
#
# **Arithmetic.** Each weight is multiplied once and added once: 2 operations for each parameter.
# For 8 billion parameters, 16 GFLOP. A laptop that computes 200 GFLOP/s needs 0.08 s.
#
# **Memory.** Each weight must come from memory once. In 16 bits that is 16 GB; at 40 GB/s it takes
# **0.4 s**. The processor waits for memory most of the time.

# %%
bandwidth, arithmetic = 40e9, 200e9  # bytes and operations per second: a laptop
speeds = []
for name, (*_, billions) in published.items():
    parameters = billions * 1e9
    by_memory, by_arithmetic = parameters * 2 / bandwidth, parameters * 2 / arithmetic
    speeds.append(
        (name, f"{by_memory:.2f}", f"{by_arithmetic:.2f}", f"{1 / max(by_memory, by_arithmetic):.2f}")
    )
table(["model", "s per token, memory", "s per token, arithmetic", "tokens per second at most"], speeds)

# %% [markdown]
# So decoding is *memory-bound*, and its speed can be predicted with a division: bandwidth over
# bytes. It also explains why storing weights in 8 or 4 bits makes a model faster, although the
# arithmetic becomes more.
#
# A prompt is different. Its 512 rows go through the same weights together, so the weights are read
# once for all of them:

# %%
T = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
by_memory, by_arithmetic = np.full(len(T), 16e9 / bandwidth), T * 16e9 / arithmetic
figure, ax = plt.subplots()
ax.loglog(T, by_memory / T, color=BLUE, marker=".", label="reading the weights, shared by T rows")
ax.loglog(T, by_arithmetic / T, color=ORANGE, ls="--", label="arithmetic")
ax.set(xlabel="rows T in one pass", ylabel="seconds per token", title="time limits of Llama 3 8B on a laptop")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# Left of the crossing, more rows in a pass cost nothing. Everything that makes generation fast
# uses this: a **prompt** is computed in one pass, a server computes many conversations as one
# **batch**, and prompt lookup **checks several guesses at once**. The last one deserves a closer
# look.
#
# **Question.** What else must be read for each token, other than the weights, and when does it become
# the larger part?

# %% [markdown] tags=["answer"]
# The cache. Each new token reads the keys and values of all earlier ones. For Llama 3 8B this is
# 128 KiB for each token in the context: at 8,192 tokens 1 GiB, against 16 GB of weights. At
# 131,072 tokens it is 17 GB, and the cache is the larger part. In a batch the weights are shared,
# the caches are not: with 15 conversations of 8,192 tokens both are equal, 16 GB.

# %% [markdown]
# ## Guess and check
#
# Suppose somebody guesses the next four tokens. Checking the guess takes *one* pass: run all four,
# and look whether the model would have chosen each of them itself. As far as it would, four tokens
# have been made for the price of one. If not, the cache is cut back to the last right one:

# %%
cache = KVCache(config)
before = npllama.forward(params, config, tokens, cache)[-1:]
guess = model.tokenizer.encode(".\n\nAll the")  # after "hear me speak"
after = npllama.forward(params, config, guess, cache)  # one pass checks all of them
chosen = np.concatenate([before, after]).argmax(-1)  # the model's choice at each place
for token, choice in zip(guess, chosen, strict=False):
    guessed, said = (f"'{model.tokenizer.piece(int(id))}'" for id in (token, choice))
    print(f"guess {guessed:8} the model says {said:9} {'ok' if guessed == said else 'no'}")
right = int(np.cumprod(chosen[:-1] == guess).sum())
cache.truncate(len(tokens) + right)
print(f"{right} guesses are right; {cache.length} slots are kept, and the next token is {chosen[right]}")

# %% [markdown]
# Where do guesses come from? *Prompt lookup* (Saxena 2023) takes them from the text itself: if the
# last few tokens occurred before, it guesses what followed then. In texts that quote their prompt,
# such as summaries and corrected programs, that is often right. The result is the same as without
# guesses; only the number of passes differs. We count passes by wrapping one operation.

# %%
from dataclasses import replace

from npllama.model import PLAIN


def generated(lookup, prompt):
    """Return 60 greedy tokens after a prompt and the number of passes that they took."""
    passes = []
    counting = replace(PLAIN, embed=lambda ids, weight: (passes.append(len(ids)), PLAIN.embed(ids, weight))[1])
    counted = replace(model, ops=counting)
    ids = list(npllama.generate(counted, prompt, 60, lookup=lookup, stop_ids=[]))
    return ids, len(passes)


again = "We know't, we know't, we know't, we know't, we know't, we"
prompt = model.tokenizer.encode("All:\n" + again, bos=True)
(plain, n_plain), (guessed, n_guessed) = generated(0, prompt), generated(8, prompt)
print("the same tokens:", plain == guessed)
print(f"passes: {n_plain} without guesses, {n_guessed} with up to 8 guessed tokens")

# %% [markdown]
# ## Keep it between turns
#
# A cache is not tied to one answer. In a conversation the next prompt begins with everything said
# so far, so only the new question has to be computed. `npllama.Conversation` does that by
# comparing token ids: as far as the old and the new prompt agree, the cache is kept; from the
# first difference on it is cut.

# %%
talk = npllama.Conversation(model, max_tokens=24)
for question in ("Who is there?", "Speak again.", "Farewell."):
    talk.say(question)
    total = len(talk.format.prompt(talk.messages[:-1]).ids)
    print(f"{question:16} prompt of {total:3} tokens, {talk.n_read:3} of them computed")

# %% [markdown]
# **Question.** A chat program puts the current time into the system prompt, at the very beginning.
# What does that do to the cache?

# %% [markdown] tags=["answer"]
# Every prompt differs from the last one in its first few tokens. From there on no key or value can
# be kept, since each row depends on all rows before it: the whole conversation is computed again
# at every turn. Put what changes at the end.

# %% [markdown]
# ## What you have now
#
# - Earlier rows never change, and attention needs only their keys and values: with a cache of
#   those, each token is computed once.
# - Cached and uncached results are equal within rounding, however the tokens are divided into
#   passes. Test that.
# - The cache costs 2 · layers · key/value heads · head_dim numbers for each token, often as much
#   memory as the weights.
# - Decoding is bound by reading memory; rows that share a pass share that cost.
#
# To measure rather than estimate: `npllama generate "ROMEO:"` prints its speed, and [the speed
# page](../speed.md) compares. Next: [what 16 bits do to all these numbers](5-precision.ipynb).
