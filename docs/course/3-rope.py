# %% [markdown]
# # 3. RoPE and long contexts
#
# Attention compares a query with keys by dot products ([notebook 2](2-attention.ipynb)). A dot
# product doesn't know where its two vectors stand in the text. "Dog bites man" and "man bites dog"
# would be the same to it. This notebook adds position, in the way every Llama does, and asks what
# happens to it in texts longer than those of the training.
#
# ## The question
#
# First let us see the problem. We switch RoPE off, take layer 0, and exchange two early tokens of
# the prompt. What does the last token's attention notice?

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama import model as code
from npllama import ops
from npllama.learn.course import BLUE, GREEN, ORANGE, bars, grade, pictures, source, table
from npllama.sampling import log_probabilities

pictures()
model = npllama.load()
params, config = model.params, model.config
tokens = model.tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me", bos=True)
exchanged = tokens.copy()
exchanged[2], exchanged[9] = exchanged[9], exchanged[2]


def last_row(ids, ops):
    """Return what layer 0's attention computes for the last token."""
    seen = npllama.Recording()
    npllama.forward(params, config, ids, tap=seen, ops=ops)
    return seen["layers.0.attention.out"][-1]


no_rope = replace(code.PLAIN, rope=lambda x, cos, sin: x)
for name, made in (("without RoPE", no_rope), ("with RoPE", code.PLAIN)):
    before, after = last_row(tokens, made), last_row(exchanged, made)
    print(f"{name:13} change {np.linalg.norm(after - before) / np.linalg.norm(before):.1%}")

# %% [markdown]
# Without RoPE the result stays the same up to rounding: attention sees a *set* of tokens. With
# RoPE it changes.
#
# ## The idea: rotate
#
# Take two numbers of a query and read them as an arrow in a plane. **Rotate the arrow by an angle
# that grows with the position**: at position m by m·θ. Do the same with the keys. The dot product
# of two arrows depends on their lengths and on the angle *between* them. If both are rotated by
# the same amount, it stays the same. So what remains is the difference of the positions.
#
# A worked number, with θ = 1 radian and both arrows (1, 0): at position 2 the query is (cos 2, sin
# 2), at position 5 the key is (cos 5, sin 5), and their product is
#
# $$
# \cos(2) \cos(5) + \sin(2) \sin(5) = \cos(5 - 2) = \cos(3) = -0.99
# $$


# %%
def arrow(m, theta=1.0):
    """Rotate (1, 0) by the angle of position m."""
    return np.array([np.cos(m * theta), np.sin(m * theta)])


for m, n in ((2, 5), (102, 105), (2, 6)):
    print(f"query at {m:3}, key at {n:3}: product {arrow(m) @ arrow(n):.4f}")

# %% [markdown]
# Positions 2 and 5 give the same as 102 and 105: only the distance counts.

# %%
figure, ax = plt.subplots(figsize=(4.2, 4.2))
ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="#bbbbbb"))
for m in range(6):
    x, y = arrow(m)
    ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 2})
    ax.text(1.15 * x, 1.15 * y, str(m), ha="center", va="center")
ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title="one pair at positions 0 to 5, θ = 1")
ax.axis("off")
plt.show()

# %% [markdown]
# **Question.** With θ = 1 radian, at which distance does the pair point in nearly the same
# direction again? What would go wrong if a head had only this one pair?

# %% [markdown] tags=["answer"]
# After 2π ≈ 6.28 positions. Distances 0, 6.28, 12.57 and so on look nearly the same: the pair
# can't tell "here" from "six tokens ago". It is a clock with only a second hand. That is why a
# head has many pairs with different speeds.

# %% [markdown]
# ## Many hands of a clock
#
# A head of K numbers has K/2 pairs, and each is rotated at its own speed:
#
# $$
# \theta_j = \Theta^{-2j/K} \qquad j = 0, 1, \dots, K/2 - 1
# $$
#
# $\Theta$ ("rope theta") is a constant of the model: 10,000 in LLaMA 1 and 2, 500,000 in Llama 3
# and in this one. Pair 0 makes 1 radian per position; the others are slower and slower. Like the
# hands of a clock, fast pairs tell near positions apart and slow pairs tell far ones.

# %%
K, theta = config.head_dim, config.rope_theta
frequencies = ops.rope_frequencies(K, theta, None, np.float64)
pairs = (0, 1, 2, 4, 8, 12, 15)
rows = [(j, frequencies[j], 2 * np.pi / frequencies[j]) for j in pairs]
table(["pair j", "radians per position", "positions for a whole turn"], rows)

# %% [markdown]
# ### Exercise: `rope_frequencies`
#
# Compute all K/2 speeds, as float32.


# %% tags=["exercise"]
def rope_frequencies(head_dim, theta):
    raise NotImplementedError


grade(rope_frequencies)


# %% tags=["answer"]
def rope_frequencies(head_dim, theta):
    j = np.arange(head_dim // 2)
    return (theta ** (-2 * j / head_dim)).astype(np.float32)


# %% [markdown]
# Two more steps complete RoPE: the cosines and sines of all angles m·θ, and the rotation itself.

# %%
source(ops.rope_rotation, ops.rope)

# %% [markdown]
# The rotation is one line because a pair is a complex number: `x[0] + i·x[1]` times $e^{i m
# \theta}$ is exactly a rotation by m·θ. `view` reads the same memory as complex numbers. Without
# complex numbers it reads
#
# $$
# y_{2j} = x_{2j} \cos(m\theta_j) - x_{2j+1} \sin(m\theta_j)
# \qquad y_{2j+1} = x_{2j} \sin(m\theta_j) + x_{2j+1} \cos(m\theta_j)
# $$
#
# ### Exercise: `rope`
#
# Write it without complex numbers: `x [T, heads, K]`, `cos` and `sin` `[T, 1, K/2]`. Even entries
# are `x[..., 0::2]`. The second line needs the *old* x.


# %% tags=["exercise"]
def rope(x, cos, sin):
    raise NotImplementedError


grade(rope)


# %% tags=["answer"]
def rope(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    y = np.empty_like(x)
    y[..., 0::2] = even * cos - odd * sin
    y[..., 1::2] = even * sin + odd * cos
    return y


# %% [markdown]
# Hugging Face's code pairs `x[j]` with `x[j + K/2]` instead of neighbours. Both are right, each
# with weights whose rows are ordered to match. Mixed up, the text stays fluent and gets worse:
# [the walkthrough](../walkthrough.md) shows that mistake, and the grader names it.
#
# ## Only the distance counts, in the real model
#
# Shift the whole text: let the first token be at position 100 instead of 0. All distances stay, so
# nothing should change. We replace the operation that forms the angles.


# %%
def shifted(offset):
    """Return operations that rotate every token as if the text began at position `offset`."""
    return replace(code.PLAIN, rope_rotation=lambda positions, f: ops.rope_rotation(positions + offset, f))


logits = npllama.forward(params, config, tokens, ops=code.PLAIN)
for offset in (1, 100, 5_000, 1_000_000):
    change = np.abs(npllama.forward(params, config, tokens, ops=shifted(offset)) - logits).max()
    print(f"shifted by {offset:9,}: logits change by less than 0.001: {bool(change < 0.001)}")

# %% [markdown]
# The logits, numbers up to 18, stay the same within rounding, even at position 5,000, although this
# model was trained on texts of at most 512 tokens. (At a million they move by 0.02. That is
# rounding, too; the end of this notebook explains it.) **It has never seen position 5,000, and
# doesn't care**: no row of attention depends on a position, only on distances.
#
# A query and a key of the model give a score for each distance. This is what layer 4's head 2, the
# head that attends to the previous token, makes of it. The query is that of " me", the key that of
# " hear"; only their distance is varied.

# %%
seen = npllama.record(model, tokens)
q = seen["layers.4.attention.q"][-1, 2:3]  # [1, K], not rotated yet
k = seen["layers.4.attention.k"][-2, 0:1]
distances = np.arange(0, 513)


def scores(distances, frequencies):
    """Return the score of the query with the key so many tokens before it."""
    cos, sin = ops.rope_rotation(distances, frequencies)
    rotated = ops.rope(np.broadcast_to(q, (len(distances), 1, K)).astype(np.float64), cos, sin)
    return rotated[:, 0] @ k[0].astype(np.float64) / K**0.5


figure, ax = plt.subplots()
ax.plot(distances[:64], scores(distances[:64], frequencies), color=BLUE, marker=".")
ax.set(xlabel="distance of the key, tokens", ylabel="score", title="layer 4, head 2: ' me' attends to ' hear'")
plt.show()
print("distance with the largest score:", int(scores(distances, frequencies).argmax()))

# %% [markdown]
# The curve is a sum of 16 waves, one for each pair, and training chose their sizes and phases by
# choosing $W_q$ and $W_k$. A head that prefers the previous token is a sum of waves with its peak
# near distance 1.
#
# ## Texts that are too long
#
# If only distances count, why does a model have a "context length" at all? Because distances can
# be new, too. In training, two tokens were never more than 511 apart. The fast pairs have made
# many turns over that distance and have seen every angle. The slow pairs have not made a single
# one:

# %%
turns = 511 * frequencies / (2 * np.pi)
ax = bars(
    [f"pair {j}" for j in range(K // 2)],
    np.minimum(turns, 3),
    title="full turns of each pair over a distance of 511",
    unit="turns; bars are cut at 3",
)
ax.axvline(1, color="black", lw=0.8)
plt.show()

# %% [markdown]
# The pairs whose bars end before the line, from pair 6 on, get angles that the model has never met.
# At a distance of 2,000 it gets inputs unlike any in training, and a neural network promises
# nothing there. npllama therefore refuses more tokens than `max_seq_len`:

# %%
try:
    npllama.forward(params, config, np.zeros(513, int))
except ValueError as error:
    print(error)

# %% [markdown]
# To see the damage by itself, we don't even need a long text. We take a passage and **open a gap**
# in it: from the middle on, all positions are larger by some number. Distances within each half
# stay; distances between the halves grow by the gap. The text is the same, so what becomes worse
# is due to RoPE alone.

# %%
passage = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
    "You are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n\nFirst Citizen:\n"
    "First, you know Caius Marcius is chief enemy to the people.\n\nAll:\nWe know't, we know't.\n"
)
ids = np.array(model.tokenizer.encode(passage, bos=True))
half = len(ids) // 2


def surprise(gap, config=config):
    """Return the mean surprise, in nats, at the tokens after a gap in the positions."""

    def rotation(positions, f):
        return ops.rope_rotation(np.where(positions < half, positions, positions + gap), f)

    logits = npllama.forward(params, config, ids, ops=replace(code.PLAIN, rope_rotation=rotation))
    return -log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]][half:].mean()


gaps = np.array([0, 100, 200, 300, 400, 600, 800, 1000, 1500, 2000, 3000, 4000])
plain = np.array([surprise(gap) for gap in gaps])
figure, ax = plt.subplots()
ax.plot(gaps, plain, color=ORANGE, marker=".")
ax.axvline(512 - len(ids), color="black", lw=0.8)
ax.annotate(
    "longest distance in training", (512 - len(ids), 2.95), (5, 0), textcoords="offset points", fontsize=9
)
ax.set(xlabel="gap, tokens", ylabel="surprise, nats", title="the same text with a gap in its positions")
plt.show()
print(f"{len(ids)} tokens; surprise {plain[0]:.2f} without a gap, {plain[-1]:.2f} with one of 4,000")

# %% [markdown]
# As long as all distances occurred in training, the gap does no harm: the line is flat. Just
# beyond, the surprise jumps by half a nat, and then it is a matter of luck at which angles the
# slow pairs happen to be. No error is raised anywhere, and the model still writes words. This is
# how a wrong context length looks.
#
# ## Stretching the context
#
# What can be done, without training again? **Slow the clock down.** If all frequencies are divided
# by 2, a distance of 1,000 looks like one of 500. The angles are familiar again. That is *position
# interpolation* (Chen et al. 2023). Its price: near tokens also look nearer together, and the fast
# pairs are what tells "previous token" from "the one before".
#
# Llama 3.1 is more careful. It divides the frequencies of the *slow* pairs, whose waves are longer
# than the trained context, and keeps the fast ones, which have met all angles anyway. Between the
# two it interpolates:
#
# $$
# \lambda = \frac{2\pi}{\theta_j} \qquad s = \frac{L/\lambda - \text{low}}{\text{high} - \text{low}} \qquad
# \theta'_j = \begin{cases} \theta_j & s > 1 \\ \theta_j / f & s < 0 \\
# (1 - s)\,\theta_j / f + s\,\theta_j & \text{else} \end{cases}
# $$
#
# L is the context length of the first training, f the factor. A worked example with L = 512, low =
# 1, high = 4: a wave of λ = 100 has L/λ = 5.12, above high, and stays. One of λ = 1,000 has 0.512,
# below low, and becomes f times as long. One of λ = 256 has 2, so s = 1/3.

# %%
f = 8.0
scaling = npllama.RopeScaling(factor=f, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=512)
scaled = ops.rope_frequencies(K, theta, scaling, np.float64)
figure, ax = plt.subplots()
ax.plot(2 * np.pi / frequencies, frequencies / scaled, color=GREEN, marker="o")
ax.axvspan(512 / 4, 512, color="#dddddd")
ax.set(
    xscale="log", xlabel="wavelength, positions", ylabel="divided by", title="Llama 3.1's scaling with factor 8"
)
plt.show()

# %% [markdown]
# ### Exercise: `scaled_rope`
#
# Compute the frequencies with this scaling. Start from the plain ones; `np.clip(s, 0, 1)` saves
# you the three cases. Think about why.


# %% tags=["exercise"]
def scaled_rope(head_dim, theta, factor, low, high, length):
    raise NotImplementedError


grade(scaled_rope)


# %% tags=["answer"]
def scaled_rope(head_dim, theta, factor, low, high, length):
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    s = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return ((1 - s) * frequencies / factor + s * frequencies).astype(np.float32)


# %% [markdown]
# `np.clip` works because the formula for the middle gives θ/f at s = 0 and θ at s = 1: the three
# cases join without a step.
#
# Does it help? We open the same gaps again, with Llama 3.1's scaling and with plain interpolation,
# both with factor 8. Neither model was trained with it.

# %%
llama31 = replace(config, rope_scaling=scaling)
linear = replace(config, rope_scaling=npllama.LinearRopeScaling(f))
curves = {
    "unscaled": (plain, ORANGE, "-"),
    "all divided by 8": ([surprise(gap, linear) for gap in gaps], "black", ":"),
    "Llama 3.1's scaling": ([surprise(gap, llama31) for gap in gaps], GREEN, "--"),
}
figure, ax = plt.subplots(figsize=(6.4, 4))
for name, (values, colour, dashes) in curves.items():
    ax.plot(
        gaps,
        values,
        color=colour,
        ls=dashes,
        marker=".",
        label=f"{name}: {np.mean(values[5:]):.2f} on average past 512",
    )
ax.set(xlabel="gap, tokens", ylabel="surprise, nats", title="the same gaps with scaled frequencies")
figure.legend(frameon=False, fontsize=9, loc="outside lower center")
plt.show()

# %% [markdown]
# Dividing everything blurs the fast pairs: the model is worse at every gap, even without one.
# Scaling only the slow ones costs nothing at gap 0 and removes the jump: the line stays nearly
# flat as far as 8 times the trained length. Meta then trained Llama 3.1 further with the scaling
# in place, on texts of up to 131,072 tokens.
#
# **Question.** Llama 3.2 1B has factor 32 where 3.1 has 8, and a port has 8 written into its code.
# Will a test with a short prompt find it? With a long one?

# %% [markdown] tags=["answer"]
# A short prompt hardly shows it. Only slow pairs differ, and over a few dozen tokens a slow pair
# is rotated by almost nothing: by m·θ/8 or m·θ/32, both close to 0. The logits differ by little,
# and the text is the same.
#
# At 10,000 tokens the angles differ by radians, and the model misses what stands far back. Test
# vectors for RoPE must therefore have large positions; npllama's conformance suite has a level for
# them (L5).

# %% [markdown]
# ## One more limit: float32
#
# There is a last trap at long distances, and it is not the model's but the number's. The angle of
# pair 0 at position m is m radians. In float32 numbers near 100,000 are 0.008 apart, so the angle
# is rounded. Pair 1, at 0.44 radians per position:

# %%
f1 = frequencies[1]
for m in (1_000, 100_000, 10_000_000):
    exact, rounded = np.cos(m * f1), np.cos(np.float32(m) * np.float32(f1))
    print(
        f"position {m:10,}: float32 steps near the angle {np.spacing(np.float32(m * f1)):.5f}, "
        f"error of the cosine {abs(exact - rounded):.5f}"
    )

# %% [markdown]
# Published models were trained with these float32 angles, so npllama reproduces them as they are.
# In 16 bits it would be hopeless: bfloat16 has no odd numbers above 256. What that means is the
# subject of [notebook 5](5-precision.ipynb).
#
# ## What you have now
#
# - RoPE rotates pairs of each query and key by angles that grow with the position; dot products
#   then depend on distances only.
# - Pairs have speeds from 1 radian per position down to nearly nothing, like the hands of a clock.
# - A context length is the range of distances whose angles occurred in training. Beyond it,
#   nothing fails and everything gets worse.
# - Llama 3.1 stretches the context by slowing down the slow pairs.
#
# Next: generating a text takes one pass for each token. [How to compute nothing
# twice](4-cache.ipynb).
