"""Check OpenAI's JSON: each parameter is either supported or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import NpllamaError, shown
from ..sampling import Sampling

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 128, 20, 16
ANY = object()
# Parameters without effect at these values, and refused at others. `user` and `metadata` never have an effect.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "user": (ANY,),
    "metadata": (ANY,),
}


class BadRequest(NpllamaError):
    """A request that can't be answered; `param` is the parameter at fault, `code` OpenAI's code for the error."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Generation:
    """The parameters that both kinds of requests have.

    max_tokens      None: as many as the context holds
    logprobs        number of alternatives for each token; None: no log-probabilities
    include_usage   the last event of a stream gives the token counts
    """

    model: str | None
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    seed: int
    stream: bool
    include_usage: bool
    logprobs: int | None


@dataclass(frozen=True)
class CompletionRequest(Generation):
    """A request to /v1/completions: texts, or token ids, to be continued."""

    prompts: tuple[str | list[int], ...]
    echo: bool


@dataclass(frozen=True)
class ChatRequest(Generation):
    """A request to /v1/chat/completions."""

    messages: tuple[dict[str, str], ...]


def completion_request(body: object, recommended: Mapping[str, Any]) -> CompletionRequest:
    """Check the JSON of a request to /v1/completions. Raises BadRequest."""
    fields = Fields(body)
    echo = bool(fields.take("echo", is_bool, "true or false", False))
    logprobs = fields.take("logprobs", whole(0, MOST_LOGPROBS), f"0 to {MOST_LOGPROBS}", None)
    best_of = fields.take("best_of", whole(1, MOST_CHOICES), "the same as n", None)
    prompts = _prompts(fields.take("prompt", ANY, "", None))
    given = _generation(fields, recommended, 16, logprobs, least_tokens=0)
    if best_of not in (None, given["n"]):
        raise BadRequest(f"best_of is {best_of} with n of {given['n']}: expected the same, others are not supported", "best_of")
    fields.refuse_others()
    return CompletionRequest(**given, prompts=prompts, echo=echo)


def chat_request(body: object, recommended: Mapping[str, Any]) -> ChatRequest:
    """Check the JSON of a request to /v1/chat/completions. Raises BadRequest."""
    fields = Fields(body)
    messages = _messages(fields.take("messages", ANY, "", None))
    wanted = fields.take("logprobs", is_bool, "true or false", False)
    top = fields.take("top_logprobs", whole(0, MOST_LOGPROBS), f"0 to {MOST_LOGPROBS}", None)
    if top is not None and not wanted:
        raise BadRequest("top_logprobs is given without logprobs: true", "top_logprobs")
    newer = fields.take("max_completion_tokens", whole(1), "1 or more", None)
    given = _generation(fields, recommended, newer, (top or 0) if wanted else None, least_tokens=1)
    if newer not in (None, given["max_tokens"]):
        found = f"max_completion_tokens is {newer} with max_tokens of {given['max_tokens']}"
        raise BadRequest(f"{found}: expected one of them", "max_completion_tokens")
    fields.refuse_others()
    return ChatRequest(**given, messages=messages)


def _generation(
    fields: Fields, recommended: Mapping[str, Any], max_tokens: int | None, logprobs: int | None, least_tokens: int
) -> dict[str, Any]:
    stream = bool(fields.take("stream", is_bool, "true or false", False))
    options = fields.take("stream_options", lambda x: isinstance(x, dict), "an object", None)
    if options is not None and (not stream or set(options) - {"include_usage"}):
        raise BadRequest(f"stream_options is {shown(options)}: expected include_usage, with stream: true", "stream_options")
    stop = fields.take("stop", lambda x: isinstance(x, str) or _all(x, str), "a text, or a list of texts", [])
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop or len(stop) > MOST_STOPS:
        raise BadRequest(f"stop is {shown(stop)}: expected at most {MOST_STOPS} texts, none of them empty", "stop")
    recommended = {name: value for name, value in recommended.items() if value is not None}
    sampling = {
        # The default is the model's recommendation where it has one, else OpenAI's default.
        "temperature": fields.take("temperature", number(0, 100), "0 to 100", recommended.get("temperature", 1.0)),
        "top_p": fields.take("top_p", number(5e-324, 1), "more than 0, at most 1", recommended.get("top_p", 1.0)),
        "top_k": fields.take("top_k", whole(0), "0 (all) or more", 0),
        "min_p": fields.take("min_p", number(0, 1), "0 to 1", 0.0),
        "repetition_penalty": fields.take("repetition_penalty", number(1e-3, 1e3), "more than 0", 1.0),
    }
    try:
        settings = Sampling(**sampling)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    seed = fields.take("seed", whole(0), "a whole number, 0 or more", None)
    return {
        "model": fields.take("model", lambda x: isinstance(x, str), "a text", None),
        "sampling": settings,
        "max_tokens": fields.take("max_tokens", whole(least_tokens), f"{least_tokens} or more", max_tokens),
        "stop": stop,
        "n": fields.take("n", whole(1, MOST_CHOICES), f"1 to {MOST_CHOICES}", 1),
        "seed": int.from_bytes(os.urandom(6), "little") if seed is None else seed,
        "stream": stream,
        "include_usage": bool(options and options.get("include_usage")),
        "logprobs": logprobs,
    }


class Fields:
    """The parameters of a request; those that take() leaves are unsupported."""

    def __init__(self, body: object):
        if not isinstance(body, dict):
            raise BadRequest(f"the body is {shown(body)}, expected a JSON object")
        self._left = dict(body)

    def take(self, name: str, check: Any, expected: str, default: Any) -> Any:
        """Return a parameter, or the default where it is absent or null. Raises BadRequest for a value that check() refuses."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if check is not ANY and not check(value):
            raise BadRequest(f"{name} is {shown(value)}, expected {expected}", name)
        return value

    def refuse_others(self) -> None:
        """Raise BadRequest for a parameter that was not taken, unless its value has no effect."""
        for name, value in self._left.items():
            neutral = NEUTRAL.get(name)
            if neutral is None:
                raise BadRequest(f"the parameter {shown(name)} is not supported", name, "unsupported_parameter")
            alike = (x for x in neutral if type(value) is type(x) or {type(value), type(x)} == {int, float})
            if ANY not in neutral and value not in alike:
                raise BadRequest(f"{name} is {shown(value)}, which is not supported", name, "unsupported_value")


def is_bool(value: object) -> bool:
    """Check for true or false; 1 and 0 are neither."""
    return isinstance(value, bool)


def whole(least: int, most: int = 1 << 53) -> Callable[[object], bool]:
    """Return a check for whole numbers in a range."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(least: float, most: float) -> Callable[[object], bool]:
    """Return a check for numbers in a range; NaN is in no range."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _are_ids(values: object) -> bool:
    """Check for a list of numbers that NumPy's int64 holds; whether they are in the vocabulary is for the model to say."""
    return _all(values, int) and bool(values) and all(abs(id) < 1 << 63 for id in values)  # type: ignore[attr-defined]


def _prompts(given: object) -> tuple[str | list[int], ...]:
    """Return one prompt or several, each a text or token ids."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if _all(given, str):
            return tuple(given)
        if _are_ids(given):
            return (given,)
        if all(map(_are_ids, given)):
            return tuple(given)
    raise BadRequest(f"prompt is {shown(given)}, expected a text, a list of token ids, or a list of either", "prompt")


def _messages(given: object) -> tuple[dict[str, str], ...]:
    """Return the messages with their contents as texts; a list of text parts is joined."""
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise BadRequest(f"messages is {shown(given)}, expected a list of objects with role and content", "messages")
    messages = []
    for i, message in enumerate(given):
        role, content = message.get("role"), message.get("content")
        if others := [key for key, value in message.items() if key not in ("role", "content", "name") and value]:
            raise BadRequest(f"messages[{i}] has {shown(others[0])}, which is not supported", "messages")
        if isinstance(content, list):
            content = _joined(content, i)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRequest(f"messages[{i}] is {shown(message)}, expected role and content as texts", "messages")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(messages)


def _joined(parts: Sequence[object], i: int) -> str:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BadRequest(f"messages[{i}] has a part {shown(part)}, expected parts of type text", "messages")
    return "".join(part["text"] for part in parts if isinstance(part, dict))
