"""npllama convert: convert a checkpoint of any format into a model directory."""

from __future__ import annotations

import argparse

from .options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "convert", run, "convert a checkpoint of any format into a model directory")
    p.add_argument(
        "src", metavar="SRC", help="Meta's or Hugging Face's folder, a GGUF file, a .bin or .pt of llama2.c, or hf:owner/name"
    )
    p.add_argument("dst", metavar="DST", help="the model directory to write")
    p.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8", "int4"],
        default="auto",
        help="storage of the weights (default auto: as in SRC, quantised or not); int8 and int4 leave the embedding and norms",
    )
    p.add_argument(
        "--rope-factor",
        type=float,
        metavar="X",
        help="factor of scaled RoPE, if the one inferred from Meta's params.json is wrong",
    )
    p.add_argument("--lora", metavar="DIR", help="merge a PEFT adapter (LoRA) into SRC, its base model")
    tokenizer = p.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.model or tokenizer.json, not SRC's own")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="convert without a tokenizer: ids in, ids out")
    p.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="write N directories, each with the weights of one of N processes"
    )
    p.add_argument("--force", action="store_true", help="replace DST if it is a model directory")


def run(args: argparse.Namespace) -> None:
    """Convert a checkpoint, and print each inferred constant."""
    from npllama_convert import sources

    sources.convert(
        args.src,
        args.dst,
        dtype=args.dtype,
        rope_factor=args.rope_factor,
        force=args.force,
        tokenizer=args.tokenizer,
        no_tokenizer=args.no_tokenizer,
        lora=args.lora,
        ranks=args.ranks,
    )
