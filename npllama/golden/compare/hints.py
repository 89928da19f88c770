"""What may have gone wrong: known mistakes of ports, each tried on the candidate's own numbers.

A mistake is a prediction: what the first wrong activation would be, computed in float64 from the candidate's own inputs (the
reference's, where the candidate lacks them) with that mistake in the operation. A hint is given only when the prediction
explains the candidate and the right operation doesn't: it is evidence, not a guess from the error's size. The one that is a
guess, bfloat16_sized(), ends in a question mark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from ... import ops
from ...cache import PADDING
from ...config import RopeScaling
from ...engine.linear import is_packed, linear, widen
from ..precision import ROUND
from .judging import Aligned, judge, pair, relative_error
from .names import dimensions, place
from .noise import NoiseFloor

ROUNDED_ONCE, GATHERED = 2.0**-6, 2.0**-3  # more than the relative error of one bfloat16 operation, of some layers of them
EXPLAINED = 1e-3  # a prediction that leaves less than this share of the error explains it

Prediction = tuple[str, "np.ndarray | None"]


class Scene:
    """The first wrong activation, with what goes into its operation."""

    def __init__(self, name: str, aligned: Aligned, noise: NoiseFloor, precision: str):
        self.name, self.here, self.aligned, self.noise, self.precision = name, place(name), aligned, noise, precision
        self.config, self.params = aligned.config, aligned.model and aligned.model.params
        self.target = np.asarray(aligned.candidate[name], np.float64)
        self.layers = 1 + max((place(n).layer or 0 for n in aligned.reference), default=0)

    def own(self, kind: str) -> np.ndarray | None:
        """A sibling activation of the candidate, in float64; None if it has none, or a shortened one."""
        name = self.here.sibling(kind)
        x = self.aligned.candidate.get(name)
        return None if x is None or x.shape != self.aligned.reference[name].shape else np.asarray(x, np.float64)

    def get(self, kind: str) -> np.ndarray | None:
        """A sibling activation: the candidate's, else the reference's."""
        x = self.own(kind)
        if x is None and (name := self.here.sibling(kind)) in self.aligned.reference:
            x = np.asarray(self.aligned.reference[name], np.float64)
        return x

    def adjusted_scores(self) -> set[str]:
        """What of the candidate's scores is not its own, since its map's rule has put it there: "scale", "unmasked"."""
        rule = self.aligned.rules.get(self.here.sibling("attention.scores"))
        return {what for what in ("scale", "unmasked") if rule and getattr(rule, what)}

    def get_named(self, name: str) -> np.ndarray | None:
        """An activation of the same step by its name without the step."""
        name = self.here.prefix + name
        for side in (self.aligned.candidate, self.aligned.reference):
            if name in side and side[name].shape == self.aligned.reference[name].shape:
                return np.asarray(side[name], np.float64)
        return None

    def slots(self, kind: str) -> np.ndarray | None:
        """Keys or values of all tokens so far, those of earlier passes included.    [..., G, S, K]"""
        passes = []
        for step in range(-1, -1 if self.here.step is None else self.here.step + 1):
            passes.append("" if step < 0 else f"step.{step}/")
        parts = []
        for prefix in passes or [""]:
            name = f"{prefix}layers.{self.here.layer}.{kind}"
            for side in (self.aligned.candidate, self.aligned.reference):
                if name in side and side[name].shape == self.aligned.reference[name].shape:
                    parts.append(np.asarray(side[name], np.float64))
                    break
            else:
                return None
        return np.concatenate(parts, axis=-3).swapaxes(-2, -3)

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Of this pass's tokens and of all slots so far.    int [..., T], int [..., S]"""
        if self.aligned.tokens is None:
            x = self.aligned.reference[self.name]
            axes = self.here.axes
            T = np.arange(x.shape[axes.index("T") - len(axes)])
            return T, T
        is_token = self.aligned.tokens >= 0
        if self.here.step is not None:
            more = np.ones((*is_token.shape[:-1], self.here.step + 1), bool)
            is_token = np.concatenate([is_token, more], axis=-1)
        slots = np.where(is_token, np.cumsum(is_token, axis=-1) - 1, PADDING)
        return (slots if self.here.step is None else slots[..., -1:]), slots

    def explains(self, prediction: np.ndarray | None, wrong: np.ndarray | None) -> bool:
        """Whether the prediction is the candidate up to rounding, or leaves a thousandth of what the right operation leaves."""
        if prediction is None or np.isnan(prediction).any():
            return False
        c, r, kept = pair(self.aligned, self.name, self.target, prediction)
        if (np.isneginf(c) != np.isneginf(r)).any():
            return False
        if judge(self.name, c, r, kept, self.noise, local=self.name in self.noise.local, one=True).passed:
            return True
        if wrong is None:
            return False
        c, w, _ = pair(self.aligned, self.name, self.target, wrong)
        return relative_error(c, r) < EXPLAINED * min(relative_error(c, w), 1.0)


def hints(name: str, aligned: Aligned, noise: NoiseFloor, precision: str) -> list[str]:
    """The mistakes that explain the activation, usually one or none."""
    scene = Scene(name, aligned, noise, precision)
    if scene.here.axes is None or np.isnan(scene.target).any() or np.isposinf(scene.target).any():
        return []
    right = right_operation(scene)
    if right is not None and scene.explains(right, None):
        return ["its own operation is right: what goes into it isn't, by a little each time or in a step that isn't recorded"]
    if not scene.target.any() and np.any(scene.aligned.reference[name]):
        return ["every number is zero: was it ever written?"]
    for mistakes in MISTAKES.get(scene.here.kind, ()):
        for text, prediction in mistakes(scene):
            if scene.explains(prediction, right):
                return [text]
    found = reduced_precision(scene, right) or bfloat16_sized(scene)
    return [found] if found else []


# ------------------------------------------------------------------------------------------------- the right operation


def right_operation(scene: Scene) -> np.ndarray | None:
    """The activation computed from the candidate's own inputs; None where they or the weights are not at hand."""
    kind = scene.here.kind
    if kind in WEIGHTS:
        x, weight = linear_input(scene)
        return None if x is None or weight is None else shaped(scene, linear(x, weight))
    if kind in NORMS:
        x, weight = norm_input(scene)
        return None if weight is None else ops.rms_norm(x, weight, scene.config.norm_eps)
    if kind in ("attention.q_rope", "attention.k_rope"):
        x, frequencies = scene.get(kind.removesuffix("_rope")), expected_frequencies(scene)
        return None if x is None or frequencies is None else rotate(x, scene.positions()[0], frequencies)
    if kind in ("attention.scores", "attention.weights", "attention.heads"):
        return attend(scene)
    if kind == "feed_forward.act":
        gate, up = scene.get("feed_forward.gate"), scene.get("feed_forward.up")
        return None if gate is None or up is None else ops.swiglu(gate, up)
    if kind in RESIDUALS:
        x, y = residual_inputs(scene)
        return None if x is None or y is None else x + y
    return None


# ------------------------------------------------------------------------------------------------------------------- RoPE


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """RoPE in adjacent pairs."""
    return ops.rope(x, *ops.rope_rotation(positions, frequencies))


def to_halves(x: np.ndarray) -> np.ndarray:
    """A head's numbers from adjacent pairs to Hugging Face's halves."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def to_pairs(x: np.ndarray) -> np.ndarray:
    """The inverse of to_halves()."""
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


def expected_frequencies(scene: Scene) -> np.ndarray | None:
    """The model's, or those that the reference's own queries were turned by."""
    if (config := scene.config) is not None:
        return ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)
    before, after = (scene.here.sibling(kind) for kind in ("attention.q", "attention.q_rope"))
    if before not in scene.aligned.reference or after not in scene.aligned.reference:
        return None
    return turned_by(scene.aligned.reference[before], scene.aligned.reference[after], scene.positions()[0])


def turned_by(before: np.ndarray, after: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
    """The angle per position of each pair, from one token to the next; None for a single token.    [T, heads, K] -> [K/2]

    The sum over heads of after · conj(before) has the phase m·θ_j at position m, whatever the first position is.
    """
    if before.ndim != 3 or len(before) < 2:
        return None
    b, a = (np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x, np.float64)[..., 1::2] for x in (before, after))
    phase = np.sum(a * np.conj(b), axis=1)  # [T, K/2]
    step = np.sum(phase[1:] * np.conj(phase[:-1]), axis=0)
    frequencies = np.angle(step)
    # Refine: what is left after turning back grows with the position and is small, so it can't wrap around.
    m = (np.arange(len(phase)) - (len(phase) - 1) / 2)[:, None]
    left = phase * np.exp(-1j * m * frequencies)
    left = np.angle(left * np.conj(np.sum(left, axis=0)))
    weight = np.abs(phase)
    return frequencies + np.sum(weight * m * left, axis=0) / np.sum(weight * m * m, axis=0)


def rope_mistakes(scene: Scene) -> Iterator[Prediction]:
    """Other pairs, other positions, other angles."""
    kind = scene.here.kind.removesuffix("_rope")
    x, frequencies = scene.get(kind), expected_frequencies(scene)
    if x is None or frequencies is None or x.shape != scene.target.shape:
        return
    positions, _ = scene.positions()
    yield (
        "half-split RoPE: it turns x[j] with x[j + K/2], as Hugging Face's permuted weights want it, but with these weights "
        "the pairs are adjacent, x[2j] with x[2j + 1]; with that permutation it fits",
        to_pairs_of(rotate, x, positions, frequencies),
    )
    yield (
        "interleaved RoPE on rows in Hugging Face's order: it turns x[2j] with x[2j + 1], but in that order the pairs are x[j] "
        "with x[j + K/2]; with the rows permuted to adjacent pairs it fits",
        to_pairs(rotate(to_halves(x), positions, frequencies)),
    )
    yield "no RoPE: the numbers are not rotated at all", x
    for offset in (1, -1, 2, -2):
        by = "one" if abs(offset) == 1 else str(abs(offset))
        first = int(positions.min()) + offset
        text = f"position off by {by}: RoPE turns the first token here as if at position {first}, and {first - offset} is right"
        yield text, rotate(x, positions + offset, frequencies)
    found = turned_by(x, scene.target, positions)
    if found is not None:
        yield from wrong_frequencies(scene, x, positions, found, frequencies)


def to_pairs_of(turn: Callable, x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """What a rotation of halves makes of x: reorder its halves to pairs, turn those, reorder back."""
    return to_halves(turn(to_pairs(x), positions, frequencies))


def wrong_frequencies(scene: Scene, x, positions, found: np.ndarray, expected: np.ndarray) -> Iterator[Prediction]:
    """Where the angles per position that the candidate turned by could be from."""
    config = scene.config
    K = 2 * len(found)
    scaling = config.rope_scaling if config else None
    meant = config.rope_theta if config else fitted_theta(expected, None)
    scaled = config is None and not fits(ops.rope_frequencies(K, meant, None, np.float64), expected, positions)
    for assumed, note in ((scaling, ""), (None, ", without its scaling")) if scaling else ((None, ""),):
        theta = fitted_theta(found, assumed)
        angles = rotate(x, positions, ops.rope_frequencies(K, theta, assumed, np.float64))
        if scaled:  # by what isn't known, so that there is no θ to expect
            yield f"the reference's RoPE angles are scaled, yours are not: they are those of θ = {rounded(theta)} alone", angles
        elif abs(theta / meant - 1) > 1e-3:
            text = f"wrong RoPE θ: the angles are those of θ = {rounded(theta)}, and {rounded(meant)} was expected{note}"
            yield text, angles
    unscaled = ops.rope_frequencies(K, meant, None, np.float64)
    if scaling is not None:
        yield "RoPE's scaling is missing: the angles are those of θ alone", rotate(x, positions, unscaled)
    ratio = float(np.sum(expected * found) / np.sum(found * found))
    if abs(ratio - 1) > 1e-3:
        text = f"wrong RoPE scale factor: every angle is {rounded(1 / ratio)} times the expected one"
        yield text, rotate(x, positions, expected / ratio)
    if isinstance(scaling, RopeScaling) and (factor := scale_factor(found, unscaled, scaling)):
        text = f"wrong RoPE scale factor: {rounded(factor)}, and {rounded(scaling.factor)} was expected"
        other = dataclasses.replace(scaling, factor=factor)
        yield text, rotate(x, positions, ops.rope_frequencies(K, meant, other, np.float64))
    j = int(np.argmax(np.abs(found / expected - 1)))
    text = f"wrong RoPE angles: pair {j} turns by {found[j]:.6g} per position, and {expected[j]:.6g} was expected"
    yield text, rotate(x, positions, found)


def fits(made: np.ndarray, frequencies: np.ndarray, positions: np.ndarray) -> bool:
    """Whether two sets of angles per position are the same up to rounding at the furthest position."""
    return bool(np.max(np.abs(made - frequencies)) * max(1, positions.max()) < 1e-3)


def scale_factor(found: np.ndarray, unscaled: np.ndarray, scaling: RopeScaling) -> float | None:
    """What the pairs that Llama 3.1's scaling divides by its factor were divided by; None if no pair is so slow."""
    slow = np.flatnonzero(2 * math.pi / unscaled > scaling.original_max_seq_len / scaling.low_freq_factor)
    if not slow.size or found[slow[0]] <= 0:
        return None
    return float(np.round(unscaled[slow[0]] / found[slow[0]], 2))  # the fastest of them turns furthest: the best known


def fitted_theta(frequencies: np.ndarray, scaling: RopeScaling | None) -> float:
    """The θ whose frequencies come closest: least squares in the angle per position, so that fast pairs count most."""

    def miss(log_theta: float) -> float:
        made = ops.rope_frequencies(2 * len(frequencies), math.exp(log_theta), scaling, np.float64)
        return float(np.sum((made - frequencies) ** 2))

    centre, reach = math.log(1e5), math.log(1e5)  # from 1 to 1e10
    for _ in range(12):  # a grid, then finer ones around the best: more than float64 resolves
        centre = min(np.linspace(centre - reach, centre + reach, 61), key=miss)
        reach /= 12
    return math.exp(centre)


def rounded(x: float) -> str:
    """Four digits of a number, without an exponent: 500000, 1e-05 stays."""
    short = float(f"{x:.4g}")
    return f"{short:.0f}" if short == round(short) and abs(short) < 1e15 else f"{short:g}"


def row_order(scene: Scene) -> Iterator[Prediction]:
    """Hugging Face's order of the rows of wq and wk."""
    kind = scene.here.kind
    right = right_operation(scene)
    if right is None:
        right = np.asarray(scene.aligned.reference[scene.name], np.float64)
    text = (
        "half-split order: it fits once each head's numbers are permuted from Hugging Face's halves to adjacent pairs, "
        f"so w{kind[-1]} has Hugging Face's order of rows"
    )
    rope = scene.own(f"{kind}_rope")
    frequencies = expected_frequencies(scene)
    if rope is not None and frequencies is not None:
        positions, _ = scene.positions()
        own = scene.target
        error_halves = relative_error(rope, to_pairs_of(rotate, own, positions, frequencies))
        error_pairs = relative_error(rope, rotate(own, positions, frequencies))
        if error_halves < error_pairs:
            text += (
                f"; {kind.removeprefix('attention.')}_rope turns halves too, so only the layout differs (--map, pairs: halves)"
            )
        else:
            text += ", but RoPE turns adjacent pairs"
    yield text, to_halves(right)


# -------------------------------------------------------------------------------------------------------------- attention


def attend(
    scene: Scene,
    mask: np.ndarray | None = None,
    scale: float | None = None,
    head_of: np.ndarray | None = None,
    values: str = "attention.v",
) -> np.ndarray | None:
    """Scores, weights or heads, as the scene's activation is one, from the nearest activations that the candidate has.

    What isn't given is as it should be; head_of is the key/value head of each query head. None if something is not at hand.
    """
    kind = scene.here.kind
    if kind == "attention.heads" and (weights := scene.own("attention.weights")) is not None:
        return average(scene.slots(values), weights, head_of)
    scores = scene.own("attention.scores") if kind != "attention.scores" else None
    if (mask is not None or scale is not None) and scene.adjusted_scores():
        scores = None
    if scores is None:
        q, keys = scene.get("attention.q_rope"), scene.slots("attention.k_rope")
        if q is None or keys is None:
            return None
        products = q.swapaxes(-2, -3) @ for_queries(keys, q.shape[-2], head_of).swapaxes(-1, -2)
        if mask is None:
            mask = ops.causal_mask(*scene.positions(), np.float64)
        scores = products * (q.shape[-1] ** -0.5 if scale is None else scale) + mask
    if kind == "attention.scores":
        return scores
    if np.isneginf(scores.max(axis=-1)).any():  # a token that sees nothing has no weights
        return None
    weights = ops.softmax(scores)
    return weights if kind == "attention.weights" else average(scene.slots(values), weights, head_of)


def for_queries(x: np.ndarray, H: int, head_of: np.ndarray | None) -> np.ndarray:
    """Keys or values repeated, one for each query head.    [..., G, S, K] -> [..., H, S, K]"""
    G = x.shape[-3]
    return x[..., np.arange(H) // (H // G) if head_of is None else head_of, :, :]


def average(values: np.ndarray | None, weights: np.ndarray, head_of: np.ndarray | None) -> np.ndarray | None:
    """The heads.    values [..., G, S, K], weights [..., H, T, S] -> [..., T, H, K]"""
    return None if values is None else (weights @ for_queries(values, weights.shape[-3], head_of)).swapaxes(-2, -3)


def attention_mistakes(scene: Scene) -> Iterator[Prediction]:
    """The mask, the scale, and which key/value head a query head uses."""
    kind = scene.here.kind
    sizes = dimensions(scene.aligned.reference)
    H, G, K = (sizes.get(axis) for axis in "HGK")
    if None in (H, G, K):
        return
    known = {"attention.weights": ("attention.scores",), "attention.heads": ("attention.scores", "attention.weights")}
    recorded = [source for source in known.get(kind, ()) if scene.own(source) is not None]
    adjusted = scene.adjusted_scores() if recorded == ["attention.scores"] else set()
    if not recorded or "unmasked" in adjusted:  # else the scores show how they were masked
        queries, slots = scene.positions()
        yield "the causal mask is missing: tokens see those after them", attend(scene, mask=np.zeros(()))
        sees_next = ops.causal_mask(queries + 1, slots, np.float64)
        yield "position off by one in the causal mask: each token sees the one after it", attend(scene, mask=sees_next)
        sees_past = ops.causal_mask(queries - 1, slots, np.float64)
        yield "position off by one in the causal mask: no token sees itself", attend(scene, mask=sees_past)
        sees_past = np.where(slots[..., None, None, :] == 0, 0.0, sees_past)
        yield "position off by one in the causal mask: no token but the first sees itself", attend(scene, mask=sees_past)
    if not recorded or "scale" in adjusted:
        yield f"1/sqrt(K) is missing: the scores are sqrt({K}) times too large", attend(scene, scale=1.0)
        if scene.config and scene.config.dim != K:
            text = f"wrong scale: the scores are divided by sqrt(D) = sqrt({scene.config.dim}) instead of sqrt(K) = sqrt({K})"
            yield text, attend(scene, scale=scene.config.dim**-0.5)
        yield f"wrong scale: the scores are divided by K = {K} instead of sqrt(K)", attend(scene, scale=1 / K)
    if not recorded or kind == "attention.heads":
        shared = "keys" if kind == "attention.scores" else "values" if recorded else "keys and values"
        for rule, heads in (
            ("h % G", np.arange(H) % G),
            ("min(h, G - 1)", np.minimum(np.arange(H), G - 1)),
            ("0", np.zeros(H, int)),
        ):
            if (heads != np.arange(H) // (H // G)).any():
                text = (
                    f"{shared} are not repeated as grouped queries need: query head h uses head {rule}, and h // {H // G} was "
                    f"expected (each of the {G} heads serves {H // G} neighbouring query heads)"
                )
                yield text, attend(scene, head_of=heads)
    if kind == "attention.heads":
        for source in ("attention.k", "attention.k_rope"):
            text = f"the value is taken from k: the heads are averages of {source}, not of attention.v"
            yield text, attend(scene, values=source)


# ------------------------------------------------------------------------------------------------- norms, linear, precision

NORMS = ("attention_norm", "ffn_norm", "norm")
WEIGHTS = {
    "attention.q": ("attention_norm", "attention.wq.weight"),
    "attention.k": ("attention_norm", "attention.wk.weight"),
    "attention.v": ("attention_norm", "attention.wv.weight"),
    "attention.out": ("attention.heads", "attention.wo.weight"),
    "feed_forward.gate": ("ffn_norm", "feed_forward.w1.weight"),
    "feed_forward.up": ("ffn_norm", "feed_forward.w3.weight"),
    "feed_forward.out": ("feed_forward.act", "feed_forward.w2.weight"),
    "logits": ("norm", "output.weight"),
}
TWINS = {
    "attention.v": ("attention.k",),
    "attention.k": ("attention.v",),
    "feed_forward.gate": ("feed_forward.up",),
    "feed_forward.up": ("feed_forward.gate",),
}


def norm_input(scene: Scene) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """What a norm gets and its weight, the latter from the reference's numbers when there is no model."""
    kind, layer = scene.here.kind, scene.here.layer
    before = {
        "attention_norm": f"layers.{layer - 1}.out" if layer else "tok_embeddings",
        "ffn_norm": f"layers.{layer}.attention_residual",
        "norm": f"layers.{scene.layers - 1}.out",
    }[kind]
    x = scene.get_named(before)
    if x is None or scene.config is None:
        return None, None
    if scene.params is not None:
        weight = scene.params[f"{scene.name.removeprefix(scene.here.prefix)}.weight"]
        return x, np.asarray(widen(weight), np.float64)
    reference = scene.aligned.reference
    if (source := scene.here.prefix + before) not in reference:
        return None, None
    unit = ops.rms_norm(np.asarray(reference[source], np.float64), np.ones(()), scene.config.norm_eps)
    over_tokens = tuple(range(unit.ndim - 1))
    y = np.asarray(reference[scene.name], np.float64)
    return x, np.sum(y * unit, over_tokens) / np.sum(unit * unit, over_tokens)


def norm_mistakes(scene: Scene) -> Iterator[Prediction]:
    """Parts of it left out, a weight meant otherwise, another eps, solved for from each token's scale."""
    x, weight = norm_input(scene)
    if weight is None or x.shape != scene.target.shape:
        return
    eps = scene.config.norm_eps
    yield "the norm is missing: these are the numbers that go into it", x
    yield "the norm's weight is missing: the numbers are scaled to unit size only", ops.rms_norm(x, np.ones(()), eps)
    yield "the norm multiplies by 1 + weight, as Gemma's does, and Llama's by weight", ops.rms_norm(x, 1 + weight, eps)
    centred = x - x.mean(axis=-1, keepdims=True)
    yield "LayerNorm, which takes the mean away, instead of RMSNorm", ops.rms_norm(centred, weight, eps)
    weighted = x * weight
    inverse = np.sum(scene.target * weighted, -1) / np.sum(weighted * weighted, -1)  # 1 / sqrt(mean x² + eps)
    mean_square = np.mean(x * x, axis=-1)
    # Tokens of small numbers show eps best: each token's estimate is off by about its mean square's rounding.
    eps = float(np.average(1 / inverse**2 - mean_square, weights=1 / mean_square**2))
    expected = scene.config.norm_eps
    if abs(eps - expected) > 1e-2 * expected and eps > -expected:
        shown = 0.0 if abs(eps) < 1e-2 * expected else float(f"{eps:.2g}")
        text = f"wrong eps: the norm is that of eps = {shown:g}, and {expected:g} was expected"
        yield text, ops.rms_norm(x, weight, max(eps, 0.0))


def linear_input(scene: Scene) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What a product with weights gets, and the weights if there is a model."""
    source, parameter = WEIGHTS[scene.here.kind]
    x = scene.get(source)
    if x is not None and source == "attention.heads":
        x = x.reshape(*x.shape[:-2], -1)
    if scene.params is None:
        return x, None
    if scene.here.layer is not None:
        parameter = f"layers.{scene.here.layer}.{parameter}"
    elif scene.config.tied_embeddings:
        parameter = "tok_embeddings.weight"
    weight = scene.params[parameter]
    return x, np.asarray(widen(weight) if is_packed(weight) else weight, np.float64)


def shaped(scene: Scene, y: np.ndarray) -> np.ndarray:
    """With the heads split where the activation has them split."""
    return y.reshape(scene.aligned.reference[scene.name].shape)


def linear_mistakes(scene: Scene) -> Iterator[Prediction]:
    """Another product's weights, weights read transposed, or less precision."""
    kind = scene.here.kind
    for twin in TWINS.get(kind, ()):
        for other in (scene.own(twin), scene.aligned.reference.get(scene.here.sibling(twin))):
            if other is not None and other.shape == scene.target.shape:
                yield (
                    f"it is {twin}: the {named(kind)} is taken from {twin[-1] if 'attention' in twin else twin}",
                    np.asarray(other, np.float64),
                )
    x, weight = linear_input(scene)
    if x is None or weight is None:
        return
    n_out, n_in = weight.shape
    if kind == "logits" and not scene.config.tied_embeddings:
        tied = np.asarray(widen(scene.params["tok_embeddings.weight"]), np.float64)
        yield (
            "the output matrix is taken to be the embedding, but this model has one of its own (output.weight)",
            linear(x, tied),
        )
    text = f"transposed weights: the product is x · W with the {n_out} x {n_in} weight read as {n_in} x {n_out}, not x · Wᵀ"
    yield text, shaped(scene, x @ weight.reshape(n_in, n_out))
    for precision, r in ROUND.items():
        x_rounded, w_rounded = (r(np.asarray(a, np.float32)).astype(np.float64) for a in (x, weight))
        for what, a, w in (
            ("weights", x, w_rounded),
            ("inputs", x_rounded, weight),
            ("weights and inputs", x_rounded, w_rounded),
        ):
            text = f"{precision} where float32 was meant: it fits the product with the {what} rounded to {precision}"
            yield text, shaped(scene, linear(a, w))
    cut = (np.asarray(weight, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    text = "bfloat16 where float32 was meant, cut off instead of rounded: it fits the product with the weights cut to 16 bits"
    yield text, shaped(scene, linear(x, cut))


def activation_mistakes(scene: Scene) -> Iterator[Prediction]:
    """Another function than silu, or its arguments exchanged."""
    gate, up = scene.get("feed_forward.gate"), scene.get("feed_forward.up")
    if gate is None or up is None or gate.shape != scene.target.shape:
        return
    silu = ops.silu(gate)
    yield "the gate and up are exchanged: it is silu(up) · gate, and silu(gate) · up was expected", ops.silu(up) * gate
    yield "silu is missing: it is gate · up, and silu(gate) · up was expected", gate * up
    yield "up is missing: it is silu(gate), and silu(gate) · up was expected", silu
    yield "the gate is taken for up: it is silu(gate) · gate, and silu(gate) · up was expected", silu * gate
    yield "ReLU instead of silu in the feed-forward", np.maximum(gate, 0.0) * up
    sigmoid = silu / np.where(gate == 0, 1.0, gate)
    yield "the sigmoid instead of silu in the feed-forward: silu(x) is x · sigmoid(x)", sigmoid * up
    tanh = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    yield "GELU instead of silu in the feed-forward, by its formula with tanh", 0.5 * gate * (1 + tanh) * up
    erf = np.vectorize(math.erf, otypes=[np.float64])(gate / math.sqrt(2))
    yield "GELU instead of silu in the feed-forward, by its formula with erf", 0.5 * gate * (1 + erf) * up
    yield "QuickGELU, x · sigmoid(1.702 x), instead of silu in the feed-forward", ops.silu(1.702 * gate) / 1.702 * up


RESIDUALS = {"attention_residual": ("attention_norm", "attention.out"), "out": ("ffn_norm", "feed_forward.out")}


def residual_inputs(scene: Scene) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What is added: the residual stream so far, and what attention or the feed-forward made of it."""
    layer = scene.here.layer
    before = f"layers.{layer}.attention_residual"
    if scene.here.kind == "attention_residual":
        before = f"layers.{layer - 1}.out" if layer else "tok_embeddings"
    return scene.get_named(before), scene.get(RESIDUALS[scene.here.kind][1])


def residual_mistakes(scene: Scene) -> Iterator[Prediction]:
    """One of the two is left out, or the wrong one is added."""
    normed, added = RESIDUALS[scene.here.kind]
    x, y = residual_inputs(scene)
    if x is None or y is None:
        return
    yield f"the residual connection is missing: it is {added} alone", y
    yield f"{added} is not added: these are the numbers before it", x
    if (z := scene.get(normed)) is not None:
        yield f"the residual connection starts after the norm: {added} is added to {normed}, not to what went into it", z + y


def named(kind: str) -> str:
    """attention.v is the value."""
    return {"attention.v": "value", "attention.k": "key"}.get(kind, kind)


def reduced_precision(scene: Scene, right: np.ndarray | None) -> str | None:
    """Whether every number of the candidate, but not of the reference, is one of a 16-bit format, and about the right one.

    Rounding is the cause only where nothing else is wrong: ones, zeros and a bfloat16 model's untouched embeddings are numbers
    of 16 bits, too. About right is what one operation on the candidate's own inputs makes, or, where it isn't known, what
    several have made of the reference's.
    """
    if scene.precision in ROUND:
        return None
    reference = np.asarray(scene.aligned.reference[scene.name], np.float64)
    c, r, _ = pair(scene.aligned, scene.name, scene.target, reference if right is None else right)
    if relative_error(c, r) > (GATHERED if right is None else ROUNDED_ONCE):
        return None
    reference = reference.astype(np.float32)
    target = scene.target.astype(np.float32)
    finite = target[np.isfinite(target)]
    for precision, rounding in ROUND.items():
        if (
            np.array_equal(rounding(finite), finite)
            and np.count_nonzero(rounding(reference) != reference) > reference.size // 8
        ):
            return (
                f"{precision} where float32 was meant: every number is one that {precision} has "
                f"(if {precision} was meant: --precision {precision})"
            )
    return None


def bfloat16_sized(scene: Scene) -> str | None:
    """Whether the error looks like bfloat16's rounding: of its size, and unrelated to the reference's numbers."""
    if scene.precision in ROUND:
        return None
    c, r, _ = pair(scene.aligned, scene.name, scene.target, scene.aligned.reference[scene.name])
    error, both = relative_error(c, r), np.isfinite(c) & np.isfinite(r)
    d, r = c[both] - r[both], r[both]
    related = abs(float(np.sum(d * r))) / math.sqrt(float(np.sum(d * d) * np.sum(r * r)) or 1.0)
    if 2.0**-11 < error < 2.0**-6 and related < 0.1:
        size = f"{error:.1e}, unrelated to the values"
        return f"an error of the size of bfloat16's rounding ({size}): bfloat16 where float32 was meant?"
    return None


MISTAKES: dict[str, tuple[Callable[[Scene], Iterator[Prediction]], ...]] = {
    **dict.fromkeys(WEIGHTS, (linear_mistakes,)),
    **dict.fromkeys(("attention.q", "attention.k"), (row_order, linear_mistakes)),
    **dict.fromkeys(NORMS, (norm_mistakes,)),
    **dict.fromkeys(RESIDUALS, (residual_mistakes,)),
    "feed_forward.act": (activation_mistakes,),
    **dict.fromkeys(("attention.q_rope", "attention.k_rope"), (rope_mistakes,)),
    **dict.fromkeys(("attention.scores", "attention.weights", "attention.heads"), (attention_mistakes,)),
}
