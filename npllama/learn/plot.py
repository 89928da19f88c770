"""`npllama plot`: pictures of one pass, drawn with matplotlib from the activations that the taps show.

| kind | shows |
|---|---|
| rope | how one position rotates each pair of a query; the frequencies, scaled and unscaled |
| attention | one head's scores, masked scores and softmax; every head of the layer |
| mask | which keys each query may attend to |
| residual | the residual stream's norm, layer by layer |
| logit-lens | the likeliest next token after each layer, at each position |
| tokens | the text, coloured by token, with ids |
| error | a comparison's errors and their noise floor, layer by layer |

Colours are viridis and cividis for sizes, PuOr for signed numbers, Okabe and Ito's eight for categories: all can be told apart
without red or green.
"""

from __future__ import annotations

import functools
import io
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import ops
from ..checkpoint import Model, foreign
from ..checkpoint.atomic import write_file
from ..config import Config
from ..errors import shown
from ..golden.compare.names import place
from ..golden.trace import Recording, Selection, record
from .lens import lens_names, logit_lens, residual_names, residual_norms, token_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

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
FORMATS = (".png", ".svg")
MOST_LABELS = 44  # more on one axis can't be read
LONGEST_LABEL = 14

Report = dict[str, Any]  # a comparison, as compare.report.as_dict() returns it


@dataclass(frozen=True)
class Subject:
    """The subject of a picture: a pass of these tokens, and for some kinds one layer and one head of it."""

    model: Model
    ids: Sequence[int]
    layer: int = 0
    head: int = 0

    def check(self) -> None:
        """Raise ValueError for a layer or head that the model lacks."""
        config = self.model.config
        for name, value, n in (("layer", self.layer, config.n_layers), ("head", self.head, config.n_heads)):
            if not 0 <= value < n:
                raise ValueError(f"{name} {value} is not in this model, which has {name}s 0 to {n - 1}")

    @property
    def labels(self) -> list[str]:
        """The visible text of each token."""
        return token_labels(self.model.tokenizer, self.ids)

    def record(self, *names: str) -> Recording:
        """Run the pass and keep these activations."""
        return record(self.model, list(self.ids), selection=Selection(taps=names))


def plot(kind: str, subject: Subject, out: Path | None) -> None:
    """Draw one of KINDS into a file, or into a window. Raises ValueError, and ImportError without matplotlib."""
    subject.check()
    show(functools.partial(KINDS[kind], subject=subject), out)


def plot_error(report: Report, out: Path | None) -> None:
    """Draw a comparison, as compare.report.as_dict() gives it."""
    show(functools.partial(draw_error, report=report), out)


def show(draw: Callable[[Figure], None], out: Path | None) -> None:
    """Call `draw` with an empty figure, and write or show the result. A file appears complete or not at all.

    Raises ValueError for a file that isn't PNG or SVG, and where a window is wanted and there is no display.
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out}: expected a file that ends in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'npllama[learn]'") from None
    # Tokens may hold any character, `$` among them, which must not start a formula.
    settings: Any = {"text.parse_math": False, "font.size": 9, "svg.hashsalt": "npllama", "figure.constrained_layout.use": True}
    with matplotlib.rc_context(settings):
        if out is None:
            _in_a_window(draw)
            return
        from matplotlib.figure import Figure

        figure = Figure()
        draw(figure)
        data, kind = io.BytesIO(), out.suffix.lower()[1:]
        metadata = {"Date": None} if kind == "svg" else None  # the same input is the same file
        figure.savefig(data, format=kind, dpi=110, metadata=metadata)
    write_file(out, data.getvalue())


def _in_a_window(draw: Callable[[Figure], None]) -> None:
    try:
        from matplotlib import pyplot

        figure = pyplot.figure()
    except Exception as error:  # each toolkit has an exception of its own for a missing display
        raise ValueError(f"no window can be opened ({error}): write a file with -o FILE.png") from None
    try:
        if figure.canvas.required_interactive_framework is None:
            raise ValueError("no window can be opened, there is no display: write a file with -o FILE.png")
        draw(figure)
        pyplot.show()
    finally:
        pyplot.close(figure)


# -------------------------------------------------------------------------------------------------------- the text of tokens


def drawable(labels: Iterable[str], longest: int = LONGEST_LABEL) -> list[str]:
    """Shorten labels, with `<U+4F60>` where no installed font has the glyph, and select fonts for the text that follows."""
    import matplotlib

    labels = [label if len(label) <= longest else label[: longest - 1] + "…" for label in labels]
    families, missing = fonts_for("".join(sorted({*"".join(labels)})))
    matplotlib.rcParams["font.family"] = families
    return ["".join(f"<U+{ord(char):04X}>" if char in missing else char for char in label) for label in labels]


@functools.lru_cache(maxsize=8)
def fonts_for(chars: str) -> tuple[list[str], frozenset[str]]:
    """Find font families that together have a glyph for each character, matplotlib's own first; and the characters in none."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")
    regular = [f for f in font_manager.fontManager.ttflist if f.style == "normal" and f.weight in (400, "normal", "regular")]
    others = sorted({(" Sans" not in f.name, f.name): f.fname for f in regular if "Last Resort" not in f.name}.items())
    families: list[str] = []
    missing = set(chars)
    for name, file in [("DejaVu Sans", own), *((name, file) for (_, name), file in others)]:
        if families and not missing:
            break
        try:
            font = font_manager.get_font(file)
        except (OSError, RuntimeError, ValueError):  # one that matplotlib can't draw, such as one of bitmaps
            continue
        has = {char for char in missing if font.get_char_index(ord(char))}
        if has or not families:
            families.append(name)
        missing -= has
    return families, frozenset(missing)


def label_axis(axis: Axis, labels: Sequence[str], rotation: int = 0) -> None:
    """Label an axis of cells with tokens; of many, every n-th with its position before it."""
    stride = math.ceil(len(labels) / MOST_LABELS)
    shown = range(0, len(labels), stride)
    texts = [labels[i] if stride == 1 else f"{i} {labels[i]}" for i in shown]
    axis.set_ticks(list(shown), texts, rotation=rotation, fontsize=7)


# ---------------------------------------------------------------------------------------------------------------------- kinds


def draw_rope(figure: Figure, subject: Subject) -> None:
    """Draw the query of the last token before and after RoPE, pair by pair, and the frequencies."""
    config, layer, head, position = subject.model.config, subject.layer, subject.head, len(subject.ids) - 1
    prefix = f"layers.{layer}.attention."
    seen = subject.record(prefix + "q", prefix + "q_rope")
    before, after = (
        x[position, head, 0::2].astype(np.float64) + 1j * x[position, head, 1::2]
        for x in (seen[prefix + "q"], seen[prefix + "q_rope"])
    )
    token = drawable(subject.labels)[position]
    n_pairs = config.head_dim // 2
    columns = min(8, math.ceil(math.sqrt(1.6 * n_pairs)))
    rows = math.ceil(n_pairs / columns)
    figure.set_size_inches(15, max(5.5, 1.15 * rows + 1.2))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1]).flat
    left.suptitle(f"RoPE rotates the query at position {position} ({token}), pair by pair: layer {layer}, head {head}")
    left.supxlabel("grey: before; coloured: after; the title is the angle, modulo 360°", fontsize=8)
    colours = _colours("viridis", n_pairs)
    for j, axes in enumerate(left.subplots(rows, columns, squeeze=False).flat):
        axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
        axes.set_frame_on(False)
        if j >= n_pairs:
            continue
        _circle(axes)
        if abs(before[j]) > 0:
            _arrow(axes, before[j] / abs(before[j]), "#b0b0b0", 2.5)
            _arrow(axes, after[j] / abs(after[j]), colours[j], 1.6)
            axes.set_title(f"pair {j}: {round(np.degrees(np.angle(after[j] / before[j]))) % 360}°", fontsize=7, pad=1)
    _draw_frequencies(right.subplots(), config)


def _circle(axes: Axes) -> None:
    angle = np.linspace(0, 2 * math.pi, 60)
    axes.plot(np.cos(angle), np.sin(angle), color="#dddddd", linewidth=0.8)


def _arrow(axes: Axes, z: complex, colour: object, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axes.annotate("", xy=(z.real, z.imag), xytext=(0, 0), arrowprops=style)


def _draw_frequencies(axes: Axes, config: Config) -> None:
    pairs = np.arange(config.head_dim // 2)
    unscaled = ops.rope_frequencies(config.head_dim, config.rope_theta, None, np.float64)
    label = "this model's" if config.rope_scaling is None else "unscaled"
    axes.plot(pairs, unscaled, "o-", color=BLUE, markersize=4, label=label)
    if config.rope_scaling is not None:
        scaled = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)
        axes.plot(pairs, scaled, "s--", color=VERMILION, markersize=3.5, label="scaled: this model's")
    context = 2 * math.pi / config.max_seq_len
    axes.axhline(context, color=GREY, linestyle=":", label=f"one turn in the context, {config.max_seq_len:,} positions")
    axes.set_title("frequencies" + ("; this model doesn't scale them" if config.rope_scaling is None else ""))
    axes.set(xlabel="pair j", ylabel="radians per position")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_attention(figure: Figure, subject: Subject) -> None:
    """Draw one head's scores before the mask, after it, and their softmax; below, the weights of every head of the layer."""
    config, layer, head, T = subject.model.config, subject.layer, subject.head, len(subject.ids)
    prefix = f"layers.{layer}.attention."
    seen = subject.record(*(prefix + name for name in ("q_rope", "k_rope", "scores", "weights")))
    keys = seen[prefix + "k_rope"].swapaxes(0, 1)  # [G, S, K]
    no_mask = np.zeros((), keys.dtype)
    unmasked = ops.attention_scores(seen[prefix + "q_rope"], keys, no_mask)[head]
    masked, weights = seen[prefix + "scores"][head], seen[prefix + "weights"]  # [T, S], [H, T, S]

    from matplotlib.colors import Normalize

    labels = drawable(subject.labels)
    rows = math.ceil(config.n_heads / 9)
    columns = math.ceil(config.n_heads / rows)
    side = float(np.clip(0.25 * T, 3.2, 8.5))
    width = 3 * (side + 1.6)
    small = (width - 1) / columns
    figure.set_size_inches(width, side + 1.9 + rows * (small + 0.1) + 0.6)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[side + 1.9, rows * (small + 0.1) + 0.6]).flat
    top.suptitle(f"layer {layer}, head {head}; rows: query positions, columns: key positions")
    maps = top.subplots(1, 3)
    largest = float(np.abs(unmasked).max())
    for axes, title, x in ((maps[0], "scores q·k / √K", unmasked), (maps[1], "masked: hatched is −∞", masked)):
        _heat_map(axes, x, "PuOr_r", Normalize(-largest, largest), title, labels)
    _heat_map(maps[2], weights[head], "viridis", _weights_norm(), "softmax: each row sums to 1", labels)
    bottom.suptitle(f"all heads of layer {layer} after softmax, colours and axes as above")
    grid = bottom.subplots(rows, columns, squeeze=False)
    for h, axes in enumerate(grid.flat):
        if h >= config.n_heads:
            axes.axis("off")
            continue
        axes.imshow(weights[h], cmap="viridis", norm=_weights_norm(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"head {h}" + (" (above)" if h == head else ""), fontsize=8, pad=2)


def _weights_norm() -> Normalize:
    """Map weights to colours by their square root: most are small, and would all be dark."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)


def _heat_map(axes: Axes, x: np.ndarray, colours: str, norm: Normalize, title: str, labels: Sequence[str]) -> None:
    """Draw cells with tokens on both axes; those that are -inf show the hatched ground. Small maps have numbers."""
    hidden = np.isneginf(x)
    axes.patch.set(hatch="////", facecolor="#eeeeee", edgecolor="#a8a8a8")
    image = axes.imshow(np.ma.masked_where(hidden, x), cmap=colours, norm=norm, interpolation="nearest")
    axes.set_title(title)
    label_axis(axes.xaxis, labels, rotation=90)
    label_axis(axes.yaxis, labels)
    if len(x) <= 24:
        for row, column in np.argwhere(hidden):
            axes.text(column, row, "−∞", ha="center", va="center", fontsize=6)
    if len(x) <= 6:
        for row, column in np.argwhere(~hidden):
            ground = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5}
            axes.text(column, row, f"{x[row, column]:.2f}", ha="center", va="center", fontsize=8, bbox=ground)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def draw_mask(figure: Figure, subject: Subject) -> None:
    """Draw where the scores of the pass are -inf."""
    name = f"layers.{subject.layer}.attention.scores"
    hidden = np.isneginf(subject.record(name)[name][subject.head])  # [T, S]
    labels, T = drawable(subject.labels), len(hidden)
    side = float(np.clip(0.3 * T, 3.2, 10))
    figure.set_size_inches(side + 2.2, side + 1.8)
    axes = figure.subplots()
    axes.patch.set(hatch="////", facecolor="#eeeeee", edgecolor="#a8a8a8")
    from matplotlib.colors import ListedColormap

    axes.imshow(np.ma.masked_where(hidden, np.zeros(hidden.shape)), cmap=ListedColormap([SKY]), interpolation="nearest")
    label_axis(axes.xaxis, labels, rotation=90)
    label_axis(axes.yaxis, labels)
    if T <= 24:
        for row, column in np.ndindex(hidden.shape):
            axes.text(column, row, "−∞" if hidden[row, column] else "0", ha="center", va="center", fontsize=7)
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_title("the causal mask:\nblue is 0, hatched is −∞")


def draw_residual(figure: Figure, subject: Subject) -> None:
    """Draw the norm of each token's vector after each attention and each layer."""
    config, T = subject.model.config, len(subject.ids)
    norms = residual_norms(subject.record(*residual_names(config)), config)  # [1 + 2L, T]
    labels = drawable(subject.labels)
    figure.set_size_inches(11, 5.5)
    axes = figure.subplots()
    layers = np.arange(len(norms)) / 2  # 0.5 is after layer 0's attention, 1 after layer 0
    for t in range(T):
        axes.plot(layers, norms[:, t], color=_colours("viridis", T)[t], linewidth=0.9, alpha=0.35 if T > 40 else 0.8)
    if T > 2:
        axes.plot(layers, np.median(norms, axis=1), color="black", linewidth=2.2, label="median of the tokens")
    largest = int(np.argmax(norms[-1]))
    axes.plot(
        layers,
        norms[:, largest],
        "--",
        color=VERMILION,
        linewidth=2.2,
        label=f"largest at the end: position {largest}, {labels[largest]}",
    )
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xticks(range(0, config.n_layers + 1, math.ceil((config.n_layers + 1) / 40)))
    axes.set(xlabel="layers passed; half steps are after attention", ylabel="‖x‖")
    axes.set_title("the residual stream's norm, a line for each token" + ("; dark is early, bright late" if T > 1 else ""))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_logit_lens(figure: Figure, subject: Subject) -> None:
    """Draw the likeliest next token after each layer at each position, its probability as colour; long prompts in strips."""
    config, T = subject.model.config, len(subject.ids)
    ids, p = (x[..., 0] for x in logit_lens(subject.model, subject.record(*lens_names(config)), 1))  # [1 + L, T]
    texts = token_labels(subject.model.tokenizer, ids.ravel())
    texts = drawable([*texts, *subject.labels])
    predicted = [texts[i * T : (i + 1) * T] for i in range(len(ids))]
    labels = texts[ids.size :]
    a_strip = 25
    strips = math.ceil(T / a_strip)
    height = 0.2 * len(ids) + 1.1
    figure.set_size_inches(max(6, 0.8 * min(T, a_strip) + 3), strips * height + 0.6)
    figure.suptitle("logit lens: the likeliest next token after each layer\n(the model's final norm and output matrix)")
    for strip, axes in enumerate(figure.subplots(strips, 1, squeeze=False).flat):
        at = slice(strip * a_strip, min((strip + 1) * a_strip, T))
        shown = p[:, at]
        image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest")
        for row, column in np.ndindex(shown.shape):
            dark = shown[row, column] < 0.55
            text = _short(predicted[row][at][column])
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
        axes.set_xlim(-0.5, min(T, a_strip) - 0.5)
        axes.set_xticks(range(shown.shape[1]), [f"{i}\n{_short(labels[i])}" for i in range(T)[at]], fontsize=7)
        axes.set_yticks(range(len(ids)), ["embedding", *map(str, range(config.n_layers))], fontsize=7)
        axes.set_ylabel("after layer")
    figure.colorbar(image, ax=figure.axes, label="its probability", shrink=min(1.0, 4 / (strips * height)), aspect=25)


def _short(text: str) -> str:
    return text if len(text) <= 9 else text[:8] + "…"


def draw_tokens(figure: Figure, subject: Subject) -> None:
    """Draw the text as boxes, one per token, its id below; adjacent ones differ in colour, and a newline ends the line."""
    labels = drawable(subject.labels)
    import matplotlib

    matplotlib.rcParams["font.family"] = ["DejaVu Sans Mono", *matplotlib.rcParams["font.family"]]
    widths = [max(sum(map(_cells, label)), 0.75 * len(str(id))) + 0.8 for label, id in zip(labels, subject.ids, strict=True)]
    longest = max(92.0, *widths)
    places, x, y = [], 0.0, 0
    for label, width in zip(labels, widths, strict=True):
        if x and x + width > longest:
            x, y = 0.0, y + 1
        places.append((x, y))
        x += width
        if label.endswith("↵"):
            x, y = 0.0, y + 1
    used = max(x + width for (x, _), width in zip(places, widths, strict=True))
    n_lines = places[-1][1] + 1
    cell, line = 0.11, 0.5  # inches
    figure.set_size_inches(cell * max(used, 30) + 0.4, line * n_lines + 0.7)
    axes = figure.subplots()
    axes.set(xlim=(-0.5, max(used, 30) + 0.5), ylim=(n_lines - 0.1, -0.1))
    axes.axis("off")
    axes.set_title(f"{len(labels)} token{'s' * (len(labels) != 1)}; ␣ space, ↵ newline", loc="left", fontsize=9)
    from matplotlib.patches import Rectangle

    tints = [_tint(colour) for colour in (SKY, ORANGE, GREEN, YELLOW, PURPLE)]
    for i, ((x, y), width) in enumerate(zip(places, widths, strict=True)):
        tint = tints[i % len(tints)]
        axes.add_patch(Rectangle((x + 0.06, y), width - 0.12, 0.52, facecolor=tint, edgecolor="#606060", linewidth=0.5))
        axes.text(x + width / 2, y + 0.27, labels[i], ha="center", va="center", fontsize=11)
        axes.text(x + width / 2, y + 0.7, str(subject.ids[i]), ha="center", va="center", fontsize=7.5, color="#404040")


def _cells(char: str) -> int:
    """Count the columns of a monospaced font that a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def draw_error(figure: Figure, report: Report) -> None:
    """Draw each activation's error and its floor, in the order of computation; then the worst of each layer, in floors."""
    measured = [a for a in report["activations"] if a["accumulated"]]
    if not measured:
        raise ValueError("the comparison measured no activation: there is nothing to draw")
    entries = [SimpleNamespace(place=place(a["name"]), passed=a["passed"]) for a in measured]
    error, floor, ratio = (np.array([float(a["accumulated"][key]) for a in measured]) for key in ("error", "floor", "ratio"))
    for values in (error, floor, ratio):  # an axis of more decades than these can't be drawn
        values[values > 1e100], values[values < 1e-100] = np.inf, 0
    passed = np.array([a.passed for a in entries])
    limit = None if report["limit"] is None else float(report["limit"])  # JSON's integers have any size, NumPy's 64 bits
    groups = _by_layer(entries)
    figure.set_size_inches(float(np.clip(0.09 * len(entries), 9, 24)), 8)
    upper, lower = figure.subplots(2, 1)
    x = np.arange(len(entries))
    finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in (error, floor)])
    bottom, ceiling = (finite.min() / 3, finite.max() * max(30, limit or 0)) if finite.size else (1e-9, 1.0)

    def inside(values: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num(values, nan=ceiling, posinf=ceiling), bottom, ceiling)

    upper.plot(x, inside(floor), color=GREY, linewidth=2, label="noise floor")
    if limit is not None:
        upper.plot(x, inside(limit * floor), "--", color=GREY, linewidth=1.2, label=f"limit: {limit:g} times the floor")
    upper.plot(x, inside(error), "o-", color=BLUE, markersize=3, linewidth=1, label="error; at the bottom edge: none")
    upper.plot(x[~passed], inside(error)[~passed], "X", color=VERMILION, markersize=7, label="different")
    starts = [indices[0] for indices in groups.values()]
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(x)
        if i % 2:
            upper.axvspan(start - 0.5, end - 0.5, color="#f2f2f2", zorder=0)
    wide = [(indices[0], name) for name, indices in groups.items() if len(indices) > 2]
    stride = math.ceil(len(wide) / MOST_LABELS) or 1
    upper.set_xticks([start for start, _ in wide[::stride]], [name for _, name in wide[::stride]], fontsize=8, ha="left")
    upper.set(xlim=(-0.5, len(x) - 0.5), ylim=(bottom, ceiling), ylabel="relative error")

    worst = {name: float(ratio[indices].max()) for name, indices in groups.items()}
    failed = [not passed[indices].all() for indices in groups.values()]
    heights = np.array(list(worst.values()))
    sound = heights[np.isfinite(heights)]
    edge = max(10 * (limit or 1), 3 * sound.max() if sound.size else 1)
    colours = [VERMILION if bad else BLUE for bad in failed]
    bars = lower.bar(range(len(worst)), np.clip(np.nan_to_num(heights, nan=edge, posinf=edge), 0.01, edge), color=colours)
    for bar, bad in zip(bars, failed, strict=True):
        bar.set_hatch("xx" if bad else None)
    if limit is not None:
        lower.axhline(limit, color=GREY, linestyle="--", linewidth=1.2)
    lower.axhline(1, color=GREY, linewidth=2)
    stride = math.ceil(len(worst) / MOST_LABELS)
    lower.set_xticks(range(0, len(worst), stride), list(worst)[::stride], fontsize=8)
    lower.set(xlabel="layer", xlim=(-0.6, len(worst) - 0.4), ylabel="worst error, in noise floors", ylim=(0.01, edge))
    for axes in (upper, lower):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.grid(axis="y", alpha=0.25)
    upper.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    [verdict] = drawable([report["verdict"]], longest=150)  # it may have a name of the port's
    figure.suptitle(verdict, fontsize=10)


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


def _plain_numbers(axis: Axis) -> None:
    """Write 1e-05 where matplotlib would write a formula: formulas are off, since tokens may hold a `$`."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


KINDS: dict[str, Callable[..., None]] = {
    "rope": draw_rope,
    "attention": draw_attention,
    "mask": draw_mask,
    "residual": draw_residual,
    "logit-lens": draw_logit_lens,
    "tokens": draw_tokens,
}
