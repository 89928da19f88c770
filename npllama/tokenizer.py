"""Text to token ids and back: Llama 3's tiktoken files, LLaMA 1/2's SentencePiece models and Hugging Face's tokenizer.json
behind one interface.

>>> tokenizer = load_tokenizer("model/tokenizer.model")         # Llama 3's
>>> tokenizer.encode("hello world!", bos=True)
[128000, 15339, 1917, 0]
>>> tokenizer.decode([15339, 1917, 0])
'hello world!'
"""

from __future__ import annotations

import base64
import binascii
import codecs
import copy
import heapq
import json
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from .checkpoint.foreign import LONG_LIMIT, parse_json, read_bytes
from .errors import NpllamaError, reason

# The split pattern, the limits and the names of the special tokens are those published with Llama 3 (llama-models 0.3.0,
# llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
]
LLAMA3_SPECIAL_TOKENS += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(LLAMA3_SPECIAL_TOKENS))]

# tiktoken takes quadratic time, or fails, on very long texts and on very long runs of only whitespace or
# only other characters. Meta cuts the text at these limits, and the cuts show in the ids, so they are part of the tokenizer.
TIKTOKEN_MAX_ENCODE_CHARS = 400_000
MAX_NO_WHITESPACES_CHARS = 25_000

# A tokenizer.json does not name BOS and EOS. These are what published models call them, the likelier first. Generation ends
# at every one of EOS_NAMES that the vocabulary has, as with Meta's own tokenizer at <|eot_id|>.
BOS_NAMES = ("<|begin_of_text|>", "<s>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
# The tokens of the prompt formats are special, even where a tokenizer.json does not mark them as such.
ALWAYS_SPECIAL = {*BOS_NAMES, *EOS_NAMES, "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"}

PathLike = str | os.PathLike[str]


class TokenizerError(NpllamaError):
    """A tokenizer's file can't be read as one: which file, what was found, what was expected."""


class MissingPackage(TokenizerError):
    """A tokenizer's file is of a kind whose package isn't installed; computing with ids needs none."""


class Tokenizer(ABC):
    """The interface of every kind of tokenizer. Ids outside the vocabulary are a ValueError wherever ids are taken.

    A model may have more rows than its tokenizer has tokens: the embedding is padded to a rounder size, and such a row can be
    sampled. Those ids, up to n_rows, decode to nothing, as in Hugging Face.
    """

    vocab_size: int
    n_rows: int = 0  # the model's vocabulary, if the tokenizer is a model's
    bos_id: int | None  # None: the vocabulary has none
    eos_id: int | None
    adds_bos: bool = True  # False: the model was trained on texts without BOS in front, so encode() puts none there
    stop_ids: frozenset[int]  # generation ends at any of these
    special_tokens: dict[str, int]  # spelling -> id
    silent_ids: frozenset[int] = frozenset()  # ids that decode to nothing

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Turn text into ids.

        bos puts the BOS token in front, unless the ids begin with it already or the model was trained without.
        special=False encodes the spelling of a special token (`<|eot_id|>`) as the plain text it is; special=True as the token.
        Half a surrogate pair, which is no Unicode text, becomes U+FFFD, and two halves that belong together their character
        (as in tiktoken).
        """
        if not isinstance(text, str):
            raise TypeError(f"the text is {type(text).__name__}, expected str")
        ids = self._encode(unicode(text), special)
        if bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def split_special(self, text: str) -> list[str]:
        """Split a text at the spelling of special tokens: text, special token, text, ..., text; a text may be empty."""
        return self._at_special.split(text)

    @cached_property
    def _at_special(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Turn parts as split_special() returns them into ids; a special token that is spelled in a text stays text.

        If no text spells one, the ids equal those of the joined parts, encoded with special=True.
        """
        if self.split_special(text := "".join(parts)) == list(parts):
            return self.encode(text, special=True)
        return self._encode_parts(parts)

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Encode the text between two special tokens by itself."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += [self.special_tokens[part]] if i % 2 else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD.

        As the libraries do: special tokens of byte-level BPE decode to their spelling, SentencePiece's (`<s>`, `</s>`) to
        nothing, and the space that SentencePiece puts before a text is removed.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Turn ids into bytes, which may not be UTF-8."""
        decoder = StreamDecoder(self)
        return b"".join([decoder.push_bytes(id) for id in ids])

    def checked(self, id: int) -> int:
        """Return the id as an int, or raise ValueError for one that neither the tokenizer nor the model has."""
        id = operator.index(id)
        if not 0 <= id < max(self.vocab_size, self.n_rows):
            last = max(self.vocab_size, self.n_rows) - 1
            raise ValueError(f"token id {id} is outside the tokenizer's vocabulary: expected 0 to {last}")
        return id

    def piece(self, id: int) -> str:
        r"""Show one id on one line: special and control tokens by their spelling, a byte that is no character as `<0xE2>`.

        Byte-level: ` to`, a newline is `\n`, a backslash `\\`. SentencePiece's: `▁to`, `<0x0A>`, `<s>`. A row of the model
        without a token is empty.
        """
        id = self.checked(id)
        return self._piece(id) if id < self.vocab_size else ""

    @abstractmethod
    def _piece(self, id: int) -> str: ...

    @abstractmethod
    def token_bytes(self, id: int, opening: bool) -> bytes:
        """Return the bytes that an id below vocab_size adds to a text; opening: only silent ids come before it."""

    @abstractmethod
    def _encode(self, text: str, special: bool) -> list[int]: ...


class StreamDecoder:
    """Decode ids as they are generated, never a part of a character: all pushes joined with flush() equal `decode(ids)`.

    prompt holds the ids that came before, whose text is not returned again: after a prompt, SentencePiece's `▁to` is " to"
    where at the beginning of a text it is "to".
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._opening = True
        for id in prompt:
            self.push(id)

    def push(self, id: int) -> str:
        """Return the text that is certain once this id is known; empty while a character is incomplete."""
        return self._utf8.decode(self.push_bytes(id))

    def push_bytes(self, id: int) -> bytes:
        """Return the bytes this id adds, past the UTF-8 decoder: use either this or push."""
        id = self._tokenizer.checked(id)
        if id >= self._tokenizer.vocab_size:
            return b""
        data = self._tokenizer.token_bytes(id, self._opening)
        self._opening = self._opening and id in self._tokenizer.silent_ids
        return data

    def flush(self) -> str:
        """Return U+FFFD if the ids ended inside a character, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Load a tokenizer's file of any kind, detected from its content; `gs://` and `az://` paths are opened through blobfile.

    tokenizer_config.json, special_tokens_map.json and generation_config.json next to it say which tokens are BOS and EOS, and
    whether BOS is put in front of a text. Raises TokenizerError for a file of another kind, for a damaged one, and for one
    that needs a package that isn't installed.
    """
    data = _read(path)
    line = data.lstrip().split(b"\n", 1)[0]
    if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?", line):
        return TiktokenTokenizer(path, data)
    if len(data) > 2 and data[0] == data[2] == 0x0A:  # protobuf: ModelProto.pieces, one byte of length, SentencePiece.piece
        return SentencePieceTokenizer(path, data)
    if line.startswith(b"{"):
        return HuggingFaceTokenizer(path, data)
    if not line:
        found = "an empty file" if not data else "only whitespace"
    elif line.startswith(b"version https://git-lfs"):
        found = "a git-lfs pointer in place of the file (git lfs pull fetches it)"
    elif line.lower().startswith((b"<!doctype", b"<html")):
        found = "an HTML page"
    else:
        found = f"a file that begins {data[:24]!r}"
    raise TokenizerError(
        f"{path}: found {found}, expected lines of base64 and rank (Llama 3), a SentencePiece model or a tokenizer.json"
    )


class TiktokenTokenizer(Tokenizer):
    """Llama 3's byte-level BPE: a file of `base64(piece) rank` lines, and 256 special tokens after the last rank.

    data is the file's content where it has been read already. The file is read directly, not through tiktoken's loader, which
    takes a copy from the machine's temporary folder by a hash of the path: stale, or somebody else's.

    Text is encoded by the package tiktoken or, where it isn't installed, by BytePairEncoding: their ids are the same. Either is
    imported at the first encoding, so that decoding needs neither.
    """

    def __init__(self, path: PathLike, data: bytes | None = None):
        self._path = path
        ranks = _parse_ranks(path, _read(path) if data is None else data)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(self.special_tokens)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.stop_ids = frozenset(self.special_tokens[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
        self.ranks = ranks
        self._bytes = [*ranks, *(name.encode() for name in self.special_tokens)]

    @cached_property
    def encoding(self) -> _Encoding:
        """Return the encoder: tiktoken's, or our own over the package regex where tiktoken is not installed."""
        try:
            import tiktoken
        except ImportError:
            return BytePairEncoding(self._path, self.ranks, self.special_tokens)
        return tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        allowed = "all" if special else set()
        ids = []
        for part in split_long(text):
            ids += self.encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return ids

    def token_bytes(self, id: int, opening: bool) -> bytes:  # noqa: D102
        return self._bytes[id]

    def _piece(self, id: int) -> str:
        data = self._bytes[id]
        return "".join(map(_visible, data.decode("utf-8", "surrogateescape")))


class _Encoding(Protocol):
    """The part of tiktoken.Encoding that is used here."""

    def encode(self, text: str, *, allowed_special: object, disallowed_special: tuple[str, ...]) -> list[int]: ...


class BytePairEncoding:
    """Llama 3's encoding over the package regex, which has more platforms' wheels than tiktoken has. Slower, the same ids."""

    def __init__(self, path: PathLike, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]):
        self._words = import_regex(path).compile(LLAMA3_PATTERN)
        self._special_tokens = special_tokens
        self._special = re.compile("(" + "|".join(map(re.escape, special_tokens)) + ")")
        self._ids_of = lru_cache(1 << 16)(lambda word: tuple(ids_of(word.encode(), ranks)))

    def encode(self, text: str, *, allowed_special: object = (), disallowed_special: tuple[str, ...] = ()) -> list[int]:
        """Turn text into ids; the spelling of special tokens means them if allowed_special is "all", else plain text."""
        ids: list[int] = []
        for part in self._special.split(text) if allowed_special == "all" else [text]:
            if allowed_special == "all" and part in self._special_tokens:
                ids.append(self._special_tokens[part])
            else:
                for word in self._words.findall(part):
                    ids += self._ids_of(word)
        return ids


def import_regex(path: PathLike) -> ModuleType:
    """Return the package regex, which comes with tiktoken; MissingPackage says how to get either."""
    try:
        import regex  # Python's own re has no \p{L}
    except ImportError:
        raise MissingPackage(
            f"{path}: text needs the package tiktoken or the package regex: pip install regex, or apt install python3-regex"
        ) from None
    return regex


def ids_of(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Return a piece's ids: its own if the vocabulary has it, which tiktoken checks first, else those that merging leaves."""
    if piece in ranks:
        return [ranks[piece]]
    *_, parts = merge_rounds(piece, ranks)
    return [ranks[part] for part in parts if part is not None]


def merge_rounds(piece: bytes, ranks: Mapping[bytes, int]) -> Iterator[list[bytes | None]]:
    """Merge a piece's bytes until no neighbours are a piece together. Yields the parts before the first merge and after each.

    In each round the pair of the lowest rank merges, the leftmost of equals: what was learned first comes first. Each time it
    yields the same list, changed in place: a part that merged into the one on its left is None.
    """
    parts: list[bytes | None] = [piece[i : i + 1] for i in range(len(piece))]
    n = len(parts)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # each part's neighbours
    pairs: list[tuple[int, int, bytes]] = []  # a heap, whose smallest is the lowest rank, and then the leftmost

    def offer(left: int) -> None:
        if left < 0 or after[left] == n or (one := parts[left]) is None or (other := parts[after[left]]) is None:
            return
        if (joined := one + other) in ranks:
            heapq.heappush(pairs, (ranks[joined], left, joined))

    for left in range(n):
        offer(left)
    yield parts
    while pairs:
        _, left, joined = heapq.heappop(pairs)
        if (one := parts[left]) is None or (right := after[left]) == n or (other := parts[right]) is None:
            continue  # it has merged with the one on its left meanwhile
        if one + other != joined:
            continue  # one of the two has merged with another
        parts[left], parts[right] = joined, None
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
        offer(before[left])
        offer(left)
        yield parts


class SentencePieceTokenizer(Tokenizer):
    """LLaMA 1 and 2's BPE with byte fallback, run by the sentencepiece package.

    data is the file's content where it has been read already. Every id is SentencePiece's own. It spells a space as U+2581 (▁),
    so a text that holds this character itself comes back with a space in its place: the one text that doesn't round-trip.
    (A model trained to collapse spaces, as stories260K's was and LLaMA's was not, loses those too.)

    tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json in its folder may add tokens, as ChatML's to LLaMA's
    vocabulary. They are looked for in the text first. Each part between them is a text of its own, with SentencePiece's space
    in front, as in llama.cpp; but where Hugging Face wrote these files, only the first part gets one, or with `legacy` each,
    and none that begins with a space.
    """

    def __init__(self, path: PathLike, data: bytes | None = None):
        data = _read(path) if data is None else data
        try:
            import sentencepiece
        except ImportError:
            raise MissingPackage(
                f"{path}: a SentencePiece model needs the package sentencepiece: pip install 'npllama[convert]'"
            ) from None
        try:
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TokenizerError(f"{path}: found a damaged file ({error}), expected a SentencePiece model") from error
        n, bos, eos = processor.vocab_size(), processor.bos_id(), processor.eos_id()
        if bos < 0 or eos < 0:
            raise TokenizerError(f"{path}: found a SentencePiece model without BOS or EOS, expected one with both")
        self._pieces = {id: processor.id_to_piece(id) for id in range(n)}
        self._bytes = {id: self._piece_bytes(id) for id in range(n)}
        control = {id for id in range(n) if processor.is_control(id)}
        settings = _Settings(path)
        added = [token for token in settings.added() if token.id not in control and not self._is_unknown(token)]
        for token in added:
            if self._pieces.setdefault(token.id, token.content) != token.content:
                found = self._pieces[token.id]
                raise TokenizerError(f"{path}: found {found!r:.60} as id {token.id}, expected the added {token.content!r:.60}")
            self._bytes[token.id] = b"" if token.special else token.content.encode()
        self.vocab_size = max(self._pieces) + 1
        self.silent_ids = frozenset(control | {token.id for token in added if token.special})
        self.special_tokens = {self._pieces[id]: id for id in sorted(self.silent_ids)}
        ids = {piece: id for id, piece in self._pieces.items()}
        self.adds_bos = settings.adds_bos is not False
        named_bos, named_eos = (settings.id(name, ids, self.vocab_size) for name in ("bos", "eos"))
        self.bos_id = bos if named_bos is None else named_bos
        self.eos_id = eos = eos if named_eos is None else named_eos
        ends = {token.id for token in added if token.special and token.content in EOS_NAMES}
        self.stop_ids = frozenset({eos, *settings.stop_ids(ids, self.vocab_size), *ends})
        controls = [AddedToken(id, self._pieces[id], True) for id in sorted(control)]
        self._plain = _Splitter([token for token in added if not token.special])
        self._special = _Splitter([*added, *controls])
        # Whether the model puts a space before every text when encoding; decoding drops it at the beginning of a text.
        self._adds_space = self._pieces[processor.encode("a")[0]].startswith("▁")
        self._space_each, self._without_space = True, processor
        if settings.is_hugging_face and self._adds_space:
            self._space_each = settings.is_legacy
            self._without_space = sentencepiece.SentencePieceProcessor(model_proto=data + NO_DUMMY_PREFIX)

    def _is_unknown(self, token: AddedToken) -> bool:
        """Return whether Hugging Face's list names the unknown token, which SentencePiece doesn't take for a control symbol."""
        return token.id < self._processor.vocab_size() and self._processor.is_unknown(token.id)

    def _piece_bytes(self, id: int) -> bytes:
        processor = self._processor
        piece = self._pieces[id]
        if processor.is_control(id):
            return b""
        if processor.is_byte(id):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        if processor.is_unknown(id):
            return processor.decode([id]).encode()
        return piece.replace("▁", " ").encode()

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        self._extend(ids, text, self._special if special else self._plain)
        return ids

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                self._extend(ids, unicode(part), self._plain)
        return ids

    def _extend(self, ids: list[int], text: str, splitter: _Splitter) -> None:
        for part in splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            elif part[0] in " ▁" or (ids and not self._space_each):
                ids += self._without_space.encode(part)
            else:  # encoded by itself, with a space in front
                ids += self._processor.encode(part)

    def token_bytes(self, id: int, opening: bool) -> bytes:  # noqa: D102
        data = self._bytes.get(id, b"")  # a gap among the ids
        return data[1:] if opening and self._adds_space and data[:1] == b" " and self._pieces[id][0] == "▁" else data

    def _piece(self, id: int) -> str:
        return self._pieces.get(id, "")


NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false: the last value of a field holds


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before the rest of it is split, as tokenizer_config.json and others define it."""

    id: int
    content: str
    special: bool
    lstrip: bool = False  # includes the whitespace before it
    rstrip: bool = False


class _Splitter:
    """Find added tokens in a text; of several that begin at the same place, the longest."""

    def __init__(self, tokens: Sequence[AddedToken]):
        tokens = sorted(tokens, key=lambda token: -len(token.content))
        self._ids = [token.id for token in tokens]
        parts = [r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token in tokens]
        self._pattern = re.compile("|".join(parts)) if parts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the texts between the tokens, none of them empty, and the tokens' ids."""
        at = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if at < match.start():
                yield text[at : match.start()]
            yield self._ids[(match.lastindex or 1) - 1]
            at = match.end()
        if at < len(text):
            yield text[at:]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the tokenizers package: byte-level BPE (Llama 3, SmolLM2) or SentencePiece's kind (Llama 2).

    data is the file's content where it has been read already. Every id is the package's own. A vocabulary that lacks some of
    the 256 bytes, as SmolLM2's does, drops the characters that need them: such a text doesn't round-trip.

    BOS is put in front of a text if tokenizer_config.json says so (`add_bos_token`), or else if the file's own post-processor
    does it. BOS and EOS are what files next to it name, or else the published models' names; generation ends at EOS, at the
    `eos_token_id` of generation_config.json, and at every one of EOS_NAMES that is a special token.
    """

    def __init__(self, path: PathLike, data: bytes | None = None):
        data = _read(path) if data is None else data
        self._path = path
        try:
            import tokenizers
        except ImportError:
            raise MissingPackage(
                f"{path}: a tokenizer.json needs the package tokenizers: pip install 'npllama[convert]'"
            ) from None
        values = _parse_json(path, data)
        try:
            self._load(path, data, values, tokenizers)
        except TokenizerError:
            raise
        except BaseException as error:  # the package raises plain Exception, and its panics are not even that
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise TokenizerError(f"{path}: found {reason(error)}, expected a tokenizer.json") from None

    def _load(self, path: PathLike, data: bytes, values: dict[str, Any], tokenizers: ModuleType) -> None:
        added = values.get("added_tokens") or []
        _check_merges(path, values.get("model"))
        ids = {token["content"]: token["id"] for token in added}
        forgotten = [token for token in added if not token["special"] and token["content"] in ALWAYS_SPECIAL]
        for token in forgotten:
            token["special"] = True
        self._library = library = tokenizers.Tokenizer.from_buffer(json.dumps(values).encode() if forgotten else data)
        library.no_truncation()
        library.no_padding()
        decoders = _decoder_types(values.get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        if not self._byte_level and not decoders & {"ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"{path}: found the decoder {', '.join(sorted(decoders)) or 'none'}, "
                "expected that of byte-level BPE or of SentencePiece"
            )
        vocabulary = library.get_vocab(with_added_tokens=True)
        for content, id in ids.items():
            if vocabulary.get(content) != id:  # the package counts on where the ids have a gap
                raise TokenizerError(f"{path}: found id {id!r:.20} for {content!r:.60}, expected {vocabulary.get(content)}")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._added = {id: token.content for id, token in library.get_added_tokens_decoder().items()}
        special = sorted(id for id, token in library.get_added_tokens_decoder().items() if token.special)
        self.special_tokens = {self._added[id]: id for id in special}
        if not self._byte_level:
            self.silent_ids = frozenset(special)
        # Whether decoding drops the space that SentencePiece's kind puts before a text.
        space = next((id for token, id in vocabulary.items() if token.startswith("▁")), None)
        self._drops_space = space is not None and not library.decode([space], skip_special_tokens=False).startswith(" ")
        self._choose_ids(_Settings(path), vocabulary)
        library.encode_special_tokens = True  # the special tokens' spelling is text

    @cached_property
    def _library_for_special(self) -> Any:
        """Return a second library, for special=True: encode() has no such argument, and threads may share this object."""
        library = copy.deepcopy(self._library)
        library.encode_special_tokens = False
        return library

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Encode the whole at once: special tokens may take spaces next to them, and the first text differs in its first space.

        In a library of its own, special tokens have names that no text holds.
        """
        if any(_NO_TEXT in part for part in parts):
            raise TokenizerError(f"{self._path}: can't split this text: it holds U+10FFFD and a special token's spelling")
        text = "".join(_private_name(self.special_tokens[part]) if i % 2 else part for i, part in enumerate(parts))
        return self._run(self._library_for_parts, unicode(text))

    @cached_property
    def _library_for_parts(self) -> Any:
        values: dict[str, Any] = _parse_json(self._path, self._library.to_str().encode())
        names = {token["content"]: _private_name(token["id"]) for token in values["added_tokens"] if token["special"]}
        for token in values["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = values["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
        else:  # Unigram's
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if (unknown := model.get("unk_token")) in names:
            model["unk_token"] = names[unknown]
        values["post_processor"] = None
        try:
            return type(self._library).from_str(json.dumps(values))
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"{self._path}: can't take a special token's spelling as text: {reason(error)}") from None

    def _choose_ids(self, settings: _Settings, vocabulary: Mapping[str, int]) -> None:
        with_bos, without = self._library.encode("a").ids, self._library.encode("a", add_special_tokens=False).ids
        processors = with_bos[0] if with_bos[:1] != without[:1] else None
        named = settings.id("bos", vocabulary, self.vocab_size)
        known = next((self.special_tokens[name] for name in BOS_NAMES if name in self.special_tokens), None)
        found = [processors, named, known] if settings.adds_bos is None else [named, processors, known]
        self.bos_id = next((id for id in found if id is not None), None)
        self.adds_bos = self.bos_id is not None and (processors is not None if settings.adds_bos is None else settings.adds_bos)
        named = settings.id("eos", vocabulary, self.vocab_size)
        ends = [self.special_tokens[name] for name in EOS_NAMES if name in self.special_tokens]
        self.eos_id = named if named is not None else next(iter(ends), None)
        self.stop_ids = frozenset({*settings.stop_ids(vocabulary, self.vocab_size), *ends})  # EOS is one of either

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._run(self._library_for_special if special else self._library, text)

    def _run(self, library: Any, text: str) -> list[int]:
        try:
            return library.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise TokenizerError(f"{self._path}: can't split this text: {reason(error)}") from None

    def token_bytes(self, id: int, opening: bool) -> bytes:  # noqa: D102
        if id in self.silent_ids:
            return b""
        token = self._library.id_to_token(id) or ""  # a gap among the ids
        if self._byte_level:
            in_bytes = id not in self._added and all(char in _BYTE_OF_CHAR for char in token)
            return bytes(_BYTE_OF_CHAR[char] for char in token) if in_bytes else token.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:-1], 16)])
        text = token.replace("▁", " ")
        return (text[1:] if opening and self._drops_space and text[:1] == " " else text).encode()

    def _piece(self, id: int) -> str:
        if self._byte_level:
            return "".join(map(_visible, self.token_bytes(id, False).decode("utf-8", "surrogateescape")))
        return self._library.id_to_token(id) or ""


def unicode(text: str) -> str:
    """Return a text without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_NO_TEXT = "\U0010fffd"  # the last character for private use


def _private_name(id: int) -> str:
    return f"{_NO_TEXT}{id}{_NO_TEXT}"


class _Settings:
    """The settings for BOS and EOS in the files next to a tokenizer's. A remote tokenizer, or Meta's, has none."""

    def __init__(self, path: PathLike):
        folder = None if isinstance(path, str) and "://" in path else Path(path).parent

        def values(name: str) -> dict[str, object]:
            if folder is None or not (folder / name).is_file():
                return {}
            return _parse_json(folder / name, _read(folder / name))

        config, self._generation = values("tokenizer_config.json"), values("generation_config.json")
        self._path, self._config, self._added = path, config, values("added_tokens.json")
        self._names = {**values("special_tokens_map.json"), **config}
        self.is_hugging_face, self.is_legacy = "tokenizer_class" in config, bool(config.get("legacy"))
        flag = config.get("add_bos_token")
        self.adds_bos = flag if isinstance(flag, bool) else None

    def id(self, name: str, vocabulary: Mapping[str, int], size: int) -> int | None:
        """Return the id of `bos` or `eos`, or None where none is named; of several (generation_config.json's eos) the first."""
        token = self._names.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
            return vocabulary[token]
        return next(iter(self._ids(name, size)), None)

    def added(self) -> list[AddedToken]:
        """Return the tokens that tokenizer_config.json (added_tokens_decoder) and added_tokens.json add to tokenizer.model."""
        named = [token.get("content") if isinstance(token, dict) else token for token in self._names.values()]
        # added_tokens.json (before 2023) doesn't say which tokens are special: those named as BOS, EOS and the like are.
        entries: dict[str, object] = {str(id): {"content": text, "special": text in named} for text, id in self._added.items()}
        entries |= _mapping(self._config.get("added_tokens_decoder"))
        found = []
        for id, entry in entries.items():
            token = _mapping(entry)
            content = token.get("content")
            if not re.fullmatch("[0-9]{1,9}", id) or not isinstance(content, str) or not content:
                raise TokenizerError(
                    f"{self._path}: found the added token {content!r:.60} as {id!r:.20}, expected a text and an id"
                )
            special = token.get("special") is True or content in ALWAYS_SPECIAL
            found.append(AddedToken(int(id), content, special, token.get("lstrip") is True, token.get("rstrip") is True))
        return found

    def stop_ids(self, vocabulary: Mapping[str, int], size: int) -> set[int]:
        """Return the ids that end an answer: EOS, end of turn (eot), end of message (eom)."""
        named = (self.id(name, vocabulary, size) for name in ("eos", "eot", "eom"))
        return {*self._ids("eos", size), *(id for id in named if id is not None)}

    def _ids(self, name: str, size: int) -> list[int]:
        found = self._generation.get(f"{name}_token_id")
        ids = found if isinstance(found, list) else [found]
        return [id for id in ids if type(id) is int and 0 <= id < size]  # other values mean nothing


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# GPT-2's alphabet: each byte as one printable character, the bytes without one from U+0100 on (openai/gpt-2, encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def _parse_json(path: PathLike, data: bytes) -> dict[str, object]:
    try:
        return parse_json(data)
    except TypeError as error:
        raise TokenizerError(f"{path}: found {error}, expected a JSON object") from None
    except ValueError as error:
        raise TokenizerError(f"{path}: found damaged JSON ({reason(error)}), expected an object") from None


def _check_merges(path: PathLike, model: object) -> None:
    """Refuse settings at which the package panics and prints pages to standard error; it reports other errors itself."""
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        return
    if (prefix := model.get("continuing_subword_prefix")) not in (None, ""):
        raise TokenizerError(f"{path}: found the continuing_subword_prefix {prefix!r:.60}, expected none")
    vocabulary = model["vocab"]
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or not all(isinstance(part, str) for part in pair) or "".join(pair) not in vocabulary:
            raise TokenizerError(f"{path}: found the merge {merge!r:.60}, expected two tokens whose union is a token")


def _is_panic(error: BaseException) -> bool:
    """Return whether the tokenizers package panicked, as for a pattern that takes too long; its exception can't be imported."""
    return type(error).__name__ == "PanicException"


def _decoder_types(decoder: object) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*map(_decoder_types, decoder.get("decoders") or []))
    return {str(decoder.get("type"))}


def _read(path: PathLike) -> bytes:
    if isinstance(path, str) and "://" in path:
        try:
            import blobfile
        except ImportError:
            raise TokenizerError(f"{path}: a remote path needs the package blobfile: pip install 'npllama[convert]'") from None
        try:
            with blobfile.BlobFile(path, "rb") as file:
                return file.read()
        except Exception as error:  # blobfile's back ends raise types of their own
            raise TokenizerError(f"{path}: can't be read: {error}") from error
    return read_bytes(Path(path), LONG_LIMIT, TokenizerError)


def _visible(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # surrogateescape's code for a byte that is not UTF-8
        return f"<0x{ord(char) - 0xDC00:02X}>"
    return char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode()


def _parse_ranks(path: PathLike, data: bytes) -> dict[bytes, int]:
    """Read `base64(piece) rank` lines, whose ranks must count up from 0: the ids of the special tokens follow from them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        fields = line.split()
        try:
            encoded, rank = fields
            piece = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path}: line {number}: found {line[:60]!r}, expected base64, a space and a rank") from None
        if rank != b"%d" % len(ranks):
            raise TokenizerError(f"{path}: line {number}: found rank {rank[:20].decode('latin-1')}, expected {len(ranks)}")
        if piece in ranks:
            raise TokenizerError(
                f"{path}: line {number}: found {piece!r} again, expected a new piece: rank {ranks[piece]} has it"
            )
        ranks[piece] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{path}: found no piece for {len(missing)} single bytes (0x{missing[0]:02X} first), expected all 256"
        )
    return ranks


def split_long(text: str) -> Iterator[str]:
    """Cut a text where Meta does: every 400,000 characters, and runs of (or without) whitespace every 25,000."""
    for begin in range(0, len(text), TIKTOKEN_MAX_ENCODE_CHARS):
        block = text[begin : begin + TIKTOKEN_MAX_ENCODE_CHARS]
        start = 0
        if len(block) > MAX_NO_WHITESPACES_CHARS:
            for run in re.finditer(r"\s+|\S+", block):
                for cut in range(run.start() + MAX_NO_WHITESPACES_CHARS, run.end(), MAX_NO_WHITESPACES_CHARS):
                    yield block[start:cut]
                    start = cut
        yield block[start:]
