"""Draw tokens per second against the memory's limit by model size, and a token's time by context length, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Okabe and Ito's colours, distinguishable to the colour-blind.
COLOURS = {
    "npllama": "#0072B2",
    "Hugging Face": "#E69F00",
    "llama.cpp": "#009E73",
    "naive NumPy": "#767676",
    "torch bfloat16": "#D55E00",
    "limit": "#000000",
}
MARKERS = {"float32": "o", "bfloat16": "s", "int8": "^", "int4": "v"}
LIMITS = {"float32": "--", "bfloat16": ":"}  # line styles, as limits have all one colour and marker


def draw(points: Sequence[dict[str, object]], file: Path) -> None:
    """Write the picture. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 8), layout="constrained")  # one above the other: a phone shows the letters in their size
    by_size, by_context = figure.subplots(2, 1, height_ratios=[4, 3])
    _draw_series(by_size, [point for point in points if point["figure"] == "size"])
    by_size.set(xscale="log", yscale="log", xlabel="parameters", ylabel="tokens/s", title="Decode, one sequence")
    sizes = sorted({point["x"] for point in points if point["figure"] == "size"})
    by_size.set_xticks(sizes, [_size_text(size) for size in sizes])
    by_size.minorticks_off()
    values = [point["y"] for point in points if point["figure"] == "size"]
    low, high = min(values, default=1) / 1.3, max(values, default=1) * 1.3
    ticks = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]
    by_size.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    by_size.set_ylim(low, high)
    _draw_series(by_context, [point for point in points if point["figure"] == "context"])
    by_context.set(xlabel="tokens before", ylabel="ms a token", title="Decode, SmolLM2-135M's shape", ylim=(0, None))
    for axes in (by_size, by_context):
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_context.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(file, dpi=150)


def _draw_series(axes: object, points: Sequence[dict[str, object]]) -> None:
    for series in dict.fromkeys(point["series"] for point in points):
        own = sorted((point["x"], point["y"]) for point in points if point["series"] == series)
        axes.plot(*zip(*own, strict=True), label=series, linewidth=1.2, markersize=5, **style_of(series))


def style_of(series: str) -> dict[str, str]:
    """Return the colour, the marker and the line of a series, which no other has."""
    colour = next(colour for name, colour in COLOURS.items() if series.startswith(name))
    if series.startswith("limit"):
        line = next(line for name, line in LIMITS.items() if series.endswith(name))
        return {"color": colour, "marker": "_", "linestyle": line}
    marker = next((marker for name, marker in MARKERS.items() if series.endswith(name)), "D")
    return {"color": colour, "marker": marker, "linestyle": "-"}


def _size_text(n: float) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"
