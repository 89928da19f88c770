"""Write `npllama explain`'s page: one HTML file that shows a forward pass, opens by double-click and makes no network request.

The map and the charts are Bokeh's, whose Python package contains BokehJS (1.3 MB): the page takes it from there, and this
repository holds no copy. (plotly.js has 4.8 MB, and other libraries would have to be copied.) The controls are the browser's
own, so that keyboard and touch work.

All numbers of the page come from the taps: attention weights as 16-bit integers (a 65535th), below the diagonal only; the last
token's logits as float32, so that the sliders compute what sampling.probabilities() does. Arrays and BokehJS are compressed,
and the browser inflates them (DecompressionStream, in all browsers since 2023): 72 tokens of SmolLM2 take less than 5 MB.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import inspect
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..activations import TABLE, sizes, table_of
from ..checkpoint import Model
from ..checkpoint.atomic import write_file
from ..config import Config
from ..errors import printable
from ..golden.compare.names import place
from ..golden.trace import Recording, Selection
from ..model import forward
from ..tokenizer import Tokenizer
from .lens import SIGNS, logit_lens, residual_names, residual_norms, token_label
from .lesson import Source, computed_at

if TYPE_CHECKING:
    from bokeh.models import Axis

TEMPLATE = importlib.resources.files("npllama.learn") / "explain.html"
LENS_CANDIDATES = 5  # at each layer and position
CANDIDATES = 20  # of the next token, named in the page
FIRST_NUMBERS = 4  # of each activation, for each token
TITLE_LENGTH, HEADING_LENGTH = 60, 140  # characters of the prompt
WEIGHT_TICKS = (0, 0.01, 0.1, 0.25, 0.5, 1)


def explain(model: Model, ids: Sequence[int], out: Path) -> int:
    """Write the page of a pass over these tokens, complete or not at all, and return its size in bytes.

    Raises ValueError for invalid tokens, and ImportError without bokeh.
    """
    try:
        from bokeh.resources import Resources
    except ImportError:
        raise ImportError("the page needs bokeh: pip install 'npllama[learn]'") from None
    data = page_data(model, ids)
    library = Resources(mode="inline", components=["bokeh"]).js_raw[0]  # the others only set the log level, and log that
    prompt = prompt_text(model.tokenizer, ids)
    parts = {
        "TITLE": html.escape(shortened(prompt, TITLE_LENGTH)),
        "HEADING": html.escape(shortened(prompt, HEADING_LENGTH)),
        "SIGNS": f"{SIGNS[' ']} is a space, {SIGNS[chr(10)]} a newline",
        "LIBRARY": _packed(library.encode()),
        "DATA": _json(data),
        "FIGURES": _json(figures(data)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()
    write_file(out, page)
    return len(page)


def _json(values: object) -> str:
    """Format values as JSON for a <script>; `<` is escaped, so that no prompt can close the element."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def prompt_text(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    """Return the tokens' text on one line, without special tokens; the ids if there is no text."""
    text = ""
    if tokenizer is not None:
        hidden = {*tokenizer.silent_ids, *tokenizer.special_tokens.values()}
        shown = [id for id in ids if id not in hidden and id < tokenizer.vocab_size]
        text = b"".join(tokenizer.token_bytes(id, False) for id in shown).decode("utf-8", "replace")
    return printable(" ".join(text.split())) or f"tokens {', '.join(map(str, ids))}"


def shortened(text: str, length: int) -> str:
    """Cut a text to so many characters, with an ellipsis for the rest."""
    return text if len(text) <= length else text[: length - 1] + "…"


def quoted(label: str) -> str:
    """Quote a token's label."""
    return f"“{label}”"


# ------------------------------------------------------------------------------------------------------------------- the data


def page_data(model: Model, ids: Sequence[int]) -> dict[str, Any]:
    """Run the pass and collect what the page shows of it; arrays are packed, tokens are quoted.

    weights        uint16 [L, H, T(T+1)/2]: round(65535 · attention.weights), each row up to its own token
    norms          float32 [1 + 2L, T]: residual_norms()
    lens_ids, lens int32, float32 [1 + L, T, LENS_CANDIDATES]: the logit lens
    logits         float32 [V]: the last token's, largest first; `candidates` has labels of the first
    numbers        activation -> float32 [n, T, heads, FIRST_NUMBERS]: its first numbers, in n layers or 1; heads may be 1
    """
    config, T = model.config, len(ids)
    shown = {*residual_names(config), *(f"layers.{i}.attention.weights" for i in range(config.n_layers))}
    recording = Recording(Selection(taps=(*shown, "logits")))

    def label(id: int) -> str:
        return quoted(token_label(model.tokenizer, int(id)))

    numbers: dict[str, list[np.ndarray]] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        kind = place(name).kind
        by_token = np.moveaxis(x, TABLE[kind].axes.index("T"), 0)  # scores and weights are [H, T, S]
        numbers.setdefault(kind, []).append(by_token[..., :FIRST_NUMBERS].copy())
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
        "labels": [label(id) for id in ids],
        "weights": packed(np.rint(65535.0 * np.stack(weights)), "<u2"),
        "norms": packed(residual_norms(recording, config), "<f4"),
        "norm_names": residual_names(config),
        "lens_ids": packed(lens_ids, "<i4"),
        "lens": packed(lens, "<f4"),
        "lens_labels": {int(id): label(id) for id in np.unique(lens_ids)},
        "logits": packed(logits[order], "<f4"),
        "candidates": [{"id": int(id), "label": label(id)} for id in order[:CANDIDATES]],
        "numbers": {kind: packed(np.stack(arrays), "<f4") for kind, arrays in numbers.items()},
        "steps": steps(config, T),
    }


def packed(x: np.ndarray, dtype: str) -> str:
    """Pack an array: the first bytes of all numbers, then their second bytes and so on, since these compress better."""
    numbers = np.ascontiguousarray(x, dtype).reshape(-1)
    return _packed(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes())


def unpacked(text: str, dtype: str) -> np.ndarray:
    """Return the numbers of a packed array, in one dimension."""
    data = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.ascontiguousarray(data.reshape(np.dtype(dtype).itemsize, -1).T).view(dtype)[:, 0]


def _packed(data: bytes) -> str:
    """Compress bytes, and encode them in base64."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def steps(config: Config, n_tokens: int) -> list[dict[str, Any]]:
    """List the steps of a pass in order: sentence, formula, shape, the line that calls it, and its functions' code.

    heads is the number of heads of its activation, 0 if it has none.
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
    """Return a line of the forward pass and its place."""
    return {"where": f"{source.file}:{source.line}, {source.name.partition('.')[2]}()", "line": source.text.strip()}


def _code(function: Callable) -> dict[str, str]:
    source = Source.of(function)
    return {"name": source.name, "where": f"{source.file}:{source.line}", "source": inspect.getsource(function)}


# ---------------------------------------------------------------------------------------------------------------- the figures


def figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """Make Bokeh's three figures as JSON, without numbers: the page fills each source by its name and sets the colours."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import (
        BasicTickFormatter,
        ColorBar,
        ColumnDataSource,
        FixedTicker,
        HoverTool,
        LinearColorMapper,
        PlainText,
        Range1d,
    )
    from bokeh.palettes import Viridis256
    from bokeh.plotting import figure

    T, L = len(data["ids"]), data["config"]["n_layers"]

    def empty(width: int, height: int, **options: Any) -> figure:
        """Make a figure without a toolbar, over which a finger scrolls the page."""
        options = {"tools": "", "toolbar_location": None, "width": width, "height": height, "min_border": 4, **options}
        made = figure(**options)
        made.grid.visible = False
        made.axis.minor_tick_line_color = None
        made.background_fill_color = made.border_fill_color = None  # the page's own shows through, dark or light
        return made

    def source(name: str, *columns: str) -> ColumnDataSource:
        return ColumnDataSource({column: [] for column in columns}, name=name)

    def bounds(start: float, end: float) -> Range1d:
        return Range1d(start=start, end=end)

    def ticks(axis: Axis, texts: Sequence[str]) -> None:
        """Label the cells, as PlainText, since a token may look like a formula; the page leaves out labels without room."""
        axis.ticker = FixedTicker(ticks=list(range(len(texts))))
        axis.major_label_overrides = {i: PlainText(text=shortened(text, 14)) for i, text in enumerate(texts)}

    attention = empty(  # it fills the width that it has, but for cells of less than 4 pixels
        600, 640, sizing_mode="scale_width", min_width=100 + 4 * T,
        x_range=bounds(-0.5, T - 0.5), y_range=bounds(T - 0.5, -0.5), x_axis_location="above",
    )  # fmt: skip
    colours = LinearColorMapper(palette=Viridis256, low=0, high=1)
    shade: Any = {"field": "shade", "transform": colours}
    filled = source("attention", "x", "y", "shade", "query", "key", "weight")
    weights = attention.rect("x", "y", source=filled, width=1, height=1, line_color=shade, fill_color=shade)  # no seams
    attention.add_layout(
        ColorBar(
            color_mapper=colours, title="weight, on a square-root scale",
            background_fill_color=None, height=12, ticker=FixedTicker(ticks=[math.sqrt(weight) for weight in WEIGHT_TICKS]),
            major_label_overrides={math.sqrt(weight): f"{weight:.0%}" for weight in WEIGHT_TICKS},
        ),
        "below",
    )  # fmt: skip
    attention.rect(
        "x", "y", width="width", height=1, fill_alpha=0, line_width=2, line_color="#D55E00",
        source=source("row", "x", "y", "width"),
    )  # fmt: skip
    attention.add_tools(HoverTool(renderers=[weights], tooltips="@query attends to @key: @weight{0.0%}"))
    for axis, name in ((attention.xaxis[0], "key position"), (attention.yaxis[0], "query position")):
        ticks(axis, [f"{t} {label}" for t, label in enumerate(data["labels"])])
        axis.axis_label = name
    attention.xaxis.major_label_orientation = "vertical"
    attention.axis.major_label_text_font_size = "11px"

    lengths = unpacked(data["norms"], "<f4")
    low, high = (float(bound(lengths[lengths > 0], initial=1)) for bound in (np.min, np.max))
    range_ = bounds(0.7 * low, 1.5 * high)
    decade = (1, 2, 5) if high < 1000 * low else (1,)
    norms = empty(900, 340, sizing_mode="stretch_width", y_axis_type="log", x_range=bounds(-0.2, L + 0.2), y_range=range_)
    every = norms.multi_line("xs", "ys", line_color="#8a8a8a", line_alpha=0.45, source=source("norms", "xs", "ys", "label"))
    chosen = norms.line("x", "y", line_color="#D55E00", line_width=3, source=source("norm", "x", "y", "name", "label"))
    points = norms.scatter("x", "y", color="#D55E00", size=6, source=chosen.data_source)
    norms.add_tools(
        HoverTool(renderers=[points], tooltips="@label, @name: @y{0.000}", mode="mouse"),
        HoverTool(renderers=[every], tooltips="@label", line_policy="nearest"),
    )
    norms.yaxis.ticker = FixedTicker(ticks=[step * 10.0**power for power in range(-9, 10) for step in decade])
    norms.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    norms.xaxis.axis_label, norms.yaxis.axis_label = "layers passed; half: after attention", "norm"

    n = len(data["candidates"])
    candidates = empty(600, 40 + 20 * n, sizing_mode="stretch_width", y_range=bounds(n - 0.5, -0.5), x_range=bounds(0, 1))
    bars = source("candidates", "y", "p", "own", "label")
    candidates.hbar("y", right="own", height=0.8, fill_alpha=0, line_color="#8a8a8a", source=bars)
    candidates.hbar("y", right="p", height=0.6, color="#0072B2", source=bars)
    candidates.add_tools(HoverTool(tooltips="@label: @p{0.00%}; the model's own: @own{0.00%}"))
    ticks(candidates.yaxis[0], [candidate["label"] for candidate in data["candidates"]])
    candidates.xaxis.axis_label = "probability; the outline is the model's own"
    return {
        name: json_item(made, ID(f"{name}-figure"))
        for name, made in (("attention", attention), ("norms", norms), ("candidates", candidates))
    }
