# %% [markdown]
# # 5. Precision: the effect of 16 bits
#
# All formulas so far were about real numbers. A computer has none: it has 2³² different float32
# and 65,536 different numbers of 16 bits. Published models are stored and mostly run in 16 bits.
# How much of the model survives that, and where does it break?
#
# ## The question
#
# Here is a sum that every computer with bfloat16 gets wrong. We add 1 a thousand times.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama import model as code
from npllama import ops
from npllama.engine import linear as engine
from npllama.golden import precision
from npllama.learn.course import BLUE, GREEN, ORANGE, grade, pictures, source, table
from npllama.sampling import log_probabilities

pictures()
model = npllama.load()
params, config = model.params, model.config

total = np.float32(0)
for _ in range(1000):
    total = precision.round_bfloat16(total + np.float32(1))
print("the sum of 1000 ones, rounded to bfloat16 after each addition:", total)

# %% [markdown]
# The result is 256. When you know why, you know most of this notebook.
#
# ## What a floating-point number is
#
# A float32 has 32 bits: one for the sign, 8 for an exponent and 23 for a fraction. The number is
#
# $$
# \pm \; 1.\text{fraction} \times 2^{\text{exponent}}
# $$
#
# float16 has 5 bits of exponent and 10 of fraction. bfloat16 is a float32 without its last 16
# bits: 8 of exponent and 7 of fraction.


# %%
def bits(x, kind):
    """Return the bits of x as sign, exponent, fraction."""
    x = np.float32(x)
    if kind == "float16":
        word, n, exponent = int(np.float16(x).view(np.uint16)), 16, 5
    else:
        word, n, exponent = (
            int((precision.round_bfloat16(x) if kind == "bfloat16" else x).view(np.uint32)),
            32,
            8,
        )
    text = f"{word:0{n}b}"[: 16 if kind != "float32" else 32]
    return f"{text[0]} {text[1 : 1 + exponent]} {text[1 + exponent :]}"


third = np.float32(1 / 3)
rows = [
    ("float32", bits(third, "float32"), f"{third:.7f}"),
    ("bfloat16", bits(third, "bfloat16"), f"{precision.round_bfloat16(third):.7f}"),
    ("float16", bits(third, "float16"), f"{precision.round_float16(third):.7f}"),
]
table(["format", "bits of 1/3: sign, exponent, fraction", "value"], rows)

# %% [markdown]
# The fraction decides how *fine* the numbers are, the exponent how *large* they may be. Between 1
# and 2, bfloat16 has 128 numbers, 1/128 apart. Between 256 and 512 it has 128 again, now 2 apart.
# So after 256 comes 258, and 256 + 1 = 257 lies just between the two and is rounded back to 256.
# That is where our sum stopped.


# %%
def step(x, r):
    """Return the distance from x to the next larger number of a format."""
    candidates = np.float32(x) * (1 + 2.0 ** np.arange(-23, -6)).astype(np.float32)
    rounded = r(candidates)
    return float(rounded[rounded > x].min() - x)


formats = (lambda x: x, precision.round_bfloat16, precision.round_float16)
rows = [(x, *(step(x, r) for r in formats)) for x in (1, 16, 256, 1024)]
table(["at", "float32 step", "bfloat16 step", "float16 step"], rows)

# %% [markdown]
# And the largest numbers:

# %%
with np.errstate(over="ignore"):
    for x in (60_000, 70_000, 1e38):
        brain, half = precision.round_bfloat16(np.float32(x)), precision.round_float16(np.float32(x))
        print(f"{x:9.0e}: bfloat16 {brain:.3g}, float16 {half:.3g}")

# %% [markdown]
# float16 ends at 65,504. bfloat16 reaches as far as float32, with a resolution of two or three
# decimal digits. Models are trained in bfloat16 for this reason: an overflow destroys a training
# run, and coarse numbers only add noise.
#
# ## Rounding
#
# A float32 becomes a bfloat16 by dropping 16 bits. Cutting them off would make every number
# smaller, always in the same direction, and such errors add up. So it is rounded to the *nearest*,
# and a tie, exactly in the middle, goes to the neighbour whose last bit is 0 ("ties to even"):
# half of the ties go up and half go down.
#
# A worked example: 1 + 1/256 lies between 1 = `...0000` and 1 + 1/128 = `...0001`. It is a tie and
# goes to 1, the even one. 1 + 3/256 lies between `...0001` and `...0010`, and goes up.

# %%
for n in range(5):
    x = np.float32(1 + n / 256)
    print(f"1 + {n}/256 -> 1 + {(precision.round_bfloat16(x) - 1) * 256:.0f}/256")

# %% [markdown]
# ### Exercise: `round_bfloat16`
#
# Write it with whole numbers: `x.view(np.uint32)` gives the 32 bits. There is a way without a
# branch: add something to the bits, then set the last 16 to zero. What has to be added so that
# everything above the middle goes up, everything below goes down, and a tie goes up only if bit 16
# is 1?


# %% tags=["exercise"]
def round_bfloat16(x):
    raise NotImplementedError


grade(round_bfloat16)


# %% tags=["answer"]
def round_bfloat16(x):
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)  # 1 if the last bit that is kept is 1
    bits = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


# %% [markdown]
# ## How wrong is one rounding?
#
# Rounding to nearest is off by half a step at most. Relative to the number that is at most 2⁻⁸ =
# 0.4% in bfloat16, 2⁻¹¹ = 0.05% in float16 and 2⁻²⁴ = 0.000006% in float32, whatever the size of
# the number.

# %%
x = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
figure, ax = plt.subplots()
for name, r, colour in (
    ("bfloat16", precision.round_bfloat16, ORANGE),
    ("float16", precision.round_float16, BLUE),
):
    error = np.abs(r(x) - x) / np.abs(x)
    label = f"{name}: at most {error.max():.2%}"
    ax.hist(np.log2(error[error > 0]), bins=60, histtype="step", color=colour, label=label)
ax.set(xlabel="log₂ of the relative error", ylabel="numbers", title="error of rounding 20,000 random numbers")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Sums: where to round
#
# A matrix product adds up hundreds of terms. If each partial sum were rounded to bfloat16, small
# terms would vanish as the ones did above. Hardware therefore multiplies 16-bit numbers but **adds
# up in float32** and rounds once at the end. Compare both on a sum of 4,096 products:

# %%
a, b = precision.round_bfloat16(np.abs(np.random.default_rng(2).standard_normal((2, 4096))).astype(np.float32))
exact = float(np.sum(a.astype(np.float64) * b))
running, sums = np.float32(0), []
for term in a * b:
    running = precision.round_bfloat16(running + term)
    sums.append(float(running))
figure, ax = plt.subplots()
ax.plot(np.cumsum(a.astype(np.float64) * b), color="black", label="exact")
ax.plot(sums, color=ORANGE, ls="--", label="rounded to bfloat16 at each step")
ax.set(xlabel="terms added", ylabel="sum", title="partial sums of 4,096 products")
ax.legend(frameon=False)
plt.show()
once = precision.round_bfloat16(np.float32(a @ b))
print(f"exact {exact:.1f}; rounded once {once:.0f}; rounded at each step {running:.0f}")

# %% [markdown]
# **Question.** The rounded sum stops growing at some value. Which one would you expect if the
# terms are about 0.6 on average?

# %% [markdown] tags=["answer"]
# A term is lost when it is less than half of the step at the sum. Terms of 0.6 are less than half
# of a step of 2, which bfloat16 has from 256 on; larger terms still get through. From 1,024 on the
# steps are 8, and only terms above 4 count, which are rare. So the sum slows down after 256 and
# nearly stops just above 1,024.

# %% [markdown]
# ## The norm
#
# Before attention and before the feed-forward, each row is scaled to a root-mean-square of 1, by
# **RMSNorm**:
#
# $$
# y = \frac{x}{\sqrt{\text{mean}(x^2) + \epsilon}} \cdot w
# $$
#
# A worked number: x = (3, 4) has the mean square 12.5, its root is 3.54, and y = (0.85, 1.13)
# before the weight.

# %%
print(ops.rms_norm(np.array([3, 4], np.float32), np.ones(2, np.float32), 1e-5).round(2))
source(ops.rms_norm)

# %% [markdown]
# Squaring is dangerous in 16 bits. A residual stream of 300 is nothing unusual in a large model,
# and its square is 90,000:

# %%
row = np.array([300, 2, -1, 0.5], np.float16)
with np.errstate(over="ignore"):
    print("squares in float16:", row * row, " so the norm gives", row / np.sqrt(np.mean(row * row)))
print("norm computed in float32:", ops.rms_norm(row.astype(np.float32), np.ones(4, np.float32), 1e-5).round(3))

# %% [markdown]
# Meta's code and Hugging Face's compute the norms in float32 for this reason, even if everything
# around them has 16 bits.
#
# And $\epsilon$? It keeps a row of zeros from becoming 0/0. It belongs *inside* the root: there it
# matters only if the mean square is as small as $\epsilon$ itself.
#
# ### Exercise: `rms_norm`
#
# `x [..., D]`, `weight [D]`. Each row has a mean square of its own, and float32 must stay float32.


# %% tags=["exercise"]
def rms_norm(x, weight, eps):
    raise NotImplementedError


grade(rms_norm)


# %% tags=["answer"]
def rms_norm(x, weight, eps):
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


# %% [markdown]
# ## Too much precision is a mistake, too
#
# NumPy's default is float64. One innocent constant turns everything after it into float64: twice
# the memory, half the speed, and numbers that no other implementation has.

# %%
x = np.ones(4, np.float32)
for name, y in (
    ("x / np.sqrt(64)", x / np.sqrt(64)),
    ("x / math.sqrt(64)", x / 64**0.5),
    ("x + np.zeros(4)", x + np.zeros(4)),
    ("x + np.zeros_like(x)", x + np.zeros_like(x)),
):
    print(f"{name:22} {y.dtype}")

# %% [markdown]
# In NumPy 2 a scalar such as `np.sqrt(64)` is a float64 *array scalar* and wins; a plain Python
# number doesn't. (In NumPy 1.26 the first line is float32.) A port that meets one such line computes
# everything after it in float64: with right results, twice the memory, and half the speed or less.
#
# ## The whole model in 16 bits
#
# Now let us run the model in each format. `Precision("bfloat16")` rounds the result of each
# operation, as torch does with a bfloat16 model: each operation computes in float32 and rounds its
# result once. The reference is float64.

# %%
passage = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
    "You are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n"
)
ids = np.array(model.tokenizer.encode(passage, bos=True))
names = ("float64", "float32", "float16", "bfloat16")
runs = {}
for name in names:
    runs[name] = npllama.Recording()
    precision.Precision(name).forward(params, config, ids, tap=runs[name])


def error(name, activation):
    """Return the relative error of an activation: the root of the summed squares, against float64."""
    x, exact = runs[name][activation], runs["float64"][activation]
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


stream = ["tok_embeddings", *(f"layers.{n}.out" for n in range(config.n_layers)), "norm", "logits"]
figure, ax = plt.subplots(figsize=(6.4, 3.6))
for name, colour, dashes in (("bfloat16", ORANGE, "-"), ("float16", BLUE, "--"), ("float32", GREEN, ":")):
    ax.semilogy(
        [error(name, activation) for activation in stream[1:]], color=colour, ls=dashes, marker="o", label=name
    )
ticks = [name.replace("layers.", "layer ").replace(".out", "") for name in stream[1:]]
ax.set_xticks(range(len(ticks)), ticks, rotation=45)
ax.set(ylabel="relative error", title="error of a whole pass against float64")
figure.legend(frameon=False, ncols=3, loc="outside lower center")
plt.show()

# %% [markdown]
# The three lines lie about as far apart as the formats' fractions do, 7, 10 and 23 bits, and each
# grows only a little from layer to layer: errors are random, and random errors mostly cancel. (The
# embedding is left out. The weights of this model are stored in bfloat16, so their error is zero.)
#
# Does it change what the model says? Compare the first choices, and the probabilities p and q of two
# runs by their KL divergence, the sum of p · log(p / q): 0 where they are equal, in nats (the
# logarithm's base is e). Surprise is -log q of the token that follows in the text.


# %%
def verdict(name):
    """Return the mean KL divergence, the share of equal first choices, and the surprise."""
    p, q = log_probabilities(runs["float64"]["logits"]), log_probabilities(runs[name]["logits"])
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    return kl.mean(), same, -q[np.arange(len(ids) - 1), ids[1:]].mean()


rows = []
for name in names[1:]:
    kl, same, surprise = verdict(name)
    rows.append((name, f"{kl:.6f}", f"{100 * same:.0f}%", f"{surprise:.3f}"))
table(["precision", "KL divergence, nats", "same first choice", "surprise, nats"], rows)

# %% [markdown]
# In bfloat16 the logits are wrong by 0.3%, two first choices of 62 differ, and the text is
# practically as well predicted. A language model is robust against *noise*. That has a consequence
# which is the subject of the last notebook: it is also robust against small *bugs*, and you can't
# tell one from the other by reading the output.
#
# **Question.** With temperature 0 a bfloat16 model and a float32 model write the same text for a
# while and then differ. Why not from the first token on, and why not never?

# %% [markdown] tags=["answer"]
# The first choice changes only where two logits are closer together than the error. That is rare:
# most choices have a clear margin. But in a long text it happens sooner or later, and from the
# first different token on the two texts have different prompts.
#
# So "the same greedy text" is a bad test for a port: it fails for right programs and passes for
# wrong ones. Compare logits.

# %%
margins = np.sort(runs["float64"]["logits"], axis=-1)
margins = margins[:, -1] - margins[:, -2]
noise = np.abs(runs["bfloat16"]["logits"] - runs["float64"]["logits"]).max(-1)
figure, ax = plt.subplots()
ax.semilogy(np.sort(margins), color="black", label="first choice's lead")
ax.axhline(np.median(noise), color=ORANGE, ls="--", label="error in bfloat16 (median of the largest)")
ax.set(xlabel="positions, sorted", ylabel="difference of logits", title="lead of the first choice, and noise")
ax.legend(frameon=False)
plt.show()
print(f"{np.mean(margins < np.median(noise)):.0%} of the choices are closer than the noise")

# %% [markdown]
# ## Fewer bits for storage
#
# Rounding *activations* adds new noise at each step. Rounding the *weights* once, for storage, is
# cheaper to live with. With 8 bits, each row of a matrix gets one scale: its largest number
# becomes 127, and the others are rounded to whole numbers.
#
# A worked row: (0.5, -1.27, 0.013). The scale is 1.27/127 = 0.01, and the integers are (50, -127,
# 1). The last number comes back as 0.010 instead of 0.013: small numbers in a row with a large one
# lose most.


# %%
def rounded(name, bits):
    """Return a weight rounded to whole numbers of so many bits with one scale for each row."""
    weight = engine.widen(params[name])
    if weight.ndim < 2:
        return weight
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=-1, keepdims=True) / largest
    return np.rint(weight / scale) * scale


rows = []
for bits_per_weight in (8, 6, 5, 4, 3, 2):
    packed = {name: rounded(name, bits_per_weight) for name in params}
    runs[bits_per_weight] = {"logits": npllama.forward(packed, config, ids)}
    kl, same, surprise = verdict(bits_per_weight)
    rows.append((bits_per_weight, f"{kl:.3f}", f"{100 * same:.0f}%", f"{surprise:.2f}"))
table(["bits per weight", "KL divergence, nats", "same first choice", "surprise, nats"], rows)

# %% [markdown]
# From 6 bits to 3, each bit less makes the divergence about four to six times as large. 8 bits cost
# no more than bfloat16 activations do; at 2 bits, with only -1, 0 and 1 left, the model is as good
# as guessing. The surprise hardly moves before that: on one short passage it is too coarse a
# measure, and the divergence is the better one. Real 4-bit formats have a scale for each 32
# numbers, so that a large number spoils only its own group. [The speed page](../speed.md) has what
# npllama's formats cost and gain.
#
# ## Where 16 bits must not be used
#
# One place can't take the noise: the angles of RoPE. An angle is a position times a frequency. In
# bfloat16 positions above 256 have no odd numbers, so neighbours get the *same* angle:

# %%
positions = np.arange(300, 306, dtype=np.float32)
print("positions:          ", positions.astype(int))
print("angles in bfloat16: ", precision.round_bfloat16(positions).astype(int))


def with_angles(r):
    """Return operations that round RoPE's angles."""

    def rotation(positions, frequencies):
        angles = r(positions[..., None].astype(np.float32) * frequencies)[..., None, :]
        return np.cos(angles), np.sin(angles)

    return replace(code.PLAIN, rope_rotation=rotation)


whole = np.array(model.tokenizer.encode(passage * 10, bos=True))[:500]
p = log_probabilities(npllama.forward(params, config, whole, ops=code.PLAIN))


def divergence(logits):
    """Return the KL divergence from the float32 model at each position, averaged over each 100."""
    q = log_probabilities(logits)
    return np.sum(np.exp(p) * (p - q), axis=-1).reshape(-1, 100).mean(-1)


everything = divergence(precision.Precision("bfloat16").forward(params, config, whole))
angles = divergence(npllama.forward(params, config, whole, ops=with_angles(precision.round_bfloat16)))
figure, ax = plt.subplots()
ax.semilogy(
    range(50, 500, 100), angles, color=ORANGE, marker="o", label="angles in bfloat16, all else in float32"
)
ax.semilogy(
    range(50, 500, 100), everything, color=BLUE, ls="--", marker="o", label="all in bfloat16, but the angles"
)
ax.set(xlabel="position", ylabel="KL divergence, nats", title="what rounding RoPE's angles does")
ax.legend(frameon=False)
plt.show()
print("at the end over 100 times as much:", bool(angles[-1] > 100 * everything[-1]))

# %% [markdown]
# At the first hundred tokens the rounded angles do no more harm than all other rounding together.
# At the end they do over a hundred times as much. It is easy to see why such a mistake survives:
# tests have short prompts.
#
# ## What you have now
#
# - bfloat16 has the range of float32 and two or three digits; float16 has a digit more and ends at
#   65,504.
# - Round to nearest, ties to even. Add up in float32, and compute norms, softmax and angles there.
# - A model survives random noise: its text is nearly the same. So text is no test. Compare
#   probabilities.
# - In float32 the error of a right program is known, about 10⁻⁶. What is larger by far is not
#   rounding.
#
# The last point is the key to [finding a bug in a port](6-conversation.ipynb).
