"""Chat formats: a conversation to the prompt that asks for the next answer, as text and as token ids.

A conversation is a list of `{"role": ..., "content": ...}`: an optional "system" message, then "user" and "assistant" in turn,
the last from the user.

>>> messages = [{"role": "user", "content": "Hello"}]
>>> text, ids = npllama.chat.chat_format(model).prompt(messages)

A model's own format is the chat template that came with it, a Jinja program (templates/). The formats in this file are used
where it can't be run, if they write the same text, and for Meta's checkpoints, which have no template.

From one turn to the next, reuse the part of the KV cache whose ids both prompts begin with. Usually the longer conversation's
ids begin with the shorter one's, the answer's tokens and the end of the turn; but a template may rewrite earlier turns
(DeepSeek-R1's leaves out the reasoning, Mistral's moves the system message on to the newest turn).

Special tokens come from the format alone: one that a message spells stays text. Hugging Face's apply_chat_template takes such a
spelling for the token, unless sanitize_control_tokens is set: then it stays text there too, but is encoded separately from the
text around it; here both are encoded together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from . import templates
from .checkpoint import Model
from .errors import NpllamaError, shown
from .templates import TemplateError
from .tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


class ChatError(NpllamaError):
    """There is no chat format, or it can't write a conversation; the message is one line."""


class Prompt(NamedTuple):
    """A conversation as the model reads it, ending where the answer begins."""

    text: str  # special tokens by their spelling
    ids: list[int]


@dataclass(frozen=True)
class ChatFormat:
    """The format of conversations with one model; chat_format() returns it. Threads may share it."""

    name: str  # a key of FORMATS, or the template's: `default` is the model's own
    tokenizer: Tokenizer
    system: str | None = None  # prepended to a conversation without a system message; a template adds its own
    template: str | None = None  # Jinja; None: FORMATS[name]
    where: str = "the chat template"  # the template's file, for error messages
    variables: Mapping[str, str] = field(default_factory=dict)  # the special tokens that a template refers to

    def prompt(self, messages: Messages, now: datetime | None = None) -> Prompt:
        """Return the prompt that asks for the next answer. Raises ValueError for a conversation that the format can't write.

        messages may hold more texts than role and content, where a template reads them. now is the time, for a template that
        writes it into the prompt.
        """
        if self.system is not None and not any(message.get("role") == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.template is None:
            ids = FORMATS[self.name](self.tokenizer, messages)
            return Prompt(_spelled(self.tokenizer, ids), ids)
        return self._rendered(self.template, messages, now or datetime.now())

    def _rendered(self, template: str, messages: Messages, now: datetime) -> Prompt:
        """Run the template with marks around special tokens that a message spells: all others are the template's own."""
        plain = [_checked_message(i, message) for i, message in enumerate(messages)]
        if not plain:
            raise ChatError("a conversation must have a message, but there is none")
        values = [value for message in plain for value in message.values()]
        start, end = _unused(template, *values, *self.variables.values())
        marked = [
            {key: _mark(self.tokenizer.split_special(value), start, end) for key, value in message.items()} for message in plain
        ]
        parts = self._parts(self._render(template, marked, now), start, end)
        text = "".join(parts)
        if marked != plain and text != self._render(template, plain, now):
            spelled = next(part for value in values for part in self.tokenizer.split_special(value)[1::2])
            raise ChatError(f"{self.where}: it treats {spelled} in a message as more than text: expected messages without it")
        return Prompt(text, self.tokenizer.encode_parts(parts))

    def _render(self, template: str, messages: Sequence[Mapping[str, str]], now: datetime) -> str:
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return templates.render(template, {**self.variables, **given}, now)
        except TemplateError as error:
            raise ChatError(f"{self.where}: {error}") from None

    def _parts(self, text: str, start: str, end: str) -> list[str]:
        """Split at the special tokens that are the template's own, as Tokenizer.encode_parts() takes them; drop the marks."""
        parts = [""]
        for i, piece in enumerate(re.split(f"{start}([^{start}{end}]*){end}|[{start}{end}]", text)):
            if i % 2 and piece in self.tokenizer.special_tokens:
                parts[-1] += piece
            elif piece:
                first, *others = self.tokenizer.split_special(piece)
                parts[-1] += first
                parts += others
        return parts


def chat_format(model: Model, name: str | None = None) -> ChatFormat:
    """Return a model's chat format, or the one of a name: a key of FORMATS, or of a template that came with it.

    Without a name that is the model's own template; without jinja2, the format of FORMATS that wrote exactly the same text when
    the model was converted. Raises ChatError if there is neither.
    """
    where = model.path or "the model"
    if (tokenizer := model.tokenizer) is None:
        raise ChatError(f"{where} has no tokenizer, so it takes no text")
    files = model.manifest.get("files", {})
    own = templates.read_templates(model.path, files) if model.path and name not in FORMATS else {}
    stored, system = model.generation.get("chat_format"), model.generation.get("system")
    if stored is not None and stored not in FORMATS:
        raise ChatError(f"{where}/config.json: chat_format is {shown(stored)}, expected {', '.join(FORMATS)}")
    fallback = ChatFormat(str(stored), tokenizer, str(system) if system else None) if stored else None
    if name in FORMATS:
        return fallback if fallback and name == stored else ChatFormat(str(name), tokenizer)
    if model.path is None or (template := own.get(name or "default")) is None:
        if name is not None:
            raise ChatError(f"the chat format is {shown(name)}, expected {', '.join([*FORMATS, *own])}")
        if fallback is None:
            raise ChatError(f"{where} has no chat template of its own: expected {_expected(tokenizer, own)}")
        return fallback
    if missing := templates.missing_package():
        if name is None and fallback and templates.FILE in files:  # an older converter chose by its tags
            return fallback
        raise ChatError(f"{where}: {missing}; or choose a --format, which may differ from the template")
    name = name or "default"
    file = model.path / (written if (written := templates.file_of(name)) in files else "tokenizer_config.json")
    return ChatFormat(name, tokenizer, None, template, str(file), templates.template_variables(model.path))


def _expected(tokenizer: Tokenizer, named: Mapping[str, str]) -> str:
    """Describe the available formats, and the one that the special tokens suggest, for a model without a template."""
    try:
        hint = f" (its tokenizer has the special tokens of {chat_format_of(tokenizer)})"
    except ValueError:
        hint = ""
    return f"--format with one of {', '.join([*FORMATS, *named])}{hint}; a model without a template may be no chat model"


def _checked_message(i: int, message: Mapping[str, str]) -> dict[str, str]:
    """Return a message as a template gets it: its texts, without lone surrogates."""
    role = message.get("role")
    if not isinstance(role, str) or not re.fullmatch("[a-z_]{1,40}", role):
        raise ChatError(f"message {i} is from {shown(role)}, expected system, user or assistant")
    if not isinstance(content := message.get("content"), str):
        raise ChatError(f"message {i} has content {shown(content)}, expected text")
    if bad := next((key for key, value in message.items() if not isinstance(value, str)), None):
        raise ChatError(f"message {i} has {shown(bad)}: {shown(message[bad])}, expected text")
    return {str(key): value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for key, value in message.items()}


def _unused(*texts: str) -> tuple[str, str]:
    """Return two private-use characters that occur in no text."""
    used = set().union(*texts)
    start, end, *_ = (char for code in range(0xF0000, 0xF0000 + len(used) + 2) if (char := chr(code)) not in used)
    return start, end


def _mark(parts: Sequence[str], start: str, end: str) -> str:
    return "".join(f"{start}{part}{end}" if i % 2 else part for i, part in enumerate(parts))


def _spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode ids, special tokens to their spelling."""
    names = {id: spelling for spelling, id in tokenizer.special_tokens.items()}
    text, run = "", []
    for id in ids:
        if id not in names:
            run.append(id)
            continue
        text += tokenizer.decode(run) + names[id]
        run = []
    return text + tokenizer.decode(run)


def encode_llama3(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a conversation as Llama 3 and later were trained on it. Raises ValueError for a bad conversation.

    <|begin_of_text|>, per message <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, and the assistant's header.
    Source: llama-models 0.3.0, llama3/chat_format.py.
    """
    special = _special_tokens(tokenizer, "llama3")

    def header(role: str) -> list[int]:
        return [
            special["<|start_header_id|>"],
            *tokenizer.encode(role),
            special["<|end_header_id|>"],
            *tokenizer.encode("\n\n"),
        ]

    ids = [special["<|begin_of_text|>"]]
    for role, content in _checked(messages):
        ids += [*header(role), *tokenizer.encode(content), special["<|eot_id|>"]]
    return ids + header("assistant")


def encode_llama2(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a conversation as Llama 2's chat models were trained on it. Raises ValueError for a bad conversation.

    Per turn <s>[INST] user [/INST] answer </s>, the last one ending at [/INST]; the system message stands inside the first
    user's, as <<SYS>>\\nsystem\\n<</SYS>>\\n\\n. Contents are stripped. The tags are plain text to this tokenizer, so a system
    or user message that holds one could forge a turn, and is refused.
    Source: Meta's llama repository, llama/generation.py, chat_completion.
    """
    turns = _checked(messages)
    _refuse_tags(turns, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), "Llama 2")
    system = ""
    if turns[0][0] == "system":
        system = f"<<SYS>>\n{turns.pop(0)[1]}\n<</SYS>>\n\n"
    contents = [content for _, content in turns]
    contents[0] = system + contents[0]
    special = _special_tokens(tokenizer, "llama2")
    ids, bos, eos = [], special["<s>"], special["</s>"]
    for user, answer in zip(contents[::2], contents[1::2], strict=False):  # the last user message has no answer
        ids += [bos, *tokenizer.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), eos]
    return [*ids, bos, *tokenizer.encode(f"[INST] {contents[-1].strip()} [/INST]")]


def encode_chatml(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a conversation as ChatML, with BOS in front if the tokenizer adds one. Raises ValueError for a bad conversation.

    Per message <|im_start|>role\\ncontent<|im_end|>\\n, and the beginning of the assistant's. A model's default system prompt
    (default_system_of_template) is not part of the format: without a system message there is none.
    Source: openai-python 0.27, chatml.md; the chat template of SmolLM2-135M-Instruct.
    """
    special = _special_tokens(tokenizer, "chatml")
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    ids = tokenizer.encode("", bos=True)
    for role, content in _checked(messages):
        ids += [start, *tokenizer.encode(f"{role}\n{content}"), end, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("assistant\n")]


def encode_zephyr(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a conversation as TinyLlama's chat models were trained on it. Raises ValueError for a bad conversation.

    BOS, per message <|role|>\\ncontent</s>\\n, and <|assistant|>\\n. The tags are plain text to this tokenizer, so a system or
    user message that holds one could forge a turn, and is refused. What stands between two </s> is one text to the tokenizer.
    Source: the chat template of TinyLlama-1.1B-Chat-v1.0.
    """
    turns = _checked(messages)
    _refuse_tags(turns, ("<|system|>", "<|user|>", "<|assistant|>"), "Zephyr")
    eos = _special_tokens(tokenizer, "zephyr")["</s>"]
    ids, before = tokenizer.encode("", bos=True), ""
    for role, content in turns:
        ids += [*tokenizer.encode(f"{before}<|{role}|>\n{content}"), eos]
        before = "\n"
    return [*ids, *tokenizer.encode("\n<|assistant|>\n")]


def encode_mistral(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a conversation as Mistral 7B Instruct v0.3 was trained on it. Raises ValueError for a bad conversation.

    <s>, per turn [INST]user[/INST]answer</s>, each tag a token; answers are stripped. The system message stands before the last
    user's, with an empty line between.
    Source: mistral-common 1.13, tokens/tokenizers/instruct.py, tokenizer version 3.
    """
    special = _special_tokens(tokenizer, "mistral")
    turns = _checked(messages)
    if turns[0][0] == "system":
        system = turns.pop(0)[1]
        turns[-1] = ("user", f"{system}\n\n{turns[-1][1]}")
    ids = [special["<s>"]]
    for role, content in turns:
        if role == "user":
            ids += [special["[INST]"], *tokenizer.encode(content), special["[/INST]"]]
        else:
            ids += [*tokenizer.encode(content.strip()), special["</s>"]]
    return ids


FORMATS: dict[str, Callable[[Tokenizer, Messages], list[int]]] = {
    "llama3": encode_llama3,
    "llama2": encode_llama2,
    "chatml": encode_chatml,
    "mistral": encode_mistral,
    "zephyr": encode_zephyr,
}
_SPECIAL_TOKENS = {
    "llama3": {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
    "chatml": {"<|im_start|>", "<|im_end|>"},
    "mistral": {"<s>", "</s>", "[INST]", "[/INST]"},
    "zephyr": {"</s>"},
    "llama2": {"<s>", "</s>"},
}
# llama2 last: models of other formats have its tokens too. Zephyr's tags are no tokens: only a template shows it.
_KNOWN_BY_TOKENS = ("llama3", "chatml", "mistral", "llama2")


def chat_format_of(tokenizer: Tokenizer) -> str:
    """Name the chat format that a tokenizer's special tokens suggest, a key of FORMATS. Raises ValueError if there is none.

    A guess: a base model has the same tokens as the chat model made from it.
    """
    for name in _KNOWN_BY_TOKENS:
        if _SPECIAL_TOKENS[name] <= tokenizer.special_tokens.keys():
            return name
    raise ValueError(
        f"no chat format is known for this tokenizer: found special tokens {', '.join(list(tokenizer.special_tokens)[:5])}, "
        f"expected those of {' or '.join(_KNOWN_BY_TOKENS)}"
    )


def default_system_of_template(template: str) -> str | None:
    """Return the system prompt that a ChatML template writes where a conversation has none, or None.

    SmolLM2's says in one string `<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, ...<|im_end|>`; its instruct
    models were trained with it.
    """
    literal = re.search(r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:(?!\1)[^\\]|\\.)*?)<\|im_end\|>""", template)
    if literal is None:
        return None
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), literal[2])


def _refuse_tags(turns: Sequence[tuple[str, str]], tags: Sequence[str], name: str) -> None:
    """Raise ValueError for a system or user message with one of the tags, which are plain text to the tokenizer."""
    for role, content in turns:
        for tag in tags:
            if role != "assistant" and tag in content:
                raise ValueError(f"a {role} message holds {tag}, a tag of the {name} chat format: expected text without it")


def _special_tokens(tokenizer: Tokenizer, name: str) -> Mapping[str, int]:
    if missing := _SPECIAL_TOKENS[name] - tokenizer.special_tokens.keys():
        raise ValueError(f"the chat format {name} needs the special token {min(missing)}, which this model's tokenizer lacks")
    return tokenizer.special_tokens


def _checked(messages: Messages) -> list[tuple[str, str]]:
    """Return the messages as (role, content), or raise the ValueError that says what is wrong with them."""
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has content {content!r:.60}, expected text")
        expected = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role is None or (role != expected and not (role == "system" and i == 0)):
            raise ValueError(
                f"message {i} is from {role!r}, expected {expected!r}: system may come first, then user and assistant"
            )
        turns.append((role, content))
    if not turns or turns[-1][0] != "user":
        found = f"the last is from {turns[-1][0]!r}" if turns else "there is none"
        raise ValueError(f"a conversation must end with a user's message, but {found}")
    return turns
