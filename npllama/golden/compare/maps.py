"""Map other programs' names and layouts of activations to ours.

A map is {pattern: rule}. In a pattern `{i}` stands for the layer and `*` for any text; a leading `step.N/` is kept. The first
pattern that matches a name counts. A rule is null for a known name without a counterpart here, else a canonical name, or an
object with `name` and any of

    axes       the candidate's axes in the dimension key, in its order: "H T K" for heads first, "T H*K" for joined heads,
               "S+" for an axis that may be longer than S (the rest is cut off), "T-" for one that may be the last tokens only,
               "a | b" for one or the other; axes of size 1 may be missing or added. By default those of forward(), except
               that a leading batch axis of size 1 is dropped.
    pairs      "halves" when RoPE rotates x[j] with x[j + K/2] (Hugging Face), "adjacent" (the default) for x[2j] with x[2j + 1]
    scale      "1/sqrt(K)": the candidate's numbers lack this factor
    unmasked   true: the candidate's scores are without the mask; masked ones are left out of the comparison
    weight     a parameter, such as "layers.{i}.ffn_norm.weight", that the candidate's numbers lack as a factor; needs the model
    optional   true: the program doesn't always record it; its absence is reported and isn't a failure

as in {"blk.{i}.q": {"name": "layers.{i}.attention.q", "axes": "H T K", "pairs": "halves"}}. A list of rules is for a name that
may be any of several activations: the one whose shape fits counts and, of several, the one nearest to the reference.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from ...checkpoint.foreign import read_json
from ...engine.weights import widen
from ...errors import NpllamaError, printable, shown
from ...scope import Params
from .known_maps import BUILT_IN, Rule, Rules
from .names import place


class MapError(NpllamaError):
    """A map can't be read, or two names of the candidate mean the same activation."""


class LayoutError(NpllamaError):
    """An array doesn't have the axes that it should."""


class NeedsModel(NpllamaError):
    """An array lacks a weight that only the model has."""


class NameMap:
    """Candidate name -> (canonical name, rule)."""

    def __init__(self, title: str, rules: Rules):
        self.title = title
        self._rules = [(_regex(pattern), _several(rule)) for pattern, rule in rules.items()]
        self._targets = [(_regex(rule.name), rule.optional) for rules in rules.values() for rule in _several(rules)]

    def find(self, name: str) -> tuple[str, Rule] | str | None:
        """Return the canonical name and rule; None for a name to ignore, the name itself if the map doesn't know it."""
        found = self.find_all(name)
        return found if isinstance(found, str) else found[0] if found else None

    def find_all(self, name: str) -> list[tuple[str, Rule]] | str:
        """Return every activation that the name may mean, with its rule; or the name itself if the map doesn't know it."""
        step, _, bare = name.rpartition("/") if re.match(r"step\.\d+/", name) else ("", "", name)
        for regex, rules in self._rules:
            if match := regex.fullmatch(bare):
                layer = match.groupdict().get("i", "")
                filled = [
                    replace(rule, name=rule.name.replace("{i}", layer), weight=rule.weight.replace("{i}", layer))
                    for rule in rules
                ]
                return [((f"{step}/" if step else "") + rule.name, rule) for rule in filled]
        return name

    def reaches(self, name: str) -> bool:
        """Return whether the map gives some candidate name this canonical name."""
        return bool(self._reached(name))

    def needs(self, name: str) -> bool:
        """Return whether a candidate must have this canonical name, by a rule that isn't optional."""
        return not all(self._reached(name))

    def _reached(self, name: str) -> list[bool]:
        bare = name.removeprefix(place(name).prefix)
        return [optional for regex, optional in self._targets if regex.fullmatch(bare)]


def _several(rule: Rule | tuple[Rule, ...] | None) -> tuple[Rule, ...]:
    return () if rule is None else (rule,) if isinstance(rule, Rule) else rule


class Unmapped(NameMap):
    """Map for a candidate that uses npllama's names and layouts."""

    def __init__(self) -> None:
        super().__init__("", {})

    def find_all(self, name: str) -> list[tuple[str, Rule]]:
        """Return the name itself."""
        return [(name, Rule(name))]

    def _reached(self, name: str) -> list[bool]:
        return [False]  # every name, and none is optional


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)", 1).replace(r"\*", ".*"), re.DOTALL)


def read_map(given: str | None) -> NameMap:
    """Return a built-in map by its name, or read one from a JSON file. Raises MapError."""
    if given is None:
        return Unmapped()
    if given in BUILT_IN:
        return NameMap(given, BUILT_IN[given])
    file = Path(given)
    if not file.exists():
        raise MapError(f"map {given}: No such file or directory; built-in maps: {', '.join(BUILT_IN)}")
    content = read_json(file, MapError)
    if not content:
        raise MapError(f"map {given}: empty, expected an object {{pattern: canonical name}}")
    rules: dict[str, Rule | tuple[Rule, ...] | None] = {}
    for pattern, rule in content.items():
        if isinstance(rule, list) and rule:
            rules[pattern] = tuple(_one_rule(given, pattern, choice) for choice in rule)
        else:
            rules[pattern] = None if rule is None else _one_rule(given, pattern, rule)
    return NameMap(given, rules)


AXES = re.compile(r"T-|[A-Z](\*[A-Z])*\+?")  # one of the candidate's axes, in the syntax of the module's docstring


def _one_rule(file: str, pattern: str, rule: object) -> Rule:
    where = f"map {file}: {printable(pattern)[:200]}"
    if isinstance(rule, str):
        rule = {"name": rule}
    known = {field.name: bool if field.name in ("unmasked", "optional") else str for field in fields(Rule)}
    if not isinstance(rule, dict) or not isinstance(rule.get("name"), str):
        raise MapError(f"{where} is {shown(rule)}, expected a canonical name, null or an object with `name`")
    for key, value in rule.items():
        if key not in known or not isinstance(value, known[key]):
            raise MapError(f"{where} has {printable(key)[:60]} {shown(value)}; known are {', '.join(known)}")
    made = Rule(**rule)
    axes = place(made.name.replace("{i}", "0")).axes
    if axes is None:
        raise MapError(f"{where} stands for {shown(made.name)}, which is not the name of an activation")
    if made.pairs not in ("adjacent", "halves") or made.scale not in ("", "1/sqrt(K)"):
        raise MapError(f"{where}: pairs is adjacent or halves, and scale 1/sqrt(K)")
    for choice in made.axes.split("|") if made.axes else []:
        found = [axis for token in choice.split() for axis in token.rstrip("+-").split("*")]
        if sorted(found) != sorted(axes) or not all(AXES.fullmatch(token) for token in choice.split()):
            raise MapError(f"{where} has the axes {shown(choice.strip())}, expected {' '.join(axes)} in some order")
    return made


def arrange(
    x: np.ndarray, name: str, rule: Rule, reference: np.ndarray, head_dim: int | None, params: Params | None
) -> np.ndarray:
    """Rearrange a candidate's array to our layout: the axes of `reference`, T perhaps shortened to the last tokens.

    Raises LayoutError when its shape is none that the rule allows, NeedsModel when the rule needs a parameter and has none,
    MapError when the model has no such parameter.
    """
    axes = place(name).axes
    if axes is None or not len(axes) <= reference.ndim <= len(axes) + 1:
        x = x[0] if x.ndim == reference.ndim + 1 and len(x) == 1 else x
        if x.shape != reference.shape:
            raise LayoutError(f"shape {list(x.shape)}, expected {list(reference.shape)}")
        return x
    batch = reference.shape[: reference.ndim - len(axes)]
    sizes = dict(zip(axes, reference.shape[len(batch) :], strict=True))
    x = _split_and_order(x, batch, axes, sizes, rule)
    if rule.pairs == "halves":
        K = x.shape[-1]
        x = np.stack([x[..., : K // 2], x[..., K // 2 :]], axis=-1).reshape(x.shape)
    if rule.scale:
        if head_dim is None:
            raise LayoutError("the head's size is not known, to scale by 1/sqrt(K)")
        x = x / np.asarray(math.sqrt(head_dim), x.dtype)
    if rule.weight:
        if params is None:
            raise NeedsModel(f"{name} comes before {rule.weight}")
        x = x * _factor(rule.weight, params, x.shape[-1]).astype(x.dtype)
    if rule.unmasked:
        x = np.where(np.isneginf(reference), np.asarray(-np.inf, x.dtype), x)
    return x


def _factor(name: str, params: Params, size: int) -> np.ndarray:
    """Return a parameter to multiply the last axis by; MapError if the model has none of that name and size."""
    if name not in params:
        close = difflib.get_close_matches(name, list(params), 1)
        raise MapError(f"weight is {name}, which the model doesn't have" + (f"; {close[0]} it has" if close else ""))
    weight = widen(params[name])
    if weight.shape != (size,):
        raise MapError(f"weight {name} has the shape {list(weight.shape)}, expected [{size}]")
    return weight


def fits(shape: tuple[int, ...], name: str, rule: Rule, reference: tuple[int, ...]) -> bool:
    """Return whether a candidate's array of this shape fits the rule, for a reference of that shape."""
    axes = place(name).axes
    if axes is None or not len(axes) <= len(reference) <= len(axes) + 1:
        return False
    batch = reference[: len(reference) - len(axes)]
    return _layout(shape, batch, dict(zip(axes, reference[len(batch) :], strict=True)), axes, rule) is not None


def _split_and_order(x: np.ndarray, batch: tuple[int, ...], axes: str, sizes: dict[str, int], rule: Rule) -> np.ndarray:
    """Reorder x to `axes`, from the first of the rule's choices of axes that fits its shape."""
    layout = _layout(x.shape, batch, sizes, axes, rule)
    if layout is None:
        first = (rule.axes or " ".join(axes)).split("|")[0].split()
        raise LayoutError(f"shape {list(x.shape)}, expected {[*batch, *(_size(token, sizes) for token in first)]}")
    tokens, found = layout
    cut = [slice(_size(token, sizes)) if token.endswith("+") else slice(None) for token in tokens]
    x = x.reshape(*batch, *found)[tuple([slice(None)] * len(batch) + cut)]
    order = [axis for token in tokens for axis in token.rstrip("+-").split("*")]
    now = sizes | ({"T": found[tokens.index("T-")]} if "T-" in tokens else {})
    x = x.reshape(*batch, *(now[axis] for axis in order))
    return x.transpose(*range(len(batch)), *(len(batch) + order.index(axis) for axis in axes))


def _layout(
    shape: tuple[int, ...], batch: tuple[int, ...], sizes: dict[str, int], axes: str, rule: Rule
) -> tuple[list[str], list[int]] | None:
    """Return the first choice of axes that an array of this shape can have, and the sizes that they have in it."""
    choices = [choice.split() for choice in (rule.axes or " ".join(axes)).split("|")]
    for tokens in choices:
        for lead in [batch] if batch else [(), (1,)]:
            found = shape[len(lead) :]
            if (
                shape[: len(lead)] == lead
                and len(found) == len(tokens)
                and all(map(_fits, found, tokens, [sizes] * len(found)))
            ):
                return tokens, list(found)
    for tokens in choices if rule.axes else []:
        whole = [str(n) for n in batch] + tokens
        if (without_ones := _assigned([n for n in shape if n != 1], whole, sizes)) is not None:
            return tokens, without_ones[len(batch) :]
    return None


def _assigned(shape: list[int], tokens: list[str], sizes: dict[str, int]) -> list[int] | None:
    """Return the size of each axis in an array of this shape, from which axes of one are removed; None if it doesn't fit."""
    if not tokens:
        return None if shape else []
    if shape and _fits(shape[0], tokens[0], sizes) and (rest := _assigned(shape[1:], tokens[1:], sizes)) is not None:
        return [shape[0], *rest]
    if _fits(1, tokens[0], sizes) and (rest := _assigned(shape, tokens[1:], sizes)) is not None:
        return [1, *rest]
    return None


def _size(token: str, sizes: dict[str, int]) -> int:
    return int(token) if token.isdecimal() else math.prod(sizes[axis] for axis in token.rstrip("+-").split("*"))


def _fits(found: int, token: str, sizes: dict[str, int]) -> bool:
    """Return whether an axis of this size fits the token."""
    expected = _size(token, sizes)
    return found == expected or (token.endswith("+") and found > expected) or (token.endswith("-") and 0 < found < expected)
