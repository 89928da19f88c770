"""`npllama plot`: pictures of one pass, drawn with matplotlib from the activations that the taps record.

| kind | shows |
|---|---|
| rope | how RoPE rotates each pair of a query at one position; the frequencies, scaled and unscaled |
| attention | one head's scores, masked scores and softmax, and every head of the layer; or the heads that are chosen |
| mask | which keys each query may attend to |
| residual | the residual stream's norm, layer by layer |
| logit-lens | the likeliest next token after each layer, at each position |
| tokens | the text, coloured by token, with ids |
| error | a comparison's errors and their noise floor, layer by layer |

Colours are viridis and cividis for sizes, PuOr for signed numbers, Okabe and Ito's eight for categories: none of them relies on
telling red from green.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import ops
from ..checkpoint import Model, foreign
from ..config import Config
from ..errors import shown
from ..golden.compare.names import place
from ..golden.trace import Recording, Selection, record
from .figure import CHAR, LINE, POINTS, SMALL, Sheet, cells, cut, drawable, label_between, label_cells, label_decades, show
from .lens import lens_names, logit_lens, residual_names, residual_norms, token_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import SubFigure

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)  # Okabe & Ito 2008, "Color Universal Design"; black is the eighth
GREY = "#767676"
MASKED = {"facecolor": "#ebebeb", "edgecolor": "#a8a8a8"}  # hatched: no colour of a scale looks like it
MOST_PAIRS = 64  # circles that can be told apart in one figure
LONGEST, SHORTER = 24, 13  # columns of a token at an axis, and where there is less room
LENS_CELL = 6 * CHAR  # inches: five letters and a margin

Report = dict[str, Any]  # a comparison, as compare.report.as_dict() returns it


@dataclass(frozen=True)
class Subject:
    """The subject of a picture: a pass of these tokens, and for some kinds one layer, some heads and one position of it.

    heads     None for all
    position  None for the last
    """

    model: Model
    ids: Sequence[int]
    layer: int = 0
    heads: tuple[int, ...] | None = (0,)
    position: int | None = None

    def check(self, kind: str) -> None:
        """Raise ValueError for a layer, head or position that there isn't, or that this kind doesn't draw."""
        config = self.model.config
        chosen = [("layer", self.layer, config.n_layers), *(("head", head, config.n_heads) for head in self.heads or ())]
        for name, value, n in chosen:
            if not 0 <= value < n:
                raise ValueError(f"{name} {value} is not in this model, which has {name}s 0 to {n - 1}")
        if kind != "attention" and (self.heads is None or len(self.heads) != 1):
            raise ValueError(f"{kind} draws one head, and attention several: expected --head N")
        if self.position is not None:
            if kind != "rope":
                raise ValueError(f"{kind} draws all positions, and rope one: --position is rope's")
            if not 0 <= self.position < len(self.ids):
                raise ValueError(f"position {self.position} is not in this text, which has positions 0 to {len(self.ids) - 1}")

    @property
    def labels(self) -> list[str]:
        """Return the visible text of each token."""
        return token_labels(self.model.tokenizer, self.ids)

    @property
    def head(self) -> int:
        """Return the head of a plot that draws only one."""
        return self.heads[0] if self.heads else 0

    def record(self, *names: str) -> Recording:
        """Run the pass and keep these activations."""
        return record(self.model, list(self.ids), selection=Selection(taps=names))


def plot(kind: str, subject: Subject, out: Path | None, size: tuple[int, int] | None = None, font: float | None = None) -> None:
    """Draw one of KINDS into a file, or into a window. Raises ValueError, and ImportError without matplotlib.

    size  of the picture, in pixels
    font  the text's size, in pixels
    """
    subject.check(kind)
    show(functools.partial(KINDS[kind], subject=subject), out, size, font)


def plot_error(report: Report, out: Path | None, size: tuple[int, int] | None = None, font: float | None = None) -> None:
    """Draw a comparison, as compare.report.as_dict() returns it."""
    show(functools.partial(draw_error, report=report), out, size, font)


# ----------------------------------------------------------------------------------------------------------------------- rope


def draw_rope(sheet: Sheet, subject: Subject) -> None:
    """Draw the query of one token before and after RoPE, pair by pair, and the frequencies."""
    config, layer, head = subject.model.config, subject.layer, subject.head
    position = len(subject.ids) - 1 if subject.position is None else subject.position
    prefix = f"layers.{layer}.attention."
    seen = subject.record(prefix + "q", prefix + "q_rope")
    before, after = (
        x[position, head, 0::2].astype(np.float64) + 1j * x[position, head, 1::2]
        for x in (seen[prefix + "q"], seen[prefix + "q_rope"])
    )
    token = cut(drawable(subject.labels)[position], LONGEST)
    n_pairs = config.head_dim // 2
    pairs = range(0, n_pairs, math.ceil(n_pairs / MOST_PAIRS))
    height = sheet.fit(sheet.width * 9 / 16)
    left, right = sheet.figure.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1]).flat
    rows, columns = tiling(len(pairs), sheet.width * 1.25 / 2.25, height - 4 * LINE, 1.5 * LINE)
    explanation = textwrap.wrap(
        "each pair of the query, grey before and coloured after; pair: angle modulo 360°",
        int(sheet.width * 1.25 / 2.25 / (CHAR * 9 / SMALL)),
    )
    left.suptitle(
        "\n".join([f"RoPE at position {position}, {token}: layer {layer}, head {head}", *explanation]),
        fontsize=9,
    )
    colours = _colours("viridis", n_pairs)
    grid = left.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
        axes.set_frame_on(False)
    for j, axes in zip(pairs, grid, strict=False):
        _circle(axes)
        angle = "–"
        if abs(before[j]) > 0:
            _arrow(axes, before[j] / abs(before[j]), "#b0b0b0", 2.5)
            _arrow(axes, after[j] / abs(after[j]), colours[j], 1.6)
            angle = f"{round(np.degrees(np.angle(after[j] / before[j]))) % 360}°"
        axes.set_title(f"{j}: {angle}", fontsize=SMALL, pad=1)
    _draw_frequencies(right.subplots(), config, height)


def _circle(axes: Axes) -> None:
    angle = np.linspace(0, 2 * math.pi, 60)
    axes.plot(np.cos(angle), np.sin(angle), color="#dddddd", linewidth=0.8)


def _arrow(axes: Axes, z: complex, colour: object, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axes.annotate("", xy=(z.real, z.imag), xytext=(0, 0), arrowprops=style)


def _draw_frequencies(axes: Axes, config: Config, height: float) -> None:
    pairs = np.arange(config.head_dim // 2)
    unscaled = ops.rope_frequencies(config.head_dim, config.rope_theta, None, np.float64)
    label = "this model's" if config.rope_scaling is None else "unscaled"
    axes.plot(pairs, unscaled, "o-", color=BLUE, markersize=4, label=label)
    lowest = unscaled
    if config.rope_scaling is not None:
        lowest = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)
        axes.plot(pairs, lowest, "s--", color=VERMILION, markersize=3.5, label="scaled: this model's")
    context = 2 * math.pi / config.max_seq_len
    axes.axhline(context, color=GREY, linestyle=":", label=f"one rotation in {config.max_seq_len:,} positions, the context")
    axes.set_title("frequencies" + ("; this model doesn't scale them" if config.rope_scaling is None else ""))
    axes.set(xlabel="pair", ylabel="radians per position", yscale="log")
    least, most = min(lowest.min(), context) / 2, 2.0
    axes.set_ylim(least, most)
    label_decades(axes.yaxis, least, most, 0.8 * height)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=SMALL)


# ------------------------------------------------------------------------------------------------------------------ attention


def draw_attention(sheet: Sheet, subject: Subject) -> None:
    """Draw one head's scores, masked scores and softmax, and the weights of every head; of several heads, their weights."""
    if subject.heads is None or len(subject.heads) != 1:
        return _draw_heads(sheet, subject)
    from matplotlib.colors import Normalize

    config, layer, head = subject.model.config, subject.layer, subject.head
    prefix = f"layers.{layer}.attention."
    seen = subject.record(*(prefix + name for name in ("q_rope", "k_rope", "scores", "weights")))
    keys = seen[prefix + "k_rope"].swapaxes(0, 1)  # [G, S, K]
    no_mask = np.zeros((), keys.dtype)
    unmasked = ops.attention_scores(seen[prefix + "q_rope"], keys, no_mask)[head]
    masked, weights = seen[prefix + "scores"][head], seen[prefix + "weights"]  # [T, S], [H, T, S]
    hidden = np.isneginf(masked)

    labels = drawable(subject.labels)
    natural = sheet.width * 9 / 16
    lower = math.ceil(config.n_heads / int(sheet.width - 1)) * 1.4 + 4 * LINE  # inches for all heads, an inch each
    height = sheet.fit(natural * 0.66 + max(natural * 0.34, lower))
    lower = height - natural * 0.66 if sheet.height is None else height * 0.34
    upper = height - lower
    top, bottom = sheet.figure.subfigures(2, 1, squeeze=False, height_ratios=[upper, lower]).flat
    cell = min(sheet.width / 3 - 1.3, upper - 1.6) / len(labels)
    maps = top.subplots(1, 3)
    largest = float(np.abs(unmasked).max())
    scores = Normalize(-largest, largest)
    heat_map(maps[0], unmasked, None, "PuOr_r", scores, f"layer {layer}, head {head}\nscores q·k / √K", cell)
    image = heat_map(maps[1], masked, hidden, "PuOr_r", scores, "masked: hatched is −∞", cell)
    top.colorbar(image, ax=maps[:2], label="score (linear scale)", shrink=0.8, pad=0.01)
    image = heat_map(maps[2], weights[head], hidden, "viridis", _weights_norm(), "softmax: each row sums to 1", cell)
    _weights_bar(top, image, maps[2])
    longest = LONGEST if cell >= LINE else SHORTER
    for axes in maps:
        label_cells(axes.xaxis, labels, cell, longest, rotation=90)
        axes.set_xlabel("key position")
        axes.set_yticks([])
    label_cells(maps[0].yaxis, labels, cell, longest)
    maps[0].set_ylabel("query position")

    bottom.suptitle(f"all heads of layer {layer}: softmax, axes and colours as above", fontsize=10)
    rows, columns = tiling(config.n_heads, sheet.width - 1, lower - 3 * LINE, 2 * LINE)
    side = (sheet.width - 1) / columns
    for h, axes in enumerate(bottom.subplots(rows, columns, squeeze=False).flat):
        if h >= config.n_heads:
            axes.axis("off")
            continue
        name = f"head {h}" if side > 9 * CHAR else str(h)
        heat_map(axes, weights[h], hidden, "viridis", _weights_norm(), name, side / len(labels), numbers=False)
        axes.set(xticks=[], yticks=[])
        axes.title.set(fontsize=SMALL, fontweight="bold" if h == head else "normal")


def _draw_heads(sheet: Sheet, subject: Subject) -> None:
    """Draw the weights of several heads, with the tokens at the left and lower maps."""
    config, layer = subject.model.config, subject.layer
    heads = range(config.n_heads) if subject.heads is None else subject.heads
    prefix = f"layers.{layer}.attention."
    seen = subject.record(prefix + "scores", prefix + "weights")
    labels = drawable(subject.labels)
    margin = min(max(map(cells, labels)) + 3, SHORTER) * CHAR + 3 * LINE  # of the tokens at the left and below
    height = sheet.fit(sheet.width * 9 / 16)
    rows, columns = tiling(len(heads), sheet.width - margin - 0.9, height - margin, 2 * LINE)
    side = min((sheet.width - margin - 0.9) / columns, (height - margin) / rows - 2 * LINE) - LINE
    grid = sheet.figure.subplots(rows, columns, squeeze=False)
    cell = side / len(labels)
    for i, (axes, head) in enumerate(zip(grid.flat, heads, strict=False)):
        hidden = np.isneginf(seen[prefix + "scores"][head])
        name = f"layer {layer}, head {head}" if side > 16 * CHAR else f"head {head}" if side > 7 * CHAR else str(head)
        image = heat_map(axes, seen[prefix + "weights"][head], hidden, "viridis", _weights_norm(), name, cell)
        axes.set(xticks=[], yticks=[])
        if i % columns == 0:
            label_cells(axes.yaxis, labels, cell, SHORTER)
            axes.set_ylabel("query position", fontsize=SMALL)
        if i + columns >= len(heads):  # none below it
            label_cells(axes.xaxis, labels, cell, SHORTER, rotation=90)
            axes.set_xlabel("key position", fontsize=SMALL)
    for axes in grid.flat[len(heads) :]:
        axes.axis("off")
    _weights_bar(sheet.figure, image, grid.ravel().tolist())


def tiling(n: int, width: float, height: float, title: float) -> tuple[int, int]:
    """Find the rows and columns in which n squares, each below a title, are largest.    all in inches -> rows, columns"""

    def side(rows: int) -> float:
        return min(width / math.ceil(n / rows), height / rows - title)

    rows = max(range(1, n + 1), key=side)
    columns = math.ceil(n / rows)
    return math.ceil(n / columns), columns


def heat_map(
    axes: Axes,
    x: np.ndarray,
    hidden: np.ndarray | None,
    colours: str,
    norm: Normalize,
    title: str,
    cell: float,
    numbers: bool = True,
) -> Any:
    """Draw a cell for each number; where `hidden` says so, the hatched ground. Cells with room have their numbers."""
    if hidden is None:
        hidden = np.zeros(x.shape, bool)
    axes.patch.set(hatch="////" if cell > 0.05 else "///", **MASKED)
    image = axes.imshow(np.ma.masked_where(hidden, x), cmap=colours, norm=norm, interpolation="nearest")
    axes.set_title(title)
    if numbers and cell >= 0.22:
        for row, column in np.argwhere(hidden & np.isneginf(x)):
            axes.text(column, row, "−∞", ha="center", va="center", fontsize=7)
    if numbers and cell >= 0.42:
        ground = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
        for row, column in np.argwhere(~hidden):
            axes.text(column, row, f"{x[row, column]:.2f}", ha="center", va="center", fontsize=7, bbox=ground)
    return image


def _weights_norm() -> Normalize:
    """Map weights to colours by their square root: most are small, and would all be dark."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)


def _weights_bar(figure: SubFigure, image: Any, ax: Any) -> None:
    """Add the colour bar of attention weights."""
    bar = figure.colorbar(image, ax=ax, label="weight (square-root scale)", shrink=0.8, pad=0.01)
    bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1], labels=["0", "0.01", "0.1", "0.25", "0.5", "1"], fontsize=SMALL)


def draw_mask(sheet: Sheet, subject: Subject) -> None:
    """Draw where the scores of the pass are -inf."""
    from matplotlib.colors import ListedColormap, Normalize

    name = f"layers.{subject.layer}.attention.scores"
    hidden = np.isneginf(subject.record(name)[name][subject.head])  # [T, S]
    labels, T = drawable(subject.labels), len(hidden)
    height = sheet.fit(sheet.width * 9 / 16, sheet.width * 10 / 16)
    cell = (min(sheet.width, height) - 2) / T
    axes = sheet.figure.subplots()
    zeros = np.where(hidden, -np.inf, 0.0)
    sky: Any = ListedColormap([SKY])
    heat_map(axes, zeros, hidden, sky, Normalize(-1, 1), "the causal mask: blue is 0, hatched is −∞", cell, numbers=False)
    if cell >= 0.22:
        for row, column in np.ndindex(hidden.shape):
            text = "−∞" if hidden[row, column] else "0"
            axes.text(column, row, text, ha="center", va="center", fontsize=7 if cell < 0.5 else POINTS)
    label_cells(axes.xaxis, labels, cell, LONGEST, rotation=90)
    label_cells(axes.yaxis, labels, cell, LONGEST)
    axes.set(xlabel="key position", ylabel="query position")


# ------------------------------------------------------------------------------------------------------- residual, logit lens


def draw_residual(sheet: Sheet, subject: Subject) -> None:
    """Draw the norm of each token's vector after each attention and each layer."""
    config, T = subject.model.config, len(subject.ids)
    norms = residual_norms(subject.record(*residual_names(config)), config)  # [1 + 2L, T]
    labels = drawable(subject.labels)
    height = sheet.fit(sheet.width * 9 / 16)
    axes = sheet.figure.subplots()
    depth = np.arange(len(norms)) / 2  # 0.5 is after layer 0's attention, 1 after layer 0
    colours = _colours("viridis", T)
    for t in range(T):
        axes.plot(depth, norms[:, t], color=colours[t], linewidth=0.9, alpha=0.35 if T > 40 else 0.8)
    if T > 2:
        axes.plot(depth, np.median(norms, axis=1), color="black", linewidth=2.2, label="median of the tokens")
    largest = int(np.argmax(norms[-1]))
    name = f"largest at the end: position {largest}, {cut(labels[largest], LONGEST)}"
    axes.plot(depth, norms[:, largest], "--", color=VERMILION, linewidth=2.2, label=name)
    axes.set_yscale("log")
    least, most = max(float(norms.min()), 1e-30) / 1.2, max(float(norms.max()), 1e-30) * 1.2
    axes.set(xlim=(-0.05, config.n_layers + 0.05), ylim=(least, most), ylabel="norm ‖x‖ of the residual stream")
    label_decades(axes.yaxis, least, most, 0.8 * height)
    inches = (sheet.width - 1) / config.n_layers
    label_between(axes.xaxis, range(config.n_layers + 1), [str(i) for i in range(config.n_layers)], inches)
    axes.set_xlabel("layer: after its attention in the middle, after its feed-forward at the end")
    axes.set_title("the residual stream's norm, a line for each token" + ("; dark is early, bright late" if T > 1 else ""))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=SMALL)


def draw_logit_lens(sheet: Sheet, subject: Subject) -> None:
    """Draw the likeliest next token after each layer at each position, its probability as colour; long prompts in strips."""
    config, T = subject.model.config, len(subject.ids)
    ids, p = (x[..., 0] for x in logit_lens(subject.model, subject.record(*lens_names(config)), 1))  # [1 + L, T]
    texts = drawable([*token_labels(subject.model.tokenizer, ids.ravel()), *subject.labels])
    labels = texts[ids.size :]
    margin, row, ticks = 1.9, 1.2 * LINE, 4 * LINE  # inches: next to the cells, of a cell, below and above a strip
    strips = math.ceil(T / max(int((sheet.width - margin) / LENS_CELL), 1))
    columns = math.ceil(T / strips)  # strips of the same length
    height = sheet.fit(strips * (len(ids) * row + ticks) + 3 * LINE)
    room = (height - 3 * LINE - strips * ticks) / strips / row  # layers that fit
    stride = math.ceil(len(ids) / max(room + 0.01, 1))
    layers = list(range(len(ids)))[::-stride][::-1]  # the last one always
    longest = max(int((sheet.width - margin) / columns / CHAR) - 1, 1)
    which = "each" if stride == 1 else f"every {_ordinal(stride)}"
    grid = sheet.figure.subplots(strips, 1, squeeze=False).ravel().tolist()
    for strip, axes in enumerate(grid):
        at = slice(strip * columns, min((strip + 1) * columns, T))
        probability = p[layers, at]
        image = axes.imshow(probability, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest")
        for i, column in np.ndindex(probability.shape):
            text = cut(texts[layers[i] * T + at.start + column], longest)
            colour = "white" if probability[i, column] < 0.55 else "black"
            axes.text(column, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
        axes.set_xlim(-0.5, columns - 0.5)
        names = [f"{i}\n{cut(labels[i], longest)}" for i in range(T)[at]]
        axes.set_xticks(range(len(names)), names, fontsize=SMALL)
        names = ["embedding" if layer == 0 else f"layer {layer - 1}" for layer in layers]
        axes.set_yticks(range(len(layers)), names, fontsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_title(f"logit lens: the likeliest next token after {which} layer, by the final norm and output matrix")
    grid[-1].set_xlabel("position and its token; · is a space, ↵ a newline")
    shrink = min(1.0, 4 / height)
    bar = sheet.figure.colorbar(image, ax=grid, label="probability (linear scale)", shrink=shrink, aspect=25, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL)


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


# --------------------------------------------------------------------------------------------------------------------- tokens


def draw_tokens(sheet: Sheet, subject: Subject) -> None:
    """Draw the text as boxes, one per token, its id below; adjacent ones differ in colour, and a newline ends the line."""
    import matplotlib
    from matplotlib.patches import Rectangle

    labels = drawable(subject.labels)
    matplotlib.rcParams["font.family"] = ["DejaVu Sans Mono", *matplotlib.rcParams["font.family"]]
    widths = [max(cells(label), 0.75 * len(str(id))) + 0.8 for label, id in zip(labels, subject.ids, strict=True)]
    cell, line, title = 0.11, 0.5, 0.5  # inches, at a text of 13 points
    scale = 1.0 if sheet.height is None else 1.8
    while True:  # as large as fits, if the height is given
        columns = max((sheet.width - 0.4) / (cell * scale), *widths)
        places = _in_lines(labels, widths, columns)
        needed = line * scale * (places[-1][1] + 1) + title
        if sheet.height is None or needed <= sheet.height or scale < 0.2:
            break
        scale *= 0.95
    scale *= min(1.0, (sheet.width - 0.4) / (cell * scale) / columns)  # one token longer than a line
    height = sheet.fit(needed)
    axes = sheet.figure.subplots()
    axes.set(xlim=(-0.5, columns + 0.5), ylim=((height - title) / (line * scale) - 0.1, -0.1))
    axes.axis("off")
    axes.set_title(f"{len(labels)} token{'s' * (len(labels) != 1)}; · is a space, ↵ a newline", loc="left")
    tints = [_tint(colour) for colour in (SKY, ORANGE, GREEN, YELLOW, PURPLE)]
    for i, ((x, y), width) in enumerate(zip(places, widths, strict=True)):
        box = {"facecolor": tints[i % len(tints)], "edgecolor": "#606060", "linewidth": 0.5}
        axes.add_patch(Rectangle((x + 0.06, y), width - 0.12, 0.52, **box))
        axes.text(x + width / 2, y + 0.27, labels[i], ha="center", va="center", fontsize=12 * scale)
        axes.text(x + width / 2, y + 0.7, str(subject.ids[i]), ha="center", va="center", fontsize=8 * scale, color="#404040")


def _in_lines(labels: Sequence[str], widths: Sequence[float], longest: float) -> list[tuple[float, int]]:
    """Place boxes of these widths in lines.    -> for each its left edge and its line"""
    places, x, y = [], 0.0, 0
    for label, width in zip(labels, widths, strict=True):
        if x and x + width > longest:
            x, y = 0.0, y + 1
        places.append((x, y))
        x += width
        if label.endswith("↵"):
            x, y = 0.0, y + 1
    return places


# ---------------------------------------------------------------------------------------------------------------------- error


def draw_error(sheet: Sheet, report: Report) -> None:
    """Draw each activation's error and its floor, in the order of computation; then the worst of each layer, in floors."""
    measured = [a for a in report["activations"] if a["accumulated"]]
    if not measured:
        raise ValueError("the comparison measured no activation: there is nothing to draw")
    entries = [SimpleNamespace(name=a["name"], place=place(a["name"]), passed=a["passed"]) for a in measured]
    error, floor, ratio = (np.array([float(a["accumulated"][key]) for a in measured]) for key in ("error", "floor", "ratio"))
    for values in (error, floor, ratio):  # an axis of more decades than these can't be drawn
        values[values > 1e100], values[values < 1e-100] = np.inf, 0
    passed = np.array([a.passed for a in entries])
    limit = None if report["limit"] is None else float(report["limit"])  # JSON's integers have any size, NumPy's 64 bits
    groups = _by_layer(entries)
    height = sheet.fit(sheet.width * 9 / 16)
    upper, lower = sheet.figure.subplots(2, 1, height_ratios=[1.2, 1])
    x = np.arange(len(entries))
    finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in (error, floor)])
    bottom, ceiling = (finite.min() / 3, finite.max() * max(30, limit or 0)) if finite.size else (1e-9, 1.0)

    def inside(values: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num(values, nan=ceiling, posinf=ceiling), bottom, ceiling)

    upper.plot(x, inside(floor), color=GREY, linewidth=2, label="noise floor")
    if limit is not None:
        upper.plot(x, inside(limit * floor), "--", color=GREY, linewidth=1.2, label=f"limit: {limit:g} times the floor")
    upper.plot(x, inside(error), "o-", color=BLUE, markersize=3, linewidth=1, label="error; at the bottom edge: none")
    if not passed.all():
        upper.plot(x[~passed], inside(error)[~passed], "X", color=VERMILION, markersize=7, label="different")
    bounds = [*(indices[0] - 0.5 for indices in groups.values()), len(x) - 0.5]
    for left, right in list(itertools.pairwise(bounds))[1::2]:
        upper.axvspan(left, right, color="#f2f2f2", zorder=0)
    upper.set(xlim=(-0.5, len(x) - 0.5), ylim=(bottom, ceiling), ylabel="relative error")
    label_between(upper.xaxis, bounds, list(groups), (sheet.width - 1) / len(x))

    worst = [float(ratio[indices].max()) for indices in groups.values()]
    failed = [not passed[indices].all() for indices in groups.values()]
    heights = np.array(worst)
    sound = heights[np.isfinite(heights)]
    edge = max(10 * (limit or 1), 3 * sound.max() if sound.size else 1)
    colours = [VERMILION if bad else BLUE for bad in failed]
    bars = lower.bar(range(len(worst)), np.clip(np.nan_to_num(heights, nan=edge, posinf=edge), 0.01, edge), color=colours)
    for bar, bad in zip(bars, failed, strict=True):
        bar.set_hatch("xx" if bad else None)
    if limit is not None:
        lower.axhline(limit, color=GREY, linestyle="--", linewidth=1.2)
    lower.axhline(1, color=GREY, linewidth=2)
    lower.set(xlabel="layer; hatched: an activation of it is different", ylabel="worst error,\nin noise floors")
    lower.set(xlim=(-0.6, len(worst) - 0.4), ylim=(0.01, edge))
    label_between(lower.xaxis, [i - 0.5 for i in range(len(worst) + 1)], list(groups), (sheet.width - 1) / len(worst))
    lower.tick_params(axis="x", which="major", length=0)
    for axes, least, most, share in ((upper, bottom, ceiling, 0.4), (lower, 0.01, edge, 0.3)):
        axes.set_yscale("log")
        axes.set_ylim(least, most)
        label_decades(axes.yaxis, least, most, share * height)
        axes.grid(axis="y", alpha=0.25)
    if not passed.all():
        first = int(np.argmin(passed))
        at = next(i for i, indices in enumerate(groups.values()) if first in indices)
        _mark_first(upper, first, f"first divergence: {cut(drawable([entries[first].name])[0], 60)}")
        _mark_first(lower, at, "")
    [verdict] = drawable([report["verdict"]])  # it may have a name of the port's
    upper.set_title(cut(verdict, int(sheet.width / 0.088)), loc="left")
    sheet.figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)


def _mark_first(axes: Axes, at: float, text: str) -> None:
    """Mark a place on the x axis by a line, with a text at its top."""
    axes.axvline(at, color=VERMILION, linestyle=":", linewidth=1.5, zorder=1)
    left, right = axes.get_xlim()
    before = at > (left + right) / 2
    offset = {"textcoords": "offset points", "xytext": (-5 if before else 5, -5)}
    ground = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    align = {"ha": "right" if before else "left", "va": "top", "fontsize": SMALL, "color": "#a03c00"}
    if text:
        axes.annotate(text, (at, 1), xycoords=axes.get_xaxis_transform(), bbox=ground, **offset, **align)


def _by_layer(entries: Sequence[SimpleNamespace]) -> dict[str, list[int]]:
    """Group entries by layer, under its number; those before and after the layers have names."""
    groups: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        here = entry.place
        label = {"tok_embeddings": "emb.", "norm": "end", "logits": "end"}.get(here.kind, here.kind)
        label = label if here.layer is None else str(here.layer)
        groups.setdefault(label if here.step is None else f"step {here.step}\n{label}", []).append(i)
    return groups


def read_report(path: Path) -> Report:
    """Read what `npllama compare --report x.json` wrote. Raises ValueError for another file."""
    from ..golden.compare.report import FORMAT

    report: Report = foreign.read_json(path, ValueError, foreign.LONG_LIMIT)
    if report.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a comparison that npllama compare --report x.json wrote")
    expected = {
        "verdict": isinstance(report.get("verdict"), str),
        "limit": "limit" in report and (report["limit"] is None or _is_number(report["limit"], 1e-3, 1e100)),
        "activations": isinstance(report.get("activations"), list),
    }
    if damaged := [key for key, right in expected.items() if not right]:
        raise ValueError(f"{path}: {damaged[0]} is {shown(report.get(damaged[0]))}: not as npllama compare writes it")
    for i, entry in enumerate(report["activations"]):
        if not _is_entry(entry):
            raise ValueError(f"{path}: activations[{i}] is {shown(entry)}: not as npllama compare writes it")
    if not any(entry["accumulated"] for entry in report["activations"]):
        raise ValueError(f"{path}: the comparison measured no activation: there is nothing to draw")
    return report


def _is_entry(entry: object) -> bool:
    """Check that this is what a report says of an activation."""
    if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str) or not name.isprintable():
        return False
    if type(entry.get("passed")) is not bool or "accumulated" not in entry:
        return False
    errors = entry["accumulated"]
    numbers = [errors.get(key) if isinstance(errors, dict) else None for key in ("error", "floor", "ratio")]
    return errors is None or all(_is_number(x) or x in ("inf", "nan") for x in numbers)


def _is_number(x: object, least: float = 0, most: float = sys.float_info.max) -> bool:
    return isinstance(x, int | float) and type(x) is not bool and least <= x <= most


# -------------------------------------------------------------------------------------------------------------------- helpers


def _colours(name: str, n: int) -> np.ndarray:
    """Return n colours of a map, without its brightest, which can't be seen on white.    [n, 4]"""
    import matplotlib

    return matplotlib.colormaps[name](np.linspace(0, 0.9, n))


def _tint(colour: str) -> tuple[float, ...]:
    """Lighten a colour so that black text can be read on it."""
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.45 * (1 - part) for part in to_rgb(colour))


KINDS: dict[str, Callable[..., None]] = {
    "rope": draw_rope,
    "attention": draw_attention,
    "mask": draw_mask,
    "residual": draw_residual,
    "logit-lens": draw_logit_lens,
    "tokens": draw_tokens,
}
