"""Explain a wrong activation: try each of the list of mistakes on the candidate's own numbers.

A mistake predicts the first wrong activation: it is computed in float64 with the mistake from the candidate's own inputs, or
from the reference's where the candidate lacks them. A hint is given only if the prediction explains the candidate's numbers
and the correct operation doesn't: it is evidence, not a guess from the size of the error. If several mistakes explain the
numbers, all are reported. The only guess, bfloat16_sized(), ends in a question mark. Operations between recorded activations
are computed too, so that mistakes in them are found. If not even the residual stream is recorded, as in a port that gives only
logits, the model is run again with each of the mistakes in RERUN.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ... import ops
from ...activations import STREAM, TABLE, TOKENS, Activation, Context, stream_before
from ...cache import PADDING
from ...engine.linear import Weight, widen
from ...engine.ranks.passes import Spread, whole_params
from ...model import PLAIN
from ...scope import Ops
from ..mistakes import MISTAKES, NORMS, QUERIES, ROTATED, Mistake, Port, Taken
from ..precision import ROUND, Precision
from ..trace import run
from .angles import angles_between, wrong_frequencies
from .judging import Aligned, judge, pair, relative_error
from .names import place
from .noise import NoiseFloor

ROUNDED_ONCE, GATHERED = 2.0**-6, 2.0**-3  # more than the relative error of one bfloat16 operation, of some layers of them
EXPLAINED = 1e-3  # a prediction that leaves less than this share of the error explains it
ROUNDED_ALIKE = 0.1  # of a rounding to 8 bits, in which a number halfway between two may go either way
# For ports that give only logits: lost constants, RoPE's layout, other layers' weights; mistakes in decode are tried where the
# prompt's logits are right, mistakes with padding where the tokens have some.
RERUN = (
    *("eps", "no_eps", "eps_outside_root", "theta_10000", "theta_500000", "no_scaling", "scale_factor", "scaling_of_all"),
    *(
        "scaling_unblended",
        "scaling_of_new_context",
        "half_split",
        "interleaved_on_halves",
        "rows_in_halves",
        "no_rope",
        "angles_in_bfloat16",
    ),
    *("position_1_late", "output_from_embedding", "last_layer_missing", "layer_0_everywhere", "previous_layers_weights"),
    *("keys_unrotated_in_decode", "cache_over_the_last", "cache_overwritten", "positions_restart", "position_late_in_decode"),
    *("padding_as_tokens", "padding_counted", "position_of_the_longest_row"),
)
WHAT_PARTS_ARE = {
    "float16-cache": "keys and values are in float16",
    "int8-activations": "what is multiplied by weights is rounded to 8 bits in blocks of 32, as llama.cpp does for Q8_0",
    "int8-activations-256": "what is multiplied by weights is rounded to 8 bits in blocks of 256, as llama.cpp does for Q4_K",
    "float16-activations": "what is multiplied by weights is rounded to float16",
    "bfloat16-activations": "what is multiplied by weights is rounded to bfloat16",
}

RIGHT_BY_ITSELF = "its own operation is right"

T = TypeVar("T")
Prediction = tuple[str, "np.ndarray | None"]
RIGHT = Mistake("", "")  # changes nothing


class Scene:
    """Hold the first wrong activation, and the other arrays and facts that hints need."""

    def __init__(self, name: str, aligned: Aligned, noise: NoiseFloor, precision: str):
        self.name, self.here, self.aligned, self.noise, self.precision = name, place(name), aligned, noise, precision
        self.config, self.params = aligned.config, whole_params(aligned.model.params) if aligned.model else None
        self.target = np.asarray(aligned.candidate.get(name, math.nan), np.float64)
        self.layers = 1 + max((place(n).layer or 0 for n in aligned.reference), default=0)

    def sibling(self, kind: str) -> str:
        """Name another activation of the same pass, and of the same layer if it is one of a layer's."""
        if kind == STREAM:
            return self.here.prefix + stream_before(self.layers if self.here.layer is None else self.here.layer)
        return self.here.sibling(kind)

    def recorded(self, name: str) -> np.ndarray | None:
        """Return the candidate's activation in float64; None if it is missing, shortened or computed by its map."""
        x, rule = self.aligned.candidate.get(name), self.aligned.rules.get(name)
        made = rule and (rule.scale or rule.unmasked)
        whole = x is not None and not made and x.shape == self.aligned.reference[name].shape
        return np.asarray(x, np.float64) if whole else None

    def reference(self, name: str) -> np.ndarray | None:
        """Return an activation of the reference in float64, if it has it."""
        return np.asarray(self.aligned.reference[name], np.float64) if name in self.aligned.reference else None

    def earlier(self, kind: str) -> list[str]:
        """Name an activation of the same layer in each of the passes before this one."""
        steps = [] if self.here.step is None else [None, *range(self.here.step)]
        return [self.here._replace(step=step).sibling(kind) for step in steps]

    def tokens(self) -> np.ndarray | None:
        """Return the ids of this pass, where they are known."""
        if self.here.step is None or self.aligned.tokens is None:
            return self.aligned.tokens
        return np.reshape(self.aligned.steps[self.here.step], (*self.aligned.tokens.shape[:-1], 1))

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of this pass's tokens and of all slots so far.    int [..., T], int [..., S]"""
        if self.aligned.tokens is None:
            x = self.aligned.reference[self.name]
            axes = at_hand(self.here.axes)
            counted = np.arange(x.shape[axes.index("T") - len(axes)])
            return counted, counted
        is_token = self.aligned.tokens >= 0
        if self.here.step is not None:
            more = np.ones((*is_token.shape[:-1], self.here.step + 1), bool)
            is_token = np.concatenate([is_token, more], axis=-1)
        slots = np.where(is_token, np.cumsum(is_token, axis=-1) - 1, PADDING)
        return (slots if self.here.step is None else slots[..., -1:]), slots

    def only_in_decode(self) -> bool:
        """Return whether the same activation of the prompt is recorded and correct: this one is wrong in decode only."""
        return self.here.step is not None and self.here._replace(step=None).sibling(self.here.kind) in self.aligned.candidate

    def explains(self, prediction: np.ndarray | None, wrong: np.ndarray | None, share: float = EXPLAINED) -> bool:
        """Return whether the prediction is the candidate up to rounding, or leaves at most `share` of the right one's error.

        A prediction that equals the correct operation's result within rounding explains nothing.
        """
        if prediction is None or not (prediction < np.inf).all() or prediction.shape != self.aligned.reference[self.name].shape:
            return False
        if wrong is not None and self._agrees(*pair(self.aligned, self.name, prediction, wrong)):
            return False
        c, r, kept = pair(self.aligned, self.name, self.target, prediction)
        if self._agrees(c, r, kept):
            return True
        if wrong is None or (np.isneginf(c) != np.isneginf(r)).any():
            return False
        c, w, _ = pair(self.aligned, self.name, self.target, wrong)
        return relative_error(c, r) < share * min(relative_error(c, w), 1.0)

    def _agrees(self, c: np.ndarray, r: np.ndarray, kept: np.ndarray) -> bool:
        if (np.isneginf(c) != np.isneginf(r)).any():
            return False
        return judge(self.name, c, r, kept, self.noise, local=self.name in self.noise.local, one=True).passed


class Attempt:
    """Compute activations with one mistake, or none, each from the inputs that the candidate recorded."""

    def __init__(self, scene: Scene, mistake: Mistake = RIGHT, frequencies: np.ndarray | None = None):
        self.scene, self.mistake = scene, mistake
        self.exact = Precision("float64", parts=scene.noise.parts)
        self.ops: Ops = replace(self.exact.ops or PLAIN, **mistake.ops)
        self.config = scene.config and mistake.constants(scene.config)
        self.params = mistake.params(scene.params, scene.config) if scene.params is not None and scene.config else None
        self.frequencies = frequencies
        self.computed: dict[str, np.ndarray | None] = {}

    def __call__(self, kind: str) -> np.ndarray:
        """Return an input: the candidate's, else one computed from its arrays, else the reference's; else ValueError."""
        if kind == TOKENS:
            return at_hand(self.scene.tokens())
        name = self.scene.sibling(kind)
        x = self.scene.recorded(name)
        if x is None and kind != STREAM:
            x = self.compute(kind)
        return at_hand(self.scene.reference(name) if x is None else x)

    def at(self, name: str) -> np.ndarray:
        """Return an activation of an earlier pass, found as in __call__."""
        scene = Scene(name, self.scene.aligned, self.scene.noise, self.scene.precision)
        return Attempt(scene, self.mistake, self.frequencies)(scene.here.kind)

    def compute(self, kind: str) -> np.ndarray | None:
        """Compute an activation by the table and with the mistake; None where an input is missing or has another shape."""
        if kind not in self.computed:
            change, x = self.mistake.activations.get(kind), None
            with contextlib.suppress(ValueError), np.errstate(all="ignore"):
                x = self._by_table(TABLE[kind])
            with contextlib.suppress(ValueError), np.errstate(all="ignore"):
                if change:  # the reference's numbers, where the correct ones can't be computed
                    right, x = (self.scene.reference(self.scene.sibling(kind)) if x is None else x), None
                    x = change(at_hand(right), self)
            self.computed[kind] = x
        return self.computed[kind]

    def _by_table(self, row: Activation) -> np.ndarray:
        inputs = [self(kind) for kind in row.inputs]
        taken = self.mistake.parameters
        if self.params is None and isinstance(taken, Taken) and row.weight.endswith(taken.weight):
            twins = [a.name for a in TABLE.values() if a.inputs == row.inputs and a.weight.endswith(taken.other)]
            return self(twins[0]) if twins else at_hand(None)
        weight = self.weight(row) if row.weight else None
        slots = {row.slots: self.slots(row.slots)} if row.slots else {}
        rotation = mask = None
        if row.operation == "rope":
            rotation = self.ops.rope_rotation(self.scene.positions()[0], self.expected_frequencies())
        if row.operation == "attention_scores":
            mask = self.ops.causal_mask(*self.scene.positions(), np.float64)
        return np.asarray(row.compute(inputs, weight, Context(self.config, rotation, mask, slots, self.ops)), np.float64)

    def slots(self, kind: str) -> np.ndarray:
        """Return the keys or values of all tokens so far, stored as the mistake stores them.    [..., G, S, K]"""
        passes = [*(self.at(name) for name in self.scene.earlier(kind)), self(kind)]
        whole = np.concatenate(passes, axis=-3).swapaxes(-2, -3)
        if self.mistake.cache is None:
            return whole
        store, length, kept = np.zeros((*whole.shape[:-2], 2 * whole.shape[-2], whole.shape[-1])), 0, whole
        for new in passes:
            kept = self.mistake.cache(store, length, new)
            length += new.shape[-3]
        return kept

    def expected_frequencies(self) -> np.ndarray:
        """Return the config's frequencies, or those that rotated the reference's own queries."""
        if self.frequencies is not None:
            return self.frequencies
        if (config := self.config) is not None:
            return self.ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)
        if self.ops.rope_frequencies is not PLAIN.rope_frequencies:
            return at_hand(None)
        q, rotated = (at_hand(self.scene.reference(self.scene.sibling(kind))) for kind in ("attention.q", "attention.q_rope"))
        return at_hand(angles_between(q, rotated))

    def weight(self, row: Activation) -> Weight:
        """Return the weight; without a model, a norm's weight from the reference's numbers."""
        scene = self.scene
        if self.params is not None:
            weight = self.params[row.parameter(at_hand(scene.config), scene.here.layer)]
            return weight if row.operation == "embed" else self.exact.weight(weight)
        if row.operation != "rms_norm":
            return at_hand(None)
        x, y = (at_hand(scene.reference(scene.sibling(kind))) for kind in (row.inputs[0], row.name))
        unit = ops.rms_norm(x, np.ones(()), at_hand(scene.config).norm_eps)
        over_tokens = tuple(range(unit.ndim - 1))
        return np.sum(y * unit, over_tokens) / np.sum(unit * unit, over_tokens)


def at_hand(x: T | None) -> T:
    """Return x; raise ValueError where there is none."""
    if x is None:
        raise ValueError("missing")
    return x


def hints(name: str, aligned: Aligned, noise: NoiseFloor, precision: str) -> list[str]:
    """Return hints for the mistakes that explain the activation, usually one or none; all but the first begin "or: "."""
    scene = Scene(name, aligned, noise, precision)
    if scene.here.axes is None or np.isnan(scene.target).any() or np.isposinf(scene.target).any():
        return []
    attempt = Attempt(scene)
    right = attempt.compute(scene.here.kind)
    if right is not None and scene.explains(right, None):
        return [f"{RIGHT_BY_ITSELF}, but its inputs aren't: small errors accumulate, or a step before it isn't recorded"]
    if not scene.target.any() and np.any(scene.aligned.reference[name]):
        return ["every number is zero: was it ever written?"]
    texts = [text for text, prediction in from_the_list(attempt) if scene.explains(prediction, right)]
    texts += [text for text, prediction in other_roundings(attempt) if scene.explains(prediction, right, ROUNDED_ALIKE)]
    for predictions in (other_angles, other_eps) if not texts else ():
        texts += next(([text] for text, prediction in predictions(attempt) if scene.explains(prediction, right)), [])
    if not texts:
        exact = scene.reference(name)
        texts = [text for text, prediction in whole_passes(scene) if scene.explains(prediction, exact)]
    first, *others = dict.fromkeys(texts) or [reduced_precision(scene, right) or bfloat16_sized(scene)]
    return [first, *(f"or: {text}" for text in others)] if first else []


def slots_hint(name: str, aligned: Aligned) -> list[str]:
    """Describe what scores or weights of another number of keys than there are tokens say of the cache."""
    shape, reference = aligned.unfit.get(name), aligned.reference[name].shape
    axes = place(name).axes or ""
    if shape is None or not axes.endswith("S") or len(shape) < len(axes) or shape[-3:-1] != reference[-3:-1]:
        return []
    T, found, expected = reference[-2], shape[-1], reference[-1]
    if found == T and place(name).step is not None:
        cause = "the cache's are missing, and only those of this pass are attended to"
    elif found < expected:
        cause = "keys were dropped from the cache, overwritten, or those of this pass were not appended"
    else:
        cause = "slots of the cache that hold no token's key are attended to"
    return [f"{found} key{'s' * (found != 1)} where {expected} tokens have come so far: {cause}"]


def from_the_list(right: Attempt) -> Iterator[Prediction]:
    """Yield every mistake that shows at this activation, or else at an earlier unrecorded one, the nearest first."""
    scene, computed = right.scene, list(right.computed)  # an activation's inputs come before it; itself last
    near = {name: max((computed.index(kind) for kind in m.at if kind in computed), default=-1) for name, m in MISTAKES.items()}
    for mistake in sorted(MISTAKES.values(), key=lambda mistake: -near[mistake.name]):
        if near[mistake.name] < 0 or (mistake.fitted and scene.here.kind in mistake.at):  # its constant is estimated below
            continue
        if mistake.needs == "decode" and not scene.only_in_decode():
            continue
        if scene.config is not None and not mistake.applies(scene.config):
            continue
        if contradicted(scene, mistake):
            continue
        text = mistake.sentence + (row_order_note(right) if mistake.name == "rows_in_halves" else "")
        yield text, Attempt(scene, mistake).compute(scene.here.kind)


def contradicted(scene: Scene, mistake: Mistake) -> bool:
    """Return whether a mistake in several operations would show at another one too, where the candidate is right by itself."""
    for kind in mistake.at if len(mistake.ops) > 1 or mistake.cache else ():
        if kind == scene.here.kind or scene.recorded(scene.sibling(kind)) is None:
            continue
        there = Scene(scene.sibling(kind), scene.aligned, scene.noise, scene.precision)
        if there.explains(Attempt(there).compute(kind), Attempt(there, mistake).compute(kind)):
            return True
    return False


def other_roundings(right: Attempt) -> Iterator[Prediction]:
    """Yield the further roundings of quantised ports, where no rounding profile was given; and centred logits."""
    scene = right.scene
    made = right.computed.get(scene.here.kind)
    if scene.here.kind == "logits" and made is not None:
        text = "logits are centred: each token's mean is subtracted, which changes no probability (TransformerLens does that)"
        yield text, made - made.mean(axis=-1, keepdims=True)
    for part, what in WHAT_PARTS_ARE.items() if not scene.noise.parts else ():
        attempt = Attempt(scene)
        attempt.ops = Precision("float64", parts=(part,)).ops or PLAIN
        yield f"{what}: --profile {part}", attempt.compute(scene.here.kind)


def whole_passes(scene: Scene) -> Iterator[Prediction]:
    """Run the model again with each of the usual mistakes, where the activation's inputs aren't recorded."""
    model, tokens = scene.aligned.model, scene.aligned.tokens
    if model is None or tokens is None or scene.here.kind == "tok_embeddings":
        return
    if isinstance(model.params, Spread):  # the other ranks can't compute with mistakes
        return
    streams = [STREAM] if scene.here.layer is None else [STREAM, *(kind for kind in TABLE if TABLE[kind].in_layer)]
    if any(scene.sibling(kind) in scene.aligned.candidate for kind in streams if kind != scene.here.kind):
        return
    can_show = {"": True, "decode": scene.only_in_decode(), "padding": bool((tokens < 0).any())}
    for name in RERUN:
        if not MISTAKES[name].applies(model.config) or not can_show[MISTAKES[name].needs]:
            continue
        found: dict[str, np.ndarray] = {}

        def tap(name: str, x: np.ndarray, found: dict[str, np.ndarray] = found) -> np.ndarray:
            if name == scene.name:
                found[name] = x
            return x

        run(model, tokens, scene.aligned.steps, Port(name, computed=Precision("float64", parts=scene.noise.parts)), tap)
        yield f"{MISTAKES[name].sentence} (running the model with this mistake gives the same numbers)", found.get(scene.name)


def row_order_note(right: Attempt) -> str:
    """Describe, from the candidate's own rotation, whether Hugging Face's order of rows is correct in its layout."""
    scene, kind = right.scene, right.scene.here.kind
    rotated = scene.recorded(f"{scene.name}_rope")
    if kind in QUERIES and rotated is not None:
        with contextlib.suppress(ValueError):  # without the angles
            rotation = ops.rope_rotation(scene.positions()[0], right.expected_frequencies())
            halves, pairs = (rope(scene.target, *rotation) for rope in (MISTAKES["half_split"].ops["rope"], ops.rope))
            if relative_error(rotated, halves) >= relative_error(rotated, pairs):
                return ", but RoPE rotates adjacent pairs"
            return f"; {kind[-1]}_rope rotates halves too, so only the layout differs (--map, pairs: halves)"
    return ""


def other_angles(right: Attempt) -> Iterator[Prediction]:
    """Rotate by other angles, found in the candidate's own queries or keys."""
    scene, kind = right.scene, right.scene.here.kind
    if kind not in ROTATED or (made := right.computed[kind]) is None or made.shape != scene.target.shape:
        return
    x, expected, (positions, _) = right(kind.removesuffix("_rope")), right.expected_frequencies(), scene.positions()
    if (found := angles_between(x, scene.target)) is not None:
        for text, frequencies in wrong_frequencies(found, expected, scene.config, positions):
            yield text, Attempt(scene, frequencies=frequencies).compute(kind)


def other_eps(right: Attempt) -> Iterator[Prediction]:
    """Compute the norm with another eps, estimated from each token's scale."""
    scene, kind = right.scene, right.scene.here.kind
    if kind not in NORMS or (made := right.computed[kind]) is None or made.shape != scene.target.shape:
        return
    x, weight = right(TABLE[kind].inputs[0]), widen(right.weight(TABLE[kind]))
    weighted = x * weight
    inverse = np.sum(scene.target * weighted, -1) / np.sum(weighted * weighted, -1)  # 1 / sqrt(mean x² + eps)
    mean_square = np.mean(x * x, axis=-1)
    # Tokens of small numbers show eps best: each token's estimate is off by about its mean square's rounding.
    eps = float(np.average(1 / inverse**2 - mean_square, weights=1 / mean_square**2))
    expected = at_hand(scene.config).norm_eps
    if abs(eps - expected) > 1e-2 * expected and eps > -expected:
        shown = 0.0 if abs(eps) < 1e-2 * expected else float(f"{eps:.2g}")
        text = f"wrong eps: the norm is that of eps = {shown:g}, and {expected:g} was expected"
        yield text, ops.rms_norm(x, weight, max(eps, 0.0))


def reduced_precision(scene: Scene, right: np.ndarray | None) -> str | None:
    """Check whether all the candidate's numbers, but not the reference's, are exact in a 16-bit format and roughly correct.

    Rounding is the cause only if nothing else is wrong: ones, zeros and the embeddings of a bfloat16 model are exact in 16 bits
    too. Roughly correct means close to one operation's result from the candidate's own inputs or, where that isn't known, to
    the reference's.
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
                f"{precision} where float32 was meant: every number is exact in {precision} "
                f"(if {precision} was meant: --precision {precision})"
            )
    return None


def bfloat16_sized(scene: Scene) -> str | None:
    """Check whether the error looks like bfloat16's rounding: of its size, and unrelated to the reference's numbers."""
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
