"""Train the embedded demo model on tinyshakespeare, and write it as a torch checkpoint in Meta's form.

    python -m npllama_convert.train_demo ../shared/data/tinyshakespeare.txt CHECKPOINT
    npllama convert CHECKPOINT npllama/demo
    cp CHECKPOINT/training.json CHECKPOINT/MODEL_CARD.md npllama/demo/

CHECKPOINT receives consolidated.00.pth (bfloat16), params.json, tokenizer.model, generation_config.json, training.json (data,
shape, losses, seed, versions) and MODEL_CARD.md. The best weights by validation loss are kept. Needs torch, tokenizers,
tiktoken; about an hour on one or two cores.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, models, pre_tokenizers, trainers
from torch import nn

from npllama.checkpoint.atomic import new_file, write_file
from npllama.tokenizer import LLAMA3_PATTERN, TiktokenTokenizer

N_PIECES = 2000
MAX_SEQ_LEN = 512
PARAMS = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": N_PIECES + 256,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_seq_len": MAX_SEQ_LEN,
}
GENERATION = {"temperature": 0.8, "top_p": 0.95}  # greedy, so small a model repeats itself
VALIDATION_SHARE = 0.1


def train_tokenizer(text: str, path: Path) -> None:
    """Write a tokenizer.model in Llama 3's format: one `base64(piece) rank` a line, the 256 bytes first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            # No piece joins a colon with the line break, so that a prompt may end in "ROMEO:".
            pre_tokenizers.Split(Regex(r"[\r\n]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_PIECES, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    # ByteLevel writes each byte as a printable character: printable Latin-1 as itself, the others from U+0100 on, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(byte_of) == set(alphabet)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in piece)).decode()} {rank}" for piece, rank in pieces]
    write_file(path, ("\n".join(lines) + "\n").encode())


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, PARAMS["norm_eps"])


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(-2, -3) for w in (self.wq, self.wk, self.wv))
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.float().unflatten(-1, (-1, 2))) * rotation).flatten(-2) for y in (q, k)
        )
        heads = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return self.wo(heads.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, multiple_of: int):
        super().__init__()
        ffn_dim = multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of)
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, params: dict):
        super().__init__()
        self.attention = Attention(params["dim"], params["n_heads"], params["n_kv_heads"])
        self.feed_forward = FeedForward(params["dim"], params["multiple_of"])
        self.attention_norm = RMSNorm(params["dim"])
        self.ffn_norm = RMSNorm(params["dim"])


class Transformer(nn.Module):
    """Define Meta's Llama, with Meta's parameter names; the one addition is dropout, on the embeddings and both branches."""

    def __init__(self, params: dict, dropout: float):
        super().__init__()
        self.tok_embeddings = nn.Embedding(params["vocab_size"], params["dim"])
        self.layers = nn.ModuleList(Block(params) for _ in range(params["n_layers"]))
        self.norm = RMSNorm(params["dim"])
        self.dropout = nn.Dropout(dropout)
        head_dim = params["dim"] // params["n_heads"]
        frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(params["max_seq_len"]).float(), frequencies)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                branch_end = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * params["n_layers"]) if branch_end else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tok_embeddings(tokens))
        for layer in self.layers:
            x = x + self.dropout(layer.attention(layer.attention_norm(x), self.rotation[: tokens.shape[-1]]))
            x = x + self.dropout(layer.feed_forward(layer.ffn_norm(x)))
        return F.linear(self.norm(x), self.tok_embeddings.weight)  # tied


def split_speeches(text: str) -> list[str]:
    """Split a text into speeches, each with its speaker's name and the empty line that follows."""
    return [speech + "\n\n" for speech in text.strip().split("\n\n")]


def scene(speeches: list[list[int]], start: int, length: int, tokenizer: TiktokenTokenizer) -> tuple[np.ndarray, int]:
    """Return BOS, whole speeches from `start` on that fit, EOS; and the next start. A first speech too long is cut."""
    bos, eos = (tokenizer.special_tokens[name] for name in ("<|begin_of_text|>", "<|end_of_text|>"))
    ids, i = [bos], start
    while i < len(speeches) and len(ids) + len(speeches[i]) <= length - 1:
        ids += speeches[i]
        i += 1
    ids = [*ids, eos] if i > start else (ids + speeches[i])[:length]
    row = np.full(length, -1, dtype=np.int64)
    row[: len(ids)] = ids
    return row, max(i, start + 1)


def loss_of(model: Transformer, rows: np.ndarray, reduction: str = "mean") -> torch.Tensor:
    ids = torch.from_numpy(rows)
    targets = ids[:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1].clamp(min=0))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)


def card(record: dict) -> str:
    """Return MODEL_CARD.md, from the content of training.json."""
    options = record["arguments"]
    facts = {
        "data": f"`{record['data']}` (karpathy/char-rnn: 1.1 MB, public domain), sha256 `{record['data_sha256']}`",
        "tokenizer": f"Llama 3's split pattern, {N_PIECES:,} pieces of byte-level BPE trained on the text, 256 special tokens",
        "shape": ", ".join(f"{key} {value}" for key, value in PARAMS.items()) + "; tied embeddings",
        "training": f"{record['training_tokens']:,} tokens; {options['steps']:,} steps of {options['batch']} scenes, which are "
        f"whole speeches between BOS and EOS, at most {PARAMS['max_seq_len']} tokens; Muon and AdamW, learning rate "
        f"{options['lr']}, dropout {options['dropout']}",
        "validation": f"{record['validation']}: loss {record['best_validation_nats_per_token']} nats a token, "
        f"{record['best_validation_bits_per_character']} bits a character; the best step was kept",
        "seed": options["seed"],
        "made by": f"`convert/train_demo.py` in {record['minutes']:.0f} minutes; versions and losses are in `training.json`",
        "storage": "bfloat16",
        "sampling": f"temperature {GENERATION['temperature']}, top-p {GENERATION['top_p']}, stored as recommended",
        "licence": "MIT, as npllama; the text is in the public domain",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""\
# The embedded demo model

A Llama 3 of {record["parameters"]:,} parameters that writes verse in the manner of Shakespeare's plays. With it, npllama can be
run, tested and taught without a download.

| | |
|---|---|
{table}

## What it can't do

It knows nothing, answers nothing and follows no instruction: it has seen one text of a million characters. It writes
speakers' names, line lengths, old spellings and short runs of sense; plots, facts and longer thoughts it does not keep.
Other languages, code and modern English are outside what it has seen. `npllama chat` runs on it as a test of the machinery.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1616)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    text = args.text.read_text(encoding="utf-8")
    all_speeches = split_speeches(text)
    cut = round(len(all_speeches) * (1 - VALIDATION_SHARE))
    train_text = "".join(all_speeches[:cut])
    train_tokenizer(train_text, args.out / "tokenizer.model")
    tokenizer = TiktokenTokenizer(args.out / "tokenizer.model")
    assert tokenizer.vocab_size == PARAMS["vocab_size"]
    speeches = [tokenizer.encode(speech) for speech in all_speeches]
    train, validation = speeches[:cut], speeches[cut:]

    length = MAX_SEQ_LEN + 1
    scenes, i = [], 0
    while i < len(validation):
        row, i = scene(validation, i, length, tokenizer)
        scenes.append(row)
    validation_rows = np.stack(scenes)
    n_characters = len("".join(all_speeches[cut:]))

    model = Transformer(PARAMS, args.dropout)
    # Muon for the matrices inside the blocks: the text is small, and it learns more from each pass than AdamW does.
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([model.tok_embeddings.weight], weight_decay=args.weight_decay, betas=(0.9, 0.98)),
        torch.optim.AdamW(vectors, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    n_train = sum(map(len, train))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {n_train:,} training tokens", flush=True)

    best, history, started = math.inf, [], time.time()
    for step in range(1, args.steps + 1):
        warm, done = min(1.0, step / 100), step / args.steps
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        model.train()
        rows = np.stack([scene(train, int(i), length, tokenizer)[0] for i in rng.integers(len(train), size=args.batch)])
        loss = loss_of(model, rows)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0 or step == args.steps:
            model.eval()
            with torch.no_grad():
                batches = np.array_split(validation_rows, math.ceil(len(validation_rows) / 8))
                total = sum(float(loss_of(model, b, "sum")) for b in batches)
            nats = total / int((validation_rows[:, 1:] >= 0).sum())
            history.append({"step": step, "train": round(float(loss), 4), "validation": round(nats, 4)})
            print(f"step {step}: train {loss:.3f} validation {nats:.4f} ({time.time() - started:.0f} s)", flush=True)
            if nats < best:
                best = nats
                best_bits = total / n_characters / math.log(2)
                state = {name: p.detach().to(torch.bfloat16).clone() for name, p in model.state_dict().items()}
                with new_file(args.out / "consolidated.00.pth") as file:
                    torch.save(state, file)

    write_file(args.out / "params.json", (json.dumps(PARAMS, indent=2) + "\n").encode())
    write_file(args.out / "generation_config.json", (json.dumps(GENERATION, indent=2) + "\n").encode())
    record = {
        "data": args.text.name,
        "data_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest(),
        "validation": f"last {VALIDATION_SHARE:.0%} of the speeches",
        "training_tokens": n_train,
        "parameters": sum(p.numel() for p in model.parameters()),
        "best_validation_nats_per_token": round(best, 4),
        "best_validation_bits_per_character": round(best_bits, 4),
        "minutes": round((time.time() - started) / 60, 1),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("text", "out")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__},
        "history": history,
    }
    write_file(args.out / "training.json", (json.dumps(record, indent=2) + "\n").encode())
    write_file(args.out / "MODEL_CARD.md", card(record).encode())


if __name__ == "__main__":
    main()
