"""Figures of `npllama plot`: their size and text, tokens as labels, ticks, and the file or window they go to.

Text is always 10 points, and a figure is as many inches wide as fit at that text size. So fonts, lines and markers scale
together: a picture of twice the pixels has text of twice the pixels, and `--font` enlarges all of it within the same pixels.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
POINTS = 10  # the text's size in every figure; labels are SMALL
SMALL = 8
SLIDE = (1280, 720)
SLIDE_FONT = 14  # pixels of text on a slide
WIDTH = 1600  # pixels, of a picture whose size is not given
SIZES, FONTS = (100, 10_000), (4, 200)  # pixels that are accepted
LINE, CHAR = 0.145, 0.07  # inches: the height of a line and the mean width of a character of SMALL text


@dataclass
class Sheet:
    """A figure to draw on: inches wide, and inches high, or None where the drawing chooses."""

    figure: Figure
    width: float
    height: float | None

    def fit(self, height: float, width: float | None = None) -> float:
        """Give the figure this height and width, if they are free, and return the height it has."""
        if self.height is None:
            self.width = width or self.width
        chosen = height if self.height is None else self.height
        self.figure.set_size_inches(self.width, chosen)
        return chosen


def resolution(size: tuple[int, int] | None, font: float | None) -> tuple[float, float, float | None]:
    """Find the dots per inch, and the inches, at which the text of 10 points has `font` pixels.

    Without a font the text grows with the picture: 14 pixels on a slide of 1280x720. Raises ValueError for a size or font that
    is out of bounds.        -> dpi, width, height or None
    """
    width, height = size or (WIDTH, None)
    for what, value, (least, most) in (
        ("a width", width, SIZES),
        ("a height", height or WIDTH, SIZES),
        ("a font", font or SLIDE_FONT, FONTS),
    ):
        if not least <= value <= most:
            raise ValueError(f"{what} of {value:g} pixels: expected {least} to {most}")
    if font is None:
        area = width * (height or width * SLIDE[1] / SLIDE[0])
        font = SLIDE_FONT * math.sqrt(area / (SLIDE[0] * SLIDE[1]))
    dpi = 72 * font / POINTS
    return dpi, width / dpi, height and height / dpi


def show(
    draw: Callable[[Sheet], None], out: Path | None, size: tuple[int, int] | None = None, font: float | None = None
) -> None:
    """Call `draw` with an empty figure, and write or show the result. A file appears complete or not at all.

    Raises ValueError for a file that isn't PNG or SVG, and where a window is needed and there is no display.
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out}: expected a file that ends in .png or .svg")
    if out is None:
        with _style():
            _in_a_window(draw, *resolution(size, font))
        return
    figure = drawn(draw, size, font)
    data, kind = io.BytesIO(), out.suffix.lower()[1:]
    metadata = {"Date": None} if kind == "svg" else None  # the same input is the same file
    with _style():
        figure.savefig(data, format=kind, dpi=figure.dpi, metadata=metadata)
    write_file(out, data.getvalue())


def drawn(draw: Callable[[Sheet], None], size: tuple[int, int] | None = None, font: float | None = None) -> Figure:
    """Call `draw` with an empty figure and return the figure; size and font are in pixels."""
    dpi, width, height = resolution(size, font)
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(dpi=dpi)
        draw(Sheet(figure, width, height))
        figure.draw_without_rendering()  # the layout of square maps is right at the second pass only
    # matplotlib cuts pixels off: 1279.99 would be 1279.
    figure.set_size_inches(figure.get_size_inches() + 0.01 / dpi)
    return figure


def _style() -> Any:
    """Return a context with our settings of matplotlib; ImportError without it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'npllama[learn]'") from None
    # Tokens may hold any character, `$` among them, which must not start a formula.
    settings: Any = {"text.parse_math": False, "font.size": POINTS, "svg.hashsalt": "npllama", "axes.titlesize": POINTS}
    settings |= {"figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.08}  # inches
    return matplotlib.rc_context(settings | {"figure.constrained_layout.use": True, "hatch.linewidth": 0.6})


def _in_a_window(draw: Callable[[Sheet], None], dpi: float, width: float, height: float | None) -> None:
    try:
        from matplotlib import pyplot

        figure = pyplot.figure(dpi=dpi)
    except Exception as error:  # each toolkit has an exception of its own for a missing display
        raise ValueError(f"no window can be opened ({error}): write a file with -o FILE.png") from None
    try:
        if figure.canvas.required_interactive_framework is None:
            raise ValueError("no window can be opened, there is no display: write a file with -o FILE.png")
        draw(Sheet(figure, width, height))
        pyplot.show()
    finally:
        pyplot.close(figure)


# -------------------------------------------------------------------------------------------------------- the text of tokens


def drawable(labels: Iterable[str]) -> list[str]:
    """Write labels with the glyphs there are, `<U+4F60>` where no installed font has one, and select fonts for what follows.

    A space is a raised dot: the lessons' ␣ hangs below the line, where it is lost between rows. A raised dot in a token is its
    code.
    """
    import matplotlib

    labels = [label.replace("·", "<U+00B7>").replace("␣", "·") for label in labels]
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


def cells(text: str) -> int:
    """Count the columns of a monospaced font that a text takes."""
    wide = (2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text if not unicodedata.combining(char))
    return sum(wide)


def cut(text: str, columns: int) -> str:
    """Cut a text to as many columns, at least one, with … at the end where it is cut."""
    if cells(text) <= columns:
        return text
    while text and cells(text) > columns - 1:
        text = text[:-1]
    return text + "…"


# ---------------------------------------------------------------------------------------------------------------------- ticks


def label_cells(axis: Axis, labels: Sequence[str], cell: float, longest: int, rotation: int = 0) -> None:
    """Label an axis of cells with tokens; of cells narrower than a line, every n-th, with its position before it.

    cell     inches per cell
    longest  columns after which a label is cut
    """
    stride = math.ceil(LINE / cell)
    shown = range(0, len(labels), stride)
    texts = [cut(labels[i] if stride == 1 else f"{i} {labels[i]}", longest) for i in shown]
    axis.set_ticks(list(shown), texts, rotation=rotation, fontsize=SMALL)


def label_between(axis: Axis, bounds: Sequence[float], labels: Sequence[str], inches: float) -> None:
    """Set a tick at each bound, and each label midway between two of them, without those that would overlap.

    inches  of one unit of the axis
    """
    end, kept = -math.inf, []
    for left, right, label in zip(bounds[:-1], bounds[1:], labels, strict=True):
        middle, half = (left + right) / 2 * inches, (max(map(len, label.split("\n"))) + 1) * CHAR / 2
        if middle - half >= end:
            kept.append(((left + right) / 2, label))
            end = middle + half
    axis.set_ticks(list(bounds), [""] * len(bounds))
    axis.set_ticks([at for at, _ in kept], [label for _, label in kept], minor=True, fontsize=SMALL)
    axis.set_tick_params(which="minor", length=0)


def label_decades(axis: Axis, least: float, most: float, room: float) -> None:
    """Set the ticks of a logarithmic axis to the numbers that people write: 1, 2, 5, 10, or powers of ten where it is long.

    least, most  where the axis begins and ends
    room         inches of the axis
    """
    decades = max(math.log10(most / least), 1e-9)
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = next((s for s in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5)) if _fits(s, decades, room)), (1,))
    stride = math.ceil((last - first + 1) / max(room / (2 * LINE), 1))
    ticks = [step * 10.0**power for power in range(first, last + 1, stride if len(steps) == 1 else 1) for step in steps]
    axis.set_ticks([tick for tick in ticks if least <= tick <= most], minor=False)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, place: written(value))


def _fits(steps: Sequence[float], decades: float, room: float) -> bool:
    """Return whether the two closest ticks of each decade are two lines apart."""
    closest = min(math.log10(b / a) for a, b in zip(steps, [*steps[1:], 10], strict=True))
    return closest / decades * room >= 1.5 * LINE


def written(value: float) -> str:
    """Write a tick: 0.001, 1,000, and 10⁻⁶ or 2·10⁻⁶ beyond.

    matplotlib would write these powers as formulas, which are off since a token may hold a `$`.
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.10g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = f"{float(mantissa):g}"
    return power if mantissa == "1" else f"{mantissa}·{power}"
