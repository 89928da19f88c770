"""Compare a candidate's activations with a reference's, one by one in the order of their computation."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...checkpoint import Model, load
from ...config import Config
from ...engine.ranks.passes import whole_params
from ..precision import PRECISIONS, Precision
from ..precision import profile as read_profile
from ..trace import checked_run, model_facts, run
from .hints import RIGHT_BY_ITSELF, hints, slots_hint
from .inputs import Activations, InputError, read_activations
from .judging import Aligned, Judged, judge, pair, problem_of, relative_error
from .maps import LayoutError, MapError, NameMap, NeedsModel, Rule, arrange, fits, read_map
from .metrics import Metrics, measure, unit_roundoff
from .names import by_token, dimensions, in_order, place
from .noise import NoiseFloor, bundled_noise, coarsest, default_noise, measure_noise, noise_between


@dataclass
class Row:
    """Findings on one activation."""

    name: str
    problem: str | None = None  # a reason to fail other than its error: missing, NaN, another shape ...
    metrics: Metrics | None = None
    judged: Judged | None = None  # of the whole computation so far
    local: Judged | None = None  # of the operation alone, given the candidate's own inputs
    passed: bool = False


@dataclass
class Comparison:
    """Result of compare()."""

    reference: str
    candidate: str
    precision: str  # the candidate's
    noise: NoiseFloor
    tolerance: tuple[float, float] | None  # atol and rtol, if they are the limit instead of the noise floor
    rows: list[Row]  # in the order of computation
    assumed: str = ""  # why this precision, where the candidate's files are of several
    warnings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    map_title: str = ""  # of the map that was given

    @property
    def equal(self) -> bool:
        """Return whether nothing failed."""
        return all(row.passed for row in self.rows)

    @property
    def exit_status(self) -> int:
        """Return 0 if equal, 1 if different."""
        return 0 if self.equal else 1

    @property
    def first(self) -> Row | None:
        """Return the first row that failed; preferably one that both sides have."""
        failed = [row for row in self.rows if not row.passed]
        return next((row for row in failed if row.metrics or row.problem not in ABSENT), failed[0] if failed else None)

    @property
    def missing(self) -> list[Row]:
        """Return the rows that only one side has."""
        return [row for row in self.rows if row.problem in ABSENT]

    def is_culprit(self, row: Row) -> bool:
        """Return whether a failed row is wrong by itself, as far as is known, and not only because of those before it."""
        if row.passed or row.problem in ABSENT:
            return False
        return row is self.first or bool(row.local and not row.local.passed)

    @property
    def wrong_by_themselves(self) -> list[str]:
        """Return the activations whose operation is wrong even on the candidate's own inputs."""
        return [row.name for row in self.rows if row.local and not row.local.passed]

    @property
    def verdict(self) -> str:
        """Return one sentence, with the assumed precision if the candidate doesn't state it."""
        return self._verdict() + (f"; judged as {self.precision}: {self.assumed}" if self.assumed else "")

    def _verdict(self) -> str:
        row = self.first
        if row is None:
            return self._equal_verdict()
        if row.problem in ABSENT:
            theirs, ours = ([r.name for r in self.rows if r.problem == absent] for absent in ABSENT)
            if theirs and ours and len(theirs) + len(ours) == len(self.rows):
                names = f"{theirs[0]} in the reference, {ours[0]} in the candidate"
                if self.map_title:
                    wrong = f"the map {self.map_title} gives no name of the reference"
                    return f"nothing to compare: {wrong} ({names}): is it the map of another program?"
                return f"different: no name in common ({names}): is a --map missing?"
            others = sum(r.problem == row.problem for r in self.rows) - 1
            sentence = f"incomplete: {row.name} is {row.problem}" + (f", and {others} more" if others else "")
            return sentence + ("; what both have is equal" if len(self.missing) < len(self.rows) else "")
        if row.judged is None:
            return f"first divergence: {row.name} ({row.problem})"
        shown, kind = row.judged, "relative error"
        if self.tolerance is None and row.problem is None and row.judged.passed and row.local is not None:
            shown, kind = row.local, "local relative error"
        against = f"noise floor {_short(shown.floor)}"
        if self.tolerance is not None:
            against = f"beyond atol {self.tolerance[0]:g} + rtol {self.tolerance[1]:g}"
        sentence = f"first divergence: {row.name} ({kind} {shown.error:.1e}, {against})"
        return sentence + (f": {row.problem}" if row.problem else "")

    def _equal_verdict(self) -> str:
        count = f"{len(self.rows)} activation{'s' * (len(self.rows) != 1)}"
        if self.tolerance is not None:
            return f"equal within atol {self.tolerance[0]:g} + rtol {self.tolerance[1]:g}: {count}"
        worst, name = max(((row.judged, row.name) for row in self.rows if row.judged), key=lambda found: found[0].ratio)
        if worst.ratio == 0:
            return f"identical: {count}"
        return (
            f"equal within rounding: {count}, none more than {worst.ratio:.2g} times its noise floor "
            f"({name}; the limit is {worst.limit:g})"
        )


GROUPS = 8  # kinds of activations that are explained
ABSENT = ("missing from the candidate", "not in the reference")


def _short(x: float) -> str:
    """Format a noise floor, which has only one significant digit: 6e-07."""
    return f"{x:.0e}"


@np.errstate(all="ignore")  # others' arrays may hold any numbers; the rows say which of them are not finite
def compare(
    reference: Activations | Path | str,
    candidate: Activations | Path | str,
    *,
    names: str | None = None,
    model: Model | Path | str | None = None,
    noise: NoiseFloor | Path | str | None = None,
    precision: str | None = None,
    profile: str | None = None,
    partial: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    open_model: Callable[..., Model] = load,
) -> Comparison:
    """Compare two sets of activations, each given as any path that inputs.read_activations() can read.

    names      the map from the candidate's names and layouts to ours: "hf", "transformerlens", "ggml" or a JSON file (maps.py)
    model      for the noise floor and for single operations; by default the one that the reference's trace.json names
    noise      a trace of the same tokens as the reference's, in the candidate's precision (one of the two in float64); its
               names are ours or the candidate's
    precision  the candidate's, if it differs from that in its trace.json or, without one, from its arrays' dtype
    profile    the candidate's rounding profile, "int8-activations+float16-cache" (precision.py), if it differs from that in
               its trace.json
    partial    compare only names that both sides have; otherwise a name that one side lacks is a failure
    atol, rtol judge by |candidate - reference| <= atol + rtol · |reference| instead of the noise floor
    open_model opens the model, given its path and dtype; by default in this process alone

    Raises ValueError, naming the file, for an input that can't be used; differences are in the result.
    """
    reference, candidate = (x if isinstance(x, Activations) else read_activations(x) for x in (reference, candidate))
    for option, x in (("atol", atol), ("rtol", rtol)):
        if x is not None and not 0 <= x < math.inf:
            raise InputError(f"{option} is {x:g}, expected a finite number that is not below 0")
    warnings: list[str] = []
    tokens, steps = _tokens(reference, candidate)
    precision, parts, assumed = _arithmetic(candidate, precision, profile)
    opened = functools.partial(open_model, dtype=Precision(parts=parts).load_dtype)
    found = model if isinstance(model, Model) else _find_model(reference, model, opened, warnings)
    config = found.config if found else _config(reference)
    if tokens is not None:
        tokens = _checked_tokens(tokens, steps, reference, candidate, config)
    name_map = read_map(names)
    coarser = max(precision, reference.precision, key=unit_roundoff)

    aligned = Aligned(reference, {}, config, found, tokens, steps)
    rows = _align(aligned, candidate, name_map, partial, warnings)
    if not rows or (partial and not aligned.candidate and all(row.problem in (None, *ABSENT) for row in rows)):
        raise InputError(f"{candidate.path}: no activation in common with {reference.path}")
    warnings += [*_doubts(reference, aligned.candidate), *_doubts(candidate, candidate)]

    tolerance = None if atol is None and rtol is None else (atol or 0.0, rtol or 0.0)
    floor = _noise_floor(aligned, coarser, parts, noise, reference, tolerance is not None, name_map)
    comparison = Comparison(str(reference.path), str(candidate.path), precision, floor, tolerance, rows, assumed, warnings)
    comparison.map_title = name_map.title if names is not None else ""
    for row in rows:
        if row.name in aligned.candidate:
            _judge_row(row, aligned, comparison)
    if found and tokens is not None and tolerance is None:
        _judge_operations(found, tokens, aligned, comparison)
    for row in rows:
        row.passed = row.problem is None and _within(row, comparison)
    if (first := comparison.first) and first.name in aligned.candidate:
        comparison.hints = _hints(comparison, first, aligned)
    elif first and first.name in aligned.unfit:
        comparison.hints = slots_hint(first.name, aligned)
    return comparison


def _hints(comparison: Comparison, first: Row, aligned: Aligned) -> list[str]:
    """Return the hints that explain the first failure, and each further kind of activation that is wrong by itself."""
    found = hints(first.name, aligned, comparison.noise, comparison.precision)
    seen = {_essence(text) for text in found}
    kinds = {place(first.name).kind: first.name}
    for name in comparison.wrong_by_themselves:
        kinds.setdefault(place(name).kind, name)
    for name in list(kinds.values())[1:GROUPS]:
        more = hints(name, aligned, comparison.noise, comparison.precision)
        if more and seen.isdisjoint(map(_essence, more)) and not more[0].startswith(RIGHT_BY_ITSELF):
            found += [f"{name}: {text}" for text in more if not text.endswith("?")]
        seen |= {_essence(text) for text in more}
    return found


def _essence(hint: str) -> str:
    """Return a hint without the constants in it, which are estimated from different numbers each time."""
    return re.sub(r"(?<=^wrong )([^:]*):.*", r"\1", hint.removeprefix("or: "))


# ------------------------------------------------------------------------------------------------------- what is compared


def _arithmetic(candidate: Activations, precision: str | None, profile: str | None) -> tuple[str, tuple[str, ...], str]:
    """Return the candidate's precision, its further roundings, and the assumption about arrays stored in other precisions."""
    if precision and profile:
        raise InputError(f"precision is {precision} and rounding profile {profile}: expected one of them")
    stored = None if precision else (candidate.meta or {}).get("profile")
    if (named := profile or stored) is not None:
        computed = read_profile(named)
        return computed.name, computed.parts, ""
    found = precision or candidate.precision
    if found not in PRECISIONS:
        raise InputError(f"precision is {found!r}, expected {', '.join(PRECISIONS)}")
    return found, (), "" if precision else candidate.mixed


def _doubts(side: Activations, names: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each of these arrays that changed after it was written, and for arrays that are not compared."""
    for name in names:
        if not side.hash_matches(name):
            yield f"{side.path}: {name} does not match its sha256 in trace.json"
    if side.skipped:
        text = "holds whole numbers" if len(side.skipped) == 1 else f"and {len(side.skipped) - 1} more hold whole numbers"
        yield f"{side.path}: {side.skipped[0]} {text}: not compared (bfloat16: as float32)"


def _tokens(reference: Activations, candidate: Activations) -> tuple[np.ndarray | None, list]:
    """Return the tokens of both; InputError if they differ."""
    metas = [side.meta for side in (reference, candidate) if side.meta]
    if len(metas) == 2:
        for key in ("tokens", "steps"):
            if metas[0][key] != metas[1][key]:
                theirs, ours = _start(metas[1][key]), _start(metas[0][key])
                raise InputError(f"{candidate.path}: its {key} are {theirs}, those of {reference.path} {ours}")
    return (np.array(metas[0]["tokens"]), metas[0]["steps"]) if metas else (None, [])


def _checked_tokens(
    tokens: np.ndarray, steps: list, reference: Activations, candidate: Activations, config: Config | None
) -> np.ndarray:
    """Return the prompt's ids in the reference's batch shape; InputError if they fit neither its arrays nor the model."""
    file = (reference if reference.meta else candidate).path / "trace.json"
    for name in reference:
        here, shape = place(name), reference.shape(name)
        if here.axes is None or not len(here.axes) <= len(shape) <= len(here.axes) + 1:
            continue
        batch, own = shape[: len(shape) - len(here.axes)], shape[len(shape) - len(here.axes) + here.axes.index("T")]
        if here.step is None and math.prod(batch) * own == tokens.size:
            tokens = tokens.reshape(*batch, own)
        elif here.step is None or here.step >= len(steps):
            has = f"{len(steps)} steps" if here.step is not None else f"tokens of shape {list(tokens.shape)}"
            raise InputError(f"{file} has {has}, but in {reference.path} {name} has the shape {list(shape)}")
    if config is not None:
        try:
            checked_run(config, tokens, steps)
        except ValueError as error:
            raise InputError(f"{file}: {error}") from None
    return tokens


def _start(values: list) -> str:
    text = str(values)
    return text if len(text) <= 40 else text[:37] + "..."


def _config(reference: Activations) -> Config | None:
    config = ((reference.meta or {}).get("model") or {}).get("config")
    return Config.from_dict(config) if config else None


def _find_model(
    reference: Activations, given: Path | str | None, open_model: Callable[[Path | str], Model], warnings: list[str]
) -> Model | None:
    """Return the given model, or the reference's own if trace.json's path leads to it, unchanged."""
    facts = (reference.meta or {}).get("model") or {}
    if given is None and not facts.get("path"):
        return None
    try:
        model = open_model(given or facts["path"])
    except (ValueError, OSError) as error:
        if given is not None:
            raise
        warnings.append(f"the reference's model can't be opened, so noise is not measured: {error}")
        return None
    if facts.get("manifest_sha256") not in (None, model_facts(model)["manifest_sha256"]):
        if given is None:
            warnings.append(f"{facts['path']} is no longer the model that the reference is from, so noise is not measured")
            return None
        warnings.append(f"{given} is not the model that the reference is from")
    return model


def _align(aligned: Aligned, candidate: Activations, name_map: NameMap, partial: bool, warnings: list[str]) -> list[Row]:
    """Convert the candidate's arrays to our names and layouts; return a row for each activation that either side has."""
    reference = aligned.reference
    sources: dict[str, tuple[str, Rule]] = {}
    unknown, skipped = [], []
    for own in candidate:
        found = name_map.find_all(own)
        if isinstance(found, str):
            unknown.append(own)
        elif found:
            name, rule = found[0] if len(found) == 1 else _meant(candidate[own], found, reference)
            if name in sources:
                raise MapError(f"{candidate.path}: both {sources[name][0]} and {own} stand for {name}")
            sources[name] = own, rule
    head_dim = aligned.config.head_dim if aligned.config else dimensions(reference).get("K")
    params = whole_params(aligned.model.params) if aligned.model else None
    rows, out_of_reach, unrecorded = [], 0, 0
    for name in in_order([*reference, *(name for name in sources if name not in reference)]):
        if name not in sources:
            if not name_map.reaches(name):
                out_of_reach += 1
            elif not name_map.needs(name):
                unrecorded += 1
            elif not partial:
                rows.append(Row(name, ABSENT[0]))
        elif name not in reference:
            if not partial:
                rows.append(Row(name, ABSENT[1]))
        else:
            own, rule = sources[name]
            try:
                x = arrange(candidate[own], name, rule, reference[name], head_dim, params)
            except NeedsModel:
                skipped.append(name)
                continue
            except MapError as error:
                raise MapError(f"map {name_map.title}: {own}: {error}") from None
            except LayoutError as error:
                rows.append(Row(name, str(error)))
                aligned.unfit[name] = candidate[own].shape
                continue
            rows.append(Row(name, None if x.size else "empty"))
            if candidate.made(own):  # as a map's rule would have made it
                rule = replace(rule, unmasked=True)
            aligned.candidate[name], aligned.rules[name] = x, rule
    if not partial:
        rows += [Row(own, ABSENT[1]) for own in unknown]
    if out_of_reach:
        warnings.append(f"{out_of_reach} of the reference's activations have no name in the map {name_map.title}: not compared")
    if unrecorded:
        text = "of the reference's activations are not in the candidate, which doesn't always record them"
        warnings.append(f"{unrecorded} {text} (map {name_map.title}): not compared")
    if skipped:
        warnings.append(f"{', '.join(skipped)}: come before a weight, so comparing them needs the model (-m): not compared")
    return rows


def _meant(x: np.ndarray, found: list[tuple[str, Rule]], reference: Mapping[str, np.ndarray]) -> tuple[str, Rule]:
    """Return which of several activations an array is: the one that its shape fits, or the nearest of these."""
    at_hand = [(name, rule) for name, rule in found if name in reference]
    fitting = [(name, rule) for name, rule in at_hand if fits(x.shape, name, rule, reference[name].shape)]
    if len(fitting) < 2:
        return (fitting or at_hand or found)[-1]

    def distance(choice: tuple[str, Rule]) -> float:
        name, rule = choice
        r = reference[name].astype(np.float64)
        error = relative_error(arrange(x, name, rule, r, None, None).astype(np.float64), r)
        return math.inf if math.isnan(error) else error

    return min(fitting, key=distance)


# ------------------------------------------------------------------------------------------------------------------ judging


def _noise_floor(
    aligned: Aligned,
    precision: str,
    parts: tuple[str, ...],
    given: NoiseFloor | Path | str | None,
    reference: Activations,
    by_tolerance: bool,
    name_map: NameMap,
) -> NoiseFloor:
    if isinstance(given, NoiseFloor):
        return given
    measured = None
    if aligned.model is not None and aligned.tokens is not None and not by_tolerance:
        names = aligned.candidate.keys()
        measured = measure_noise(aligned.model, aligned.tokens, aligned.steps, precision, names, parts)
    if given is None:
        n_layers = 1 + max((place(name).layer or 0 for name in reference), default=0)
        bundled = bundled_noise(reference, coarsest(precision, parts))
        return measured or bundled or default_noise(precision, n_layers, parts)
    other = read_activations(given)
    if other.meta and reference.meta and any(other.meta[key] != reference.meta[key] for key in ("tokens", "steps")):
        raise InputError(f"{given}: its tokens are not the reference's")
    numbers: Mapping[str, np.ndarray] = other
    if not all(name in reference for name in other):  # named as the candidate's are
        noisy = Aligned(reference, {}, aligned.config, aligned.model, aligned.tokens, aligned.steps)
        if bad := next((row for row in _align(noisy, other, name_map, True, []) if row.problem), None):
            raise InputError(f"{given}: {bad.name}: {bad.problem}")
        numbers = {name: x for name, x in noisy.candidate.items() if x.shape == reference[name].shape}
    if _is_the_candidate(numbers, aligned):
        raise InputError(f"{given}: equal to the candidate; a noise trace is another, right program's in the same precision")
    floor = noise_between(reference, numbers, precision, str(given))
    if measured is None:
        return NoiseFloor(precision, floor.source, floor.accumulated, {}, floor.limits, parts=parts)
    local, several = measured.local, measured.several
    return NoiseFloor(precision, floor.source, floor.accumulated, local, floor.limits, parts=parts, several=several)


def _is_the_candidate(noise: Mapping[str, np.ndarray], aligned: Aligned) -> bool:
    """Return whether the noise trace equals the candidate, so that any mistake would count as noise."""
    shared = [name for name in noise if name in aligned.candidate]
    pairs = [(noise[name], aligned.candidate[name], aligned.reference[name]) for name in shared]
    same = all(np.array_equal(x, c, equal_nan=True) for x, c, _ in pairs)
    return same and any(not np.array_equal(x, r, equal_nan=True) for x, _, r in pairs)


def _judge_row(row: Row, aligned: Aligned, comparison: Comparison) -> None:
    if row.problem:
        return
    c, r, kept = pair(aligned, row.name, aligned.candidate[row.name], aligned.reference[row.name])
    row.problem = problem_of(row.name, c, r)
    logits = place(row.name).kind == "logits"
    of_c, of_r = by_token(row.name, c), by_token(row.name, r)  # [..., T, numbers]
    here = kept[..., -of_c.shape[-2] :]
    row.metrics = measure(of_c[here], of_r[here], comparison.precision, logits)
    row.judged = judge(row.name, c, r, kept, comparison.noise)
    if comparison.tolerance is not None and row.problem is None:
        atol, rtol = comparison.tolerance
        both = np.isfinite(r)
        beyond = np.abs(c[both] - r[both]) > atol + rtol * np.abs(r[both])
        if count := np.count_nonzero(beyond):
            row.problem = f"{count} of {beyond.size} numbers are beyond the tolerance"


def _within(row: Row, comparison: Comparison) -> bool:
    if comparison.tolerance is not None:
        return True
    return all(judged is None or judged.passed for judged in (row.judged, row.local))


def _judge_operations(model: Model, tokens: np.ndarray, aligned: Aligned, comparison: Comparison) -> None:
    """Compute every operation in float64 from the candidate's own activations, and compare the candidate's results with that.

    Activations computed from one that can't be used (another shape, or NaN) aren't judged, since the
    candidate's own input is then unknown.
    """
    rows = {row.name: row for row in comparison.rows}
    n_layers = model.config.n_layers
    unusable: set[str] = set()  # wrong by themselves, or because of inputs that weren't recorded

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        inputs = place(name).inputs(n_layers)
        inputs_known = unusable.isdisjoint(inputs)
        if name not in rows or rows[name].problem in ABSENT:  # not recorded: x goes on
            if not inputs_known:
                unusable.add(name)
            return x
        c = aligned.candidate.get(name)
        if c is None or c.shape != x.shape:
            unusable.add(name)
            return x
        c, expected, kept = pair(aligned, name, c, x)
        if np.isnan(c).any() or np.isposinf(c).any():
            unusable.add(name)
            return x
        if inputs_known and np.isfinite(expected[~np.isneginf(expected)]).all():
            one = all(source in aligned.candidate for source in inputs)
            local = judge(name, c, expected, kept, comparison.noise, local=True, one=one)
            if (np.isneginf(c) != np.isneginf(expected)).any():  # masked in one only
                local = replace(local, error=math.inf, ratio=math.inf)
            rows[name].local = local
        return c

    run(model, tokens, aligned.steps, Precision("float64", parts=comparison.noise.parts), tap)
