"""Write completions as OpenAI's JSON."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..text.completion import Completion, TokenLogprobs, in_json
from ..tokenizer import StreamDecoder, Tokenizer

FINISH = {"stop": "stop", "length": "length", "context": "length", None: None}


class Reply:
    """The fields common to a reply and to all events of its stream."""

    def __init__(self, model: str, chat: bool):
        self._chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Return the whole reply to a request without `stream`."""
        return {**self.head, "choices": list(choices), "usage": usage}

    def event(self, choices: Sequence[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """Return an event of a stream."""
        kind = {"object": "chat.completion.chunk"} if self._chat else {}
        return {**self.head, **kind, "choices": list(choices), **({"usage": usage} if usage else {})}


def usage_of(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> dict[str, int]:
    """Count tokens: each prompt once, whatever n is; stop ids are not counted."""
    read, made = sum(map(len, prompts)), sum(len(done.tokens) for done in completions)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class LegacyLogprobs:
    """Log-probabilities in the form of /v1/completions: tokens, token_logprobs, top_logprobs, text_offset.

    A token is shown as text_of() writes it. Where two alternatives have the same text, top_logprobs keeps the likelier.
    """

    def __init__(self, tokenizer: Tokenizer | None, offset: int = 0, before: Sequence[int] = ()):
        self._tokenizer, self._offset = tokenizer, offset
        self._decoder = StreamDecoder(tokenizer, before) if tokenizer else None

    def take(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """Return the four lists for the next tokens."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for id, entry in zip(ids, entries, strict=True):
            found["tokens"].append(text_of(self._tokenizer, id))
            found["token_logprobs"].append(in_json(entry.logprob) if entry else None)
            top: dict[str, float | None] = {}
            for other, _, logprob in entry.top if entry else ():
                top.setdefault(text_of(self._tokenizer, other), in_json(logprob))
            found["top_logprobs"].append(top if entry else None)
            found["text_offset"].append(max(0, self._offset))
            self._offset += len(self._decoder.push(id)) if self._decoder else 0
        return found


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return log-probabilities in the form of /v1/chat/completions."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        return {"token": text_of(tokenizer, id), "logprob": in_json(logprob), "bytes": list(bytes_of(tokenizer, id))}

    content = [{**one(e.token, e.logprob), "top_logprobs": [one(id, logprob) for id, _, logprob in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    """Return the bytes that a token adds to a text; for a special token, its spelling."""
    names = _spellings(tokenizer)
    if id in names:
        return names[id].encode()
    return tokenizer.token_bytes(id, False) if id < tokenizer.vocab_size else b""


@functools.lru_cache(maxsize=1)  # they are needed for every alternative of every token
def _spellings(tokenizer: Tokenizer) -> dict[int, str]:
    return {id: name for name, id in tokenizer.special_tokens.items()}


def text_of(tokenizer: Tokenizer | None, id: int) -> str:
    r"""Return the text that a token adds; as OpenAI does, `bytes:\xe2\x98` where its bytes alone are not valid UTF-8."""
    if tokenizer is None:
        return ""
    data = bytes_of(tokenizer, id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
