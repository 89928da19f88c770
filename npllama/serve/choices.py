"""Write the choices of a completion as JSON: each whole, or piece by piece for a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint import Model
from ..text.completion import TokenLogprobs
from ..tokenizer import unicode
from .replies import FINISH, LegacyLogprobs, Reply, chat_logprobs
from .requests import ChatRequest, CompletionRequest, Generation
from .worker import Job


class Choices:
    """Write choices as JSON: whole, or piece by piece for a stream."""

    def __init__(self, model: Model, name: str, asked: Generation, jobs: Sequence[Job], chat: bool):
        self._tokenizer, self._jobs, self._logprobs = model.tokenizer, jobs, asked.logprobs
        self.reply = Reply(name, chat)
        self._sent = [0] * len(jobs)  # tokens whose log-probabilities have been sent

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices that a stream opens with, one event each."""
        return []

    def whole(self, i: int, job: Job) -> dict[str, Any]:
        """Return a whole choice."""
        done = job.continuation.completion
        return {
            "index": i,
            **self._content(i, job, done.text, len(done.tokens), True, True),
            "finish_reason": FINISH[done.finish_reason],
        }

    def piece(self, i: int, job: Job, text: str, n_tokens: int, ended: bool) -> dict[str, Any] | None:
        """Return a choice for one event of a stream, or None where there is nothing to send."""
        if not text and not ended and (self._logprobs is None or n_tokens == self._sent[i]):
            return None
        content = self._content(i, job, text, n_tokens, False, ended)
        return {"index": i, **content, "finish_reason": FINISH[job.continuation.completion.finish_reason] if ended else None}

    def _content(self, i: int, job: Job, text: str, n_tokens: int, whole: bool, ended: bool) -> dict[str, Any]:
        raise NotImplementedError


class CompletionChoices(Choices):
    """Choices of /v1/completions."""

    def __init__(self, model: Model, name: str, asked: CompletionRequest, jobs: Sequence[Job]):
        super().__init__(model, name, asked, jobs, chat=False)
        self._echo = asked.echo
        self._opened: set[int] = set()  # choices whose first part has been sent
        given = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        self._prompts = [self._text(prompt) for prompt in given]
        self._lists = [self._list(job, text) for job, text in zip(jobs, self._prompts, strict=True)]

    def _list(self, job: Job, prompt: str) -> LegacyLogprobs:
        ids = job.continuation.completion.prompt_tokens
        if not self._echo or self._tokenizer is None:
            return LegacyLogprobs(self._tokenizer, 0, ids)
        # Decoding may put BOS's spelling first, which the prompt lacks: BOS and the first token of text both have offset 0.
        return LegacyLogprobs(self._tokenizer, len(prompt) - len(self._tokenizer.decode(ids)))

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return unicode(prompt)  # what was encoded: JSON can hold half a surrogate pair, and a response can't
        return self._tokenizer.decode(prompt) if self._tokenizer else ""

    def _content(self, i: int, job: Job, text: str, n_tokens: int, whole: bool, ended: bool) -> dict[str, Any]:
        done, echoed = job.continuation.completion, self._echo and i not in self._opened
        content: dict[str, Any] = {"text": self._prompts[i] + text if echoed else text, "logprobs": None}
        if self._logprobs is not None:
            ids = done.tokens[self._sent[i] : n_tokens]
            entries: list[TokenLogprobs | None] = [*(done.logprobs or [])[self._sent[i] : n_tokens]]
            if ended and job.stop_logprobs is not None:
                # As OpenAI and vLLM do, include the stop id: lm-eval counts tokens from the end and expects it.
                ids, entries = [*ids, job.stop_logprobs.token], [*entries, job.stop_logprobs]
            if echoed:
                ids, entries = done.prompt_tokens + ids, [*job.prompt_logprobs, *entries]
            content["logprobs"] = self._lists[i].take(ids, entries)
        self._sent[i] = n_tokens
        self._opened.add(i)
        return content


class ChatChoices(Choices):
    """Choices of /v1/chat/completions."""

    def __init__(self, model: Model, name: str, asked: ChatRequest, jobs: Sequence[Job]):
        super().__init__(model, name, asked, jobs, chat=True)

    def opening(self) -> list[dict[str, Any]]:  # noqa: D102
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self._jobs))]

    def _content(self, i: int, job: Job, text: str, n_tokens: int, whole: bool, ended: bool) -> dict[str, Any]:
        content: dict[str, Any]
        if whole:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}
        else:
            content = {"delta": {"content": text} if text else {}, "logprobs": None}
        if self._logprobs is not None and self._tokenizer is not None:
            entries = (job.continuation.completion.logprobs or [])[self._sent[i] : n_tokens]
            content["logprobs"] = chat_logprobs(self._tokenizer, entries)
        self._sent[i] = n_tokens
        return content
