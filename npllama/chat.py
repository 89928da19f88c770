"""Prompt formats: a conversation to the token ids of the prompt that asks for the next answer.

A conversation is a list of `{"role": ..., "content": ...}`: an optional "system" message, then "user" and "assistant" in turn,
the last from the user. Its encoding, the answer's tokens and the end of the turn are the beginning of the encoding of the
longer conversation, so a KV cache can be kept from one turn to the next. (But for a system message in Mistral's format: it
moves on to the newest turn.)

Special tokens come from the format alone: what a message's content spells stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from .tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


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
# llama2 last: models of other formats have its tokens too. Zephyr's tags are no tokens: only a template tells of it.
_TOLD_BY_TOKENS = ("llama3", "chatml", "mistral", "llama2")


def chat_format_of(tokenizer: Tokenizer) -> str:
    """Name the chat format that a tokenizer's special tokens speak of, a key of FORMATS. Raises ValueError if none does.

    A guess: a base model has the same tokens as the chat model made from it.
    """
    for name in _TOLD_BY_TOKENS:
        if _SPECIAL_TOKENS[name] <= tokenizer.special_tokens.keys():
            return name
    raise ValueError(
        f"no chat format is known for this tokenizer: found special tokens {', '.join(list(tokenizer.special_tokens)[:5])}, "
        f"expected those of {' or '.join(_TOLD_BY_TOKENS)}"
    )


def chat_format_of_template(template: str) -> str | None:
    """Name the format that a Hugging Face chat template (Jinja) writes, a key of FORMATS; None for one that isn't known.

    Told by the tags it writes. Where one of Mistral's has a blank before [/INST], its tags are no tokens (version 1 of their
    tokenizers, that of Mistral 7B v0.1 and v0.2), which is another format. So is <|user|> without </s>.
    """
    if "<|start_header_id|>" in template and "<|eot_id|>" in template:
        return "llama3"
    if "<|im_start|>" in template and "<|im_end|>" in template:
        return "chatml"
    if "[INST]" in template and "<<SYS>>" in template:
        return "llama2"
    if "[INST]" in template and re.search(r"""(['"])\[/INST\]\1""", template):
        return "mistral"
    if re.search(r"""<\|user\|>(?:\n|\\n)['"]\s*\+\s*\w+(?:\['content'\]|\.content)\s*\+\s*eos_token""", template):
        return "zephyr"
    return None


def default_system_of_template(template: str) -> str | None:
    """The system prompt that a ChatML template writes where a conversation has none, or None.

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
