# %% [markdown]
# # 1. From one matrix product to the next token
#
# This is the first of six notebooks. Together they take about six hours and lead from a single
# matrix product to a conversation with a language model, on the model inside npllama: a Llama 3
# with 2.8 million numbers, trained on Shakespeare. All of its arithmetic is NumPy.
#
# 1. **From one matrix product to the next token**: embeddings, logits, softmax, and where tokens
#    come from
# 2. [Attention](2-attention.ipynb)
# 3. [RoPE and long contexts](3-rope.ipynb)
# 4. [The cache and its cost](4-cache.ipynb)
# 5. [Precision: the effect of 16 bits](5-precision.ipynb)
# 6. [Finding a bug, and a conversation](6-conversation.ipynb)
#
# You need Python, some linear algebra, `pip install '.[notebook]'`, and a program that opens
# notebooks: Jupyter (`pip install jupyterlab`, then `jupyter lab`) or an editor such as VS Code.
# Each notebook has exercises: replace the line `raise NotImplementedError` by your code and run the
# cell, and it is graded. If you prefer files and an editor, the same exercises are `npllama
# exercise start my-llama` and `npllama exercise check my-llama`. Answers are folded; try first.

# %%
import matplotlib.pyplot as plt
import numpy as np

import npllama
from npllama import ops, tokenizer
from npllama.engine import linear as engine
from npllama.learn.course import bars, grade, pictures, source, table

pictures()
model = npllama.load()
print(f"{npllama.n_parameters(model.config):,} numbers in {len(model.params)} arrays")

# %% [markdown]
# ## The question
#
# A language model takes a text and answers one question: **which token comes next?** A token is a
# piece of text, often a word. The answer is a number for every token the model knows, 2,256 here,
# 128,256 in Llama 3. The larger the number, the more likely the token.

# %%
prompt = "First Citizen:\nBefore we proceed any further, hear me"
logits = npllama.forward(model.params, model.config, model.tokenizer.encode(prompt, bos=True))[-1]
best = np.argsort(-logits)[:5]
table(["token", "its number"], [(repr(model.tokenizer.piece(i)), logits[i]) for i in best])

# %% [markdown]
# The model has never been told a rule of grammar, and its first choice is the word Shakespeare
# wrote, in a play that it was trained on. How are these numbers computed? We begin at the end, with
# the last operation of every Llama, because it is the simplest one and nearly all others are of its
# kind: a matrix product.
#
# ## One matrix product
#
# Take a vector of two numbers and a matrix of three rows. Each row gives one number of the result:
# multiply entry by entry, and add up.
#
# $$
# W x = \begin{pmatrix} 3 & 1 \\ 0 & 2 \\ -1 & 1 \end{pmatrix} \begin{pmatrix} 1 \\ 2 \end{pmatrix}
#     = \begin{pmatrix} 3 \cdot 1 + 1 \cdot 2 \\ 0 \cdot 1 + 2 \cdot 2 \\ -1 \cdot 1 + 1 \cdot 2 \end{pmatrix}
#     = \begin{pmatrix} 5 \\ 4 \\ 1 \end{pmatrix}
# $$

# %%
x = np.array([1, 2], np.float32)
W = np.array([[3, 1], [0, 2], [-1, 1]], np.float32)
print(W @ x, engine.linear(x, W))

# %% [markdown]
# `engine.linear` is the function that the model itself uses. Two ways to read this product will
# return in every notebook:
#
# - **Each row asks a question of x.** The dot product of two vectors is large if they point in the
#   same direction, zero if they are perpendicular, negative if they point in opposite directions.
#   Three rows, three questions, three answers.
# - **The result has as many numbers as W has rows.** A weight is stored as `[out, in]`, so
#   `W.shape` reads "three out, two in".
#
# Usually there are many vectors at once, one for each token, as the rows of a matrix `x [T, in]`.
# Then $y = x W^\top$, and `y[t]` depends on `x[t]` alone.

# %%
rows = np.array([[1, 2], [0, 1], [2, -1], [-1, -2]], np.float32)
print(engine.linear(rows, W))

# %% [markdown]
# ### Exercise: `linear`
#
# Write this product yourself. It should work for a single vector `[in]`, for rows `[T, in]`, and
# for any number of axes before the last one.


# %% tags=["exercise"]
def linear(x, weight):
    raise NotImplementedError


grade(linear)


# %% tags=["answer"]
def linear(x, weight):
    return x @ weight.T


# %% [markdown]
# The transpose is easily forgotten. With a square matrix nothing complains, and every number is
# wrong: `x @ weight` is one of the commonest mistakes in ports of Llama.
#
# ## A table of vectors
#
# Where does the vector x come from? A model can't multiply words, so each token has a row in a
# table, the **embedding**. The table is learned: at first its numbers are random, and training
# moves them until the predictions are good.

# %%
E = engine.widen(model.params["tok_embeddings.weight"])  # from 16 bits to float32
print(E.shape, "= vocabulary x width")
king = model.tokenizer.encode(" king")[0]
print(f"' king' is token {king}, and its row begins", E[king, :6].round(2))

# %% [markdown]
# The six numbers mean nothing by themselves. But directions do: tokens that are used alike end up
# pointing in similar directions. The measure of that is the dot product of two rows divided by
# their lengths, the cosine: 1 for the same direction, 0 for perpendicular ones. Here is every
# token's cosine with ` king`, which is again one matrix product.


# %%
def nearest(text, n=10):
    """Return the tokens whose rows have the largest cosine with a token's row."""
    unit = E / np.linalg.norm(E, axis=-1, keepdims=True)
    cosines = engine.linear(unit[model.tokenizer.encode(text)[0]], unit)
    best = np.argsort(-cosines)[1 : n + 1]  # the first is the token itself
    return [repr(model.tokenizer.piece(i)) for i in best], cosines[best]


bars(*nearest(" king"), title="tokens nearest to ' king'", unit="cosine")
plt.show()

# %% [markdown]
# Nobody told the model what a king is. It has read a megabyte of plays, and tokens that occur in
# similar places got similar rows. Try `nearest(" me")` or `nearest(" love")`. With 2.8 million
# numbers and one author, not every neighbour makes sense.
#
# ## Logits: the last product
#
# At the end of the computation the model has a vector x of the same width, 192, and multiplies it
# by a matrix with one row for each token. The results are called **logits**. In this model, as in
# Llama 3.2, that matrix *is* the embedding: token i gets the number $x \cdot E_i$. The question
# that row i asks of x is: "do you want me next?"
#
# What if we skip everything in between, and take for x the embedding of the last token itself?

# %%
shortcut = engine.linear(E[king], E)
best = np.argsort(-shortcut)[:5]
table(["token", "logit"], [(repr(model.tokenizer.piece(i)), shortcut[i]) for i in best])

# %% [markdown]
# **Question.** A model without any layer in between predicts that ` king` follows ` king`. Why
# must a token's own row nearly always win?

# %% [markdown] tags=["answer"]
# The logit of the token itself is the dot product of its row with itself: the square of its
# length. Another row wins only if it is longer in that direction: `E[i] · x > x · x`. With tied
# embeddings a model without layers therefore repeats its last token.
#
# The layers in between have to turn the vector of " king" into a vector that points at what
# follows. That is what the other notebooks are about.

# %% [markdown]
# With its six layers the model does better. `npllama.record` runs it and keeps every intermediate
# array. `norm` is the vector before the last product; multiply it by E, and you have the logits
# that `forward` returned.

# %%
seen = npllama.record(model, model.tokenizer.encode(prompt, bos=True))
x = seen["norm"][-1]
print("x has", x.size, "numbers; logits from it:", engine.linear(x, E).size)
print(
    "largest difference to forward's logits below 0.0001:",
    bool(np.abs(engine.linear(x, E) - logits).max() < 1e-4),
)

# %% [markdown]
# ## From logits to probabilities
#
# A logit of 8 says little: is that much? Probabilities must not be negative and must sum to 1.
# **Softmax** does both: take the exponential of each, and divide by the sum.
#
# $$
# p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}
# $$
#
# A worked example with three logits, 2, 1 and 0: the exponentials are 7.39, 2.72 and 1, their sum
# is 11.11.

# %%
z = np.array([2, 1, 0], np.float32)
print("exponentials ", np.exp(z).round(2), " sum", np.exp(z).sum().round(2))
print("probabilities", ops.softmax(z).round(3))

# %% [markdown]
# Each step of 1 in the logits is a factor of e ≈ 2.72 in the probabilities, wherever the step is.
# So adding the same number to all logits changes nothing:

# %%
print(ops.softmax(z + 10).round(3), ops.softmax(z - 5).round(3))
with np.errstate(over="ignore", invalid="ignore"):
    big = np.array([1000, 999, 998], np.float32)
    print("straight from the formula:", np.exp(big) / np.exp(big).sum())
print("npllama:                  ", ops.softmax(big).round(3))

# %% [markdown]
# The formula as it stands fails at 1000, since $e^{1000}$ is no number that a float32 can hold:
# infinity divided by infinity is NaN. npllama uses the freedom of the last cell. It subtracts the
# largest logit first; then the largest exponential is $e^0 = 1$, and nothing can overflow. This is
# the whole function:

# %%
source(ops.softmax)

# %% [markdown]
# ### Exercise: `softmax`
#
# Write it for any number of axes: the sum goes over the last one. Later notebooks use it on scores
# of which some are -inf, which must give exactly 0.


# %% tags=["exercise"]
def softmax(x):
    raise NotImplementedError


grade(softmax)


# %% tags=["answer"]
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# %% [markdown]
# Now the answer to our question can be drawn: the model's probabilities for the token after "hear
# me".

# %%
p = ops.softmax(logits)
best = np.argsort(-p)[:8]
bars(
    [repr(model.tokenizer.piece(i)) for i in best],
    p[best],
    title='after "... any further, hear me"',
    unit="probability",
)
plt.show()
print(f"the other {len(p) - 8:,} tokens share {1 - p[best].sum():.2f}")

# %% [markdown]
# ## Where do tokens come from?
#
# Why 2,256 tokens, and why these? A text is a sequence of bytes, each from 0 to 255. One could
# make each byte a token.

# %%
text = "hear me speak: café"
print(list(text.encode()))
print(len(text), "characters,", len(text.encode()), "bytes,", len(model.tokenizer.encode(text)), "tokens")

# %% [markdown]
# Bytes as tokens work for every language (é is two bytes, a Chinese character three). But a
# sequence three times as long costs at least three times the computation. Whole words as tokens
# are short, but there are millions of them, and the next text has a new one.
#
# **Byte-pair encoding** lies between the two. Start with bytes. Count which two neighbours occur
# together most often, make this pair a new token, and repeat. Frequent words become one token;
# rare ones stay in pieces; nothing is ever unknown.
#
# Here is one round, on a short text:

# %%
import itertools
from collections import Counter

corpus = list(b"the other theory is that the author bothers them")
pairs = Counter(itertools.pairwise(corpus))
for (left, right), count in pairs.most_common(4):
    print(f"{bytes([left, right])!r:8} {count} times")

# %% [markdown]
# `th` wins, and becomes token 256. In the next round the text has fewer tokens, and the pair
# `(256, "e")` is a candidate too: merges build on merges.


# %%
def learn_merges(ids, rounds):
    """Learn merges as training does: the most frequent pair of neighbours becomes a token, again and again."""
    pieces, merges = [bytes([b]) for b in range(256)], []
    for _ in range(rounds):
        (left, right), count = Counter(itertools.pairwise(ids)).most_common(1)[0]
        merges.append((left, right))
        pieces.append(pieces[left] + pieces[right])
        joined, i = [], 0
        while i < len(ids):
            pair = tuple(ids[i : i + 2]) == (left, right)
            joined.append(len(pieces) - 1 if pair else ids[i])
            i += 1 + pair
        ids = joined
        print(f"{len(pieces) - 1}: {pieces[-1]!r:10} was there {count} times; now {len(ids)} tokens")
    return merges


merges = learn_merges(corpus, 6)

# %% [markdown]
# The tokenizer of this model learned 1,744 merges in this way from Shakespeare, Llama 3's about
# 128,000 from much of the internet. The file `tokenizer.model` is the list of pieces: first the 256
# bytes, printable ones in front, then the merges in the order in which they were learned. The
# number of the line, counted from 0, is the *rank*, and it is the token's id. So 256 + 1,744 =
# 2,000 pieces of text. The other 256 of the 2,256 ids stand for no text; more on them below.

# %%
ranks = model.tokenizer.ranks
pieces = list(ranks)
table(
    ["id", "piece"],
    [(i, repr(pieces[i].decode("utf-8", "replace"))) for i in (0, 255, 256, 257, 300, 800, 1999)],
)

# %% [markdown]
# ## Encoding replays the merges
#
# To encode a new text, the merges are made again **in the order in which they were learned**. Not
# from left to right, and not the longest piece first: always the pair with the lowest rank,
# wherever it stands. Watch it happen to one word:

# %%
rounds = [
    [part for part in parts if part is not None]
    for parts in map(list, tokenizer.merge_rounds(b" proceed", ranks))
]
table(
    ["round", "parts"], [(i, " ".join(repr(part.decode()) for part in parts)) for i, parts in enumerate(rounds)]
)

# %% [markdown]
# npllama's function does this with a heap of candidates, so that a long word doesn't search all
# its pairs again in each round:

# %%
source(tokenizer.merge_rounds)

# %% [markdown]
# ### Exercise: `byte_pair`
#
# Yours may be slow and simple. `ids` are bytes, and row i of `merges` is the pair that becomes
# token 256 + i. Merge until no pair of neighbours is in the list.


# %% tags=["exercise"]
def byte_pair(ids, merges):
    raise NotImplementedError


grade(byte_pair)

# %% tags=["answer"]
import itertools


def byte_pair(ids, merges):
    ids = ids.tolist()
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges.tolist())}
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]
        if not found:
            return np.array(ids)
        rank, i = min(found)  # the lowest rank, and of those the leftmost
        ids[i : i + 2] = [256 + rank]


# %% [markdown]
# **Question.** With merges `h e`, `t he` and `t h` in this order, how is "the" encoded, and how
# would it be if pairs merged from left to right?

# %% [markdown] tags=["answer"]
# `h e` was learned first, so it merges first: t, he. Then `t he` merges: one token, "the".
#
# From left to right `t h` would come first: th, e. No merge joins these two, and the result would
# be two tokens that the model has hardly ever seen in this place. The text is the same, and so is
# its decoding; only the model's predictions get worse. A bug of this kind is hard to notice.

# %% [markdown]
# ## Tokens at work
#
# Before merging, Llama 3 splits a text at spaces, digits and punctuation, and merges never cross
# such a border. A space belongs to the word after it. That is why the token is `' king'` and not
# `'king'`.

# %%
sentence = "Don't panic: 42 llamas hear me"
ids = model.tokenizer.encode(sentence)
table(["id", "piece"], [(i, repr(model.tokenizer.piece(i))) for i in ids])

# %% [markdown]
# A tokenizer is good at what it has learned from. Count how many tokens this one, Shakespeare's,
# needs for other texts:

# %%
texts = {
    "Shakespeare": "Before we proceed any further, hear me speak.",
    "modern English": "The server returned an unexpected status code.",
    "German": "Der Bundestag hat das Gesetz gestern verabschiedet.",
    "Python": "for i in range(10): print(f'{i:>3}')",
    "Chinese": "北京是中华人民共和国的首都。",
}
per_token = [len(text.encode()) / len(model.tokenizer.encode(text)) for text in texts.values()]
bars(list(texts), per_token, title="bytes per token, Shakespeare's tokenizer", unit="bytes per token")
plt.show()

# %% [markdown]
# For Chinese it has no merges at all: each byte is a token. A user of that language would pay
# three tokens for each character, and that is one reason why Llama 3's vocabulary is four times as
# large as Llama 2's.
#
# **Question.** Why not a vocabulary of a million tokens, then? Think of the two matrices you have
# met.

# %% [markdown] tags=["answer"]
# The embedding and the output matrix have one row for each token. At a width of 4,096 a million
# rows are 4.1 billion numbers each: as much as half of Llama 3 8B. The last product would cost
# more than half as much as all layers together. And most rows would belong to tokens so rare that
# training hardly ever moves them.

# %% [markdown]
# The last 256 ids stand for no text: they mark where a text begins and ends, and who speaks (most
# of them are spare). `bos=True` puts the first of them, BOS, in front. Every training text began
# with it, so a prompt without it is something that the model has never seen.

# %%
print(model.tokenizer.encode("hear me", bos=True))
print([model.tokenizer.piece(i) for i in model.tokenizer.encode("hear me", bos=True)])

# %% [markdown]
# ## What you have now
#
# - The last step of every Llama is one matrix product, `[V, D]` times the vector of the last
#   token.
# - Softmax makes probabilities of its logits. Subtracting the largest logit changes nothing, and
#   keeps `exp` from overflowing.
# - Tokens are made by merging bytes, and encoding replays the merges in the order in which they
#   were learned.
#
# More: [the walkthrough](../walkthrough.md) goes through all steps of one prompt, and
# `npllama walkthrough-tokenizer "a sentence of yours"` through the tokenizer's.
#
# What is missing is everything between the first table and the last product. A vector that knows
# only its own token can only repeat it. Next: [how tokens get to know of each
# other](2-attention.ipynb).
