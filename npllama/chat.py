"""Prompt formats: a conversation to the token ids of the prompt that asks for the next answer.

A conversation is a list of `{"role": ..., "content": ...}`: an optional "system" message, then "user" and "assistant" in turn,
the last from the user. Its encoding, the answer's tokens and the end of the turn are the beginning of the encoding of the
longer conversation, so a KV cache can be kept from one turn to the next.

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
    for role, content in turns:
        for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if role != "assistant" and tag in content:
                raise ValueError(f"a {role} message holds {tag}, a tag of the Llama 2 chat format: expected text without it")
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


FORMATS: dict[str, Callable[[Tokenizer, Messages], list[int]]] = {
    "llama3": encode_llama3,
    "llama2": encode_llama2,
    "chatml": encode_chatml,
}
_SPECIAL_TOKENS = {
    "llama3": {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
    "chatml": {"<|im_start|>", "<|im_end|>"},
    "llama2": {"<s>", "</s>"},  # last: chat models of other formats have these too
}


def chat_format_of(tokenizer: Tokenizer) -> str:
    """Name the chat format that a tokenizer's special tokens speak of, a key of FORMATS. Raises ValueError if none does.

    A guess: a base model has the same tokens as the chat model made from it.
    """
    for name, tokens in _SPECIAL_TOKENS.items():
        if tokens <= tokenizer.special_tokens.keys():
            return name
    raise ValueError(
        f"no chat format is known for this tokenizer: found special tokens {', '.join(list(tokenizer.special_tokens)[:5])}, "
        f"expected those of {' or '.join(FORMATS)}"
    )


def chat_format_of_template(template: str) -> str | None:
    """Name the format that a Hugging Face chat template (Jinja) writes, a key of FORMATS; None for one that isn't known.

    Told by the tags it writes. Mistral's, which has [INST] and no <<SYS>>, is another format.
    """
    if "<|start_header_id|>" in template and "<|eot_id|>" in template:
        return "llama3"
    if "<|im_start|>" in template and "<|im_end|>" in template:
        return "chatml"
    if "[INST]" in template and "<<SYS>>" in template:
        return "llama2"
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


def _special_tokens(tokenizer: Tokenizer, name: str) -> Mapping[str, int]:
    if missing := _SPECIAL_TOKENS[name] - tokenizer.special_tokens.keys():
        raise ValueError(f"the chat format {name} needs the special token {min(missing)}, which this model's tokenizer lacks")
    return tokenizer.special_tokens


def _checked(messages: Messages) -> list[tuple[str, str]]:
    """Return the messages as (role, content), or raise the ValueError that says what is wrong with them."""
    turns = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has content {content!r:.60}, expected text")
        expected = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role != expected and not (role == "system" and i == 0):
            raise ValueError(
                f"message {i} is from {role!r}, expected {expected!r}: system may come first, then user and assistant"
            )
        turns.append((role, content))
    if not turns or turns[-1][0] != "user":
        found = f"the last is from {turns[-1][0]!r}" if turns else "there is none"
        raise ValueError(f"a conversation must end with a user's message, but {found}")
    return turns
