"""`npllama explain`: an interactive HTML page of one pass. It opens by double-click and makes no network request.

The charts are Bokeh's, whose Python package contains BokehJS (1.3 MB): the page takes it from there, and this repository holds
no copy. (plotly.js has 4.8 MB, and other libraries would have to be copied.) The controls are the browser's own, so that the
keyboard works them.

Everything the page shows comes from the taps, in one JSON text: attention weights as 16-bit integers (a 65535th), below the
diagonal only; the last token's logits as float32, so that the sliders compute what sampling.probabilities() does.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..activations import TABLE, sizes, table_of
from ..checkpoint import Model
from ..checkpoint.atomic import write_file
from ..config import Config
from ..golden.compare.names import place
from ..golden.trace import Recording, Selection
from ..model import forward
from .lens import lens_names, logit_lens, residual_names, residual_norms, token_label, token_labels
from .lesson import Source, computed_at

if TYPE_CHECKING:
    from bokeh.models import Axis

TEMPLATE = importlib.resources.files("npllama.learn") / "explain.html"
LENS_CANDIDATES = 5  # at each layer and position
CANDIDATES = 20  # of the last token's, named in the page
FIRST_NUMBERS = 4  # of each activation, for each token


def explain(model: Model, ids: Sequence[int], out: Path) -> int:
    """Write the page of a pass over these tokens, complete or not at all, and return its size in bytes.

    Raises ValueError, and ImportError without bokeh.
    """
    try:
        from bokeh.resources import Resources
    except ImportError:
        raise ImportError("the page needs bokeh: pip install 'npllama[learn]'") from None
    data = page_data(model, ids)
    library = Resources(mode="inline", components=["bokeh"]).js_raw[0]  # what follows it sets the log level, and logs that
    parts = {
        "TITLE": html.escape(f"npllama explains: {''.join(data['labels'])[:60]}"),
        "LIBRARY": library,
        "DATA": _json(data),
        "FIGURES": _json(figures(data)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()
    write_file(out, page)
    return len(page)


def _json(values: object) -> str:
    """Format values as JSON for a <script>: `<` is escaped, so that no prompt can end it."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# ------------------------------------------------------------------------------------------------------------------- the data


def page_data(model: Model, ids: Sequence[int]) -> dict[str, Any]:
    """Collect what the page shows of the pass. Arrays are base64 of little-endian numbers, in C order.

    weights        uint16 [L, H, T(T+1)/2]: round(65535 · attention.weights), each row up to its own token
    norms          float32 [1 + 2L, T]: residual_norms()
    lens_ids, lens int32, float32 [1 + L, T, LENS_CANDIDATES]: the logit lens
    logits         float32 [V]: those after the last token, from the largest; the first have labels in `candidates`
    numbers        activation -> float32 [T, heads, FIRST_NUMBERS], or [T, FIRST_NUMBERS] without heads: its first numbers
    """
    config, T = model.config, len(ids)
    shown = {*residual_names(config), *(f"layers.{i}.attention.weights" for i in range(config.n_layers))}
    recording = Recording(Selection(taps=(*shown, "logits")))
    numbers: dict[str, str] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        by_token = np.moveaxis(x, TABLE[place(name).kind].axes.index("T"), 0)  # scores and weights are [H, T, S]
        numbers[name] = _base64(by_token[..., :FIRST_NUMBERS], "<f4")
        return recording(name, x)

    forward(model.params, config, ids, tap=tap)
    lower = np.tril_indices(T)
    weights = [recording[f"layers.{i}.attention.weights"][:, lower[0], lower[1]] for i in range(config.n_layers)]
    lens_ids, lens = logit_lens(model, recording, LENS_CANDIDATES)
    logits = recording["logits"][-1].astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    return {
        "version": __version__,
        "model": model.path.name if model.path else "a model in memory",
        "config": config.to_dict(),
        "ids": [int(id) for id in ids],
        "labels": token_labels(model.tokenizer, ids),
        "weights": _base64(np.rint(65535.0 * np.stack(weights)), "<u2"),
        "norms": _base64(residual_norms(recording, config), "<f4"),
        "norm_names": residual_names(config),
        "lens_ids": _base64(lens_ids, "<i4"),
        "lens": _base64(lens, "<f4"),
        "lens_names": lens_names(config),
        "lens_labels": {int(id): token_label(model.tokenizer, int(id)) for id in np.unique(lens_ids)},
        "logits": _base64(logits[order], "<f4"),
        "candidates": [{"id": int(id), "label": token_label(model.tokenizer, int(id))} for id in order[:CANDIDATES]],
        "numbers": numbers,
        "steps": steps(config, T),
    }


def _base64(x: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(x, dtype).tobytes()).decode("ascii")


def steps(config: Config, n_tokens: int) -> list[dict[str, Any]]:
    """List the steps of a pass in order, each with sentence, formula, shape, the line that calls it, and its functions' code.

    heads is how many heads its activation has, 0 if it isn't cut into any.
    """
    n = {**sizes(config), "T": n_tokens, "S": n_tokens}
    return [
        {
            "kind": row.name,
            "in_layer": row.in_layer,
            "heads": next((n[axis] for axis in row.axes if axis in "HG"), 0),
            "sentence": row.sentence,
            "formula": row.formula,
            "shape": f"[{', '.join(row.axes)}] = {[n[axis] for axis in row.axes]}",
            "call": _call(computed_at()[row.name]),
            "code": [_code(function) for function in row.functions],
        }
        for row in table_of(config)
    ]


def _call(source: Source) -> dict[str, str]:
    """Return a line of the forward pass, and where it is."""
    return {"where": f"{source.file}:{source.line}, {source.name.partition('.')[2]}()", "line": source.text.strip()}


def _code(function: Callable) -> dict[str, str]:
    source = Source.of(function)
    return {"name": source.name, "where": f"{source.file}:{source.line}", "source": inspect.getsource(function)}


# ---------------------------------------------------------------------------------------------------------------- the figures


def figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """Make Bokeh's four figures as JSON, without numbers: the page fills the sources by name, in the colours of its theme."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, LinearColorMapper, PlainText, Range1d
    from bokeh.models.renderers import GlyphRenderer
    from bokeh.palettes import Cividis256, Viridis256
    from bokeh.plotting import figure

    T, L = len(data["ids"]), data["config"]["n_layers"]

    def empty(width: int, height: int, **options: Any) -> figure:
        """Make a figure without a toolbar, over which a finger scrolls the page."""
        options = {"tools": "", "toolbar_location": None, "width": width, "height": height, "min_border": 4, **options}
        made = figure(**options)
        made.grid.visible = False
        made.background_fill_color = made.border_fill_color = None  # the page's own shows through, dark or light
        return made

    def source(name: str, *columns: str) -> ColumnDataSource:
        return ColumnDataSource({column: [] for column in columns}, name=name)

    def bounds(start: float, end: float) -> Range1d:
        return Range1d(start=start, end=end)

    def ticks(axis: Axis, texts: Sequence[str], pixels: float) -> None:
        """Label every cell, or every n-th of small ones; as PlainText, since a token may look like a formula."""
        stride = math.ceil(12 / pixels)
        shown = range(0, len(texts), stride)
        axis.ticker = FixedTicker(ticks=list(shown))
        named = {i: _shortened(texts[i] if stride == 1 else f"{i} {texts[i]}") for i in shown}
        axis.major_label_overrides = {i: PlainText(text=text) for i, text in named.items()}

    def cells(made: figure, name: str, columns: Sequence[str], colours: Sequence[str]) -> GlyphRenderer:
        """Draw a square for each cell, whose colour is its `shade`, 0 to 1."""
        shade: Any = {"field": "shade", "transform": LinearColorMapper(palette=colours, low=0, high=1)}
        filled = source(name, "x", "y", "shade", *columns)
        return made.rect("x", "y", source=filled, width=1, height=1, line_color=None, fill_color=shade)

    cell = min(15.0, max(4.0, 720 / T))
    side = max(320, round(100 + cell * T))
    attention = empty(side, side, x_range=bounds(-0.5, T - 0.5), y_range=bounds(T - 0.5, -0.5), x_axis_location="above")
    weights = cells(attention, "attention", ["query", "key", "weight"], Viridis256)
    attention.rect(
        "x", "y", width="width", height=1, fill_alpha=0, line_width=2, line_color="#D55E00",
        source=source("row", "x", "y", "width"),
    )  # fmt: skip
    attention.add_tools(HoverTool(renderers=[weights], tooltips="@query attends to @key: @weight{0.0%}"))
    ticks(attention.xaxis[0], data["labels"], cell)
    ticks(attention.yaxis[0], data["labels"], cell)
    attention.xaxis.major_label_orientation = 1.2
    attention.axis.major_label_text_font_size = "10px"

    lens = empty(130 + 64 * T, 70 + 19 * (L + 1), x_range=bounds(-0.5, T - 0.5), y_range=bounds(-0.5, L + 0.5))
    predicted = cells(lens, "lens", ["text", "ink", "where", "candidates"], Cividis256)
    lens.text("x", "y", "text", text_color="ink", text_align="center", text_baseline="middle", text_font_size="11px",
              source=predicted.data_source)  # fmt: skip
    lens.add_tools(HoverTool(renderers=[predicted], tooltips=[("", "@where"), ("", "@candidates")]))
    ticks(lens.xaxis[0], data["labels"], 64)
    ticks(lens.yaxis[0], ["embedding", *map(str, range(L))], 19)
    lens.yaxis.axis_label = "after layer"

    lengths = np.frombuffer(base64.b64decode(data["norms"]), "<f4")
    low, high = (float(bound(lengths[lengths > 0], initial=1)) for bound in (np.min, np.max))
    range_ = bounds(0.7 * low, 1.5 * high)
    norms = empty(900, 340, sizing_mode="stretch_width", y_axis_type="log", x_range=bounds(-0.2, L + 0.2), y_range=range_)
    every = norms.multi_line("xs", "ys", line_color="#8a8a8a", line_alpha=0.45, source=source("norms", "xs", "ys", "label"))
    chosen = norms.line("x", "y", line_color="#D55E00", line_width=3, source=source("norm", "x", "y", "name", "label"))
    points = norms.scatter("x", "y", color="#D55E00", size=6, source=chosen.data_source)
    norms.add_tools(
        HoverTool(renderers=[points], tooltips="@label, @name: @y{0.000}", mode="mouse"),
        HoverTool(renderers=[every], tooltips="@label", line_policy="nearest"),
    )
    norms.xaxis.axis_label, norms.yaxis.axis_label = "layers passed; half steps are after attention", "‖x‖"

    n = len(data["candidates"])
    candidates = empty(600, 40 + 20 * n, sizing_mode="stretch_width", y_range=bounds(n - 0.5, -0.5), x_range=bounds(0, 1))
    bars = source("candidates", "y", "p", "own", "label")
    candidates.hbar("y", right="own", height=0.8, fill_alpha=0, line_color="#8a8a8a", source=bars)
    candidates.hbar("y", right="p", height=0.6, color="#0072B2", source=bars)
    candidates.add_tools(HoverTool(tooltips="@label: @p{0.00%}; the model's own: @own{0.00%}"))
    ticks(candidates.yaxis[0], [candidate["label"] for candidate in data["candidates"]], 20)
    candidates.xaxis.axis_label = "probability; the outline is the model's own"
    return {
        name: json_item(made, ID(f"{name}-figure"))
        for name, made in (("attention", attention), ("lens", lens), ("norms", norms), ("candidates", candidates))
    }


def _shortened(label: str) -> str:
    return label if len(label) <= 12 else label[:11] + "…"
